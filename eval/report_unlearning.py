"""What the report says of unlearning: utility and forgetting side by side, relearning curves, the path audit."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import report_figures as figures
from .path_dependence import AUDIT_FILE
from .path_report import depth_text, further_parts
from .relearning_curve import CURVES_FILE, RETRAINED, UNLEARNED, curve_points
from .report_results import Run
from .scores import SCORES_FILE
from .uncertainty import mean_over_seeds

SHOWN = {  # of suites with more scores than a table has room for
    "tofu": (
        "model_utility", "retain_probability", "retain_rouge_l", "forget_quality", "forget_probability",
        "forget_rouge_l", "forget_truth_ratio", "forget_extraction_strength", "privleak",
    ),
}  # fmt: skip
UTILITY = ("model_utility", "retain", "real_authors", "world_facts")
AGAINST = ("model_utility", "forget_probability")  # axes of the figure of both
OF_SEED = re.compile(r"(.+)-\d+")  # npo-0, npo-1, ...: a pipeline's stage with `each_seed`


def is_suite(run: Run) -> bool:
    """Whether a run is an evaluation with `suite`, whose scores are not those of samples."""
    return run.stage == "eval" and "suite" in run.manifest


def describe_unlearning(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the tables and figures of all finished runs with a `suite`."""
    finished = [run for run in runs if is_suite(run) and (run.path / SCORES_FILE).exists()]
    by_suite: dict[str, list[tuple[Run, dict[str, Any]]]] = {}
    for run in finished:
        for suite, scores in run.json(SCORES_FILE).items():
            by_suite.setdefault(suite, []).append((run, scores))
    relearned = by_suite.pop("relearning", [])
    audited = by_suite.pop("path_dependence", [])
    for name in ("scaling", "diagnostics"):  # have a section of their own
        by_suite.pop(name, None)
    return {
        "suites": [_suite(name, of) for name, of in by_suite.items()],
        "relearning": _relearning(relearned) if relearned else None,
        "audits": [found for run, _ in audited for found in _audits(run)],
    }


def _suite(name: str, runs: Sequence[tuple[Run, Mapping[str, Any]]]) -> dict[str, Any]:
    everything = list(dict.fromkeys(metric for _, scores in runs for metric, of in scores.items() if _is_score(of)))
    shown = [metric for metric in SHOWN.get(name, everything) if metric in everything]
    shown.sort(key=lambda metric: not metric.startswith(UTILITY))
    utilities = sum(metric.startswith(UTILITY) for metric in shown)
    drawn = []
    merged = merge_seeds([(run.name, scores) for run, scores in runs])
    if all(metric in shown for metric in AGAINST):
        points = {run: tuple(_ends(scores[metric]) for metric in AGAINST) for run, scores in merged}
        labels = [metric.replace("_", " ") for metric in AGAINST]
        drawn.append(figures.points("utility and forgetting", points, *labels))
    return {
        "name": name,
        "groups": [pair for pair in (("utility", utilities), ("forgetting", len(shown) - utilities)) if pair[1]],
        "metrics": [metric.replace("_", " ") for metric in shown],
        "runs": [{"name": run, "cells": [_cell(scores.get(metric)) for metric in shown]} for run, scores in merged],
        "seeds": len(merged) < len(runs),
        "all_runs": [run.name for run, _ in runs],
        "all": [
            {"name": metric.replace("_", " "), "cells": [_cell(scores.get(metric)) for _, scores in runs]}
            for metric in everything
        ],
        "figures": drawn,
    }  # fmt: skip


def merge_seeds(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Make one of the runs that differ in their seed only: means over the seeds of every score, with that interval."""
    groups: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for name, scores in runs:
        match = OF_SEED.fullmatch(name)
        groups.setdefault(match[1] if match else name, []).append((name, scores))
    merged: list[tuple[str, Mapping[str, Any]]] = []
    for group, of in groups.items():
        if len(of) == 1:
            merged += of
            continue
        shared = [metric for metric, found in of[0][1].items() if all(_is_score(s.get(metric)) for _, s in of)]
        means = {metric: vars(mean_over_seeds([scores[metric]["value"] for _, scores in of])) for metric in shared}
        merged.append((f"{group}, {len(of)} seeds", means))
    return merged


def _is_score(found: Any) -> bool:
    return isinstance(found, Mapping) and {"value", "low", "high"} <= set(found)


def _ends(found: Mapping[str, float]) -> tuple[float, float, float]:
    return found["value"], found["low"], found["high"]


def _cell(found: Mapping[str, float] | None) -> tuple[str, str]:
    """Return value and interval; a test's p-value and a measurement without one have no interval."""
    if found is None:
        return "–", ""
    value, low, high = _ends(found)
    return _number(value), f"[{_number(low)}, {_number(high)}]" if low < high else ""


def _number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:.1f}" if 10 <= abs(value) < 1e5 else f"{value:.1e}"


def _relearning(runs: Sequence[tuple[Run, Mapping[str, Any]]]) -> dict[str, Any]:
    """One figure per kind of attack with the unlearned models of all runs and their control, and one table."""
    series: dict[str, dict[str, list[tuple[int, float, float, float]]]] = {}
    controls: dict[str, set[tuple]] = {}
    metric = "probability"
    for run, _ in runs:
        for group, points in curve_points(run.rows(CURVES_FILE), metric).items():
            model, _, attack = group.partition("/")
            of_attack = series.setdefault(attack, {})
            if model != RETRAINED:
                of_attack[run.name if model == UNLEARNED else model] = points
            elif tuple(points) not in controls.setdefault(attack, set()):  # the same control of several runs once
                controls[attack].add(tuple(points))
                of_attack["retrained" if len(controls[attack]) == 1 else f"retrained, {run.name}"] = points
    rows = []
    for run, scores in runs:
        for attack in series:
            label = attack.replace("/", "_")
            models = [name.removesuffix(f"_{label}_start") for name in scores if name.endswith(f"_{label}_start")]
            rows += [_relearning_row(run.name, attack, model, scores) for model in models]
    return {
        "figures": [
            figures.bands(f"relearning, {attack.replace('/', ', ')}", of, "steps", f"{metric} of the forget set")
            for attack, of in series.items()
        ],
        "rows": rows,
    }


def _relearning_row(name: str, attack: str, model: str, scores: Mapping[str, Any]) -> dict[str, Any]:
    label = attack.replace("/", "_")
    halves = scores.get(f"{model}_{label}_steps_to_half")
    above = scores.get(f"{model}_{label}_area_above_control")
    return {
        "name": name, "attack": attack.replace("/", ", "), "model": model,
        "cells": [_cell(scores.get(f"{model}_{label}_{part}")) for part in ("start", "end", "recovery", "area")],
        "half": "–" if halves is None else ", ".join("never" if half is None else f"{half:.0f}" for half in halves),
        "above": _cell(above),
        "note": scores.get(f"{model}_{label}_note", ""),
    }  # fmt: skip


def _audits(run: Run) -> Iterator[dict[str, Any]]:
    for method, of in (run.json(AUDIT_FILE) or {}).items():
        names = list(next(iter(of["outcome"].values())))
        starts = list(next(iter(of["initial_state"].values())))
        distances = of["retrained_distance"] or {}
        yield {
            "name": f"{run.name}: {method}",
            "starts": [name.replace("_", " ") for name in starts],
            "metrics": [name.replace("_", " ") for name in names],
            "paths": [
                {
                    "name": path, "cells": [_number(outcome[name]) for name in names],
                    "start": [_number(of["initial_state"][path][name]) for name in starts],
                    "target": "never" if of["steps_to_target"][path] is None else f"{of['steps_to_target'][path]:.1f}",
                    "depth": depth_text(of["depth"][path]),
                    "retrained": _number(distances[path][-1]["distance"]) if path in distances else "–",
                }
                for path, outcome in of["outcome"].items()
            ],
            "further": [f"{title.split(' ', 1)[1]}, {text}" for title, text in further_parts(of)],
            "figures": [
                figures.lines(
                    "how far paths are apart", of["steps"],
                    {" / ".join(pair["paths"]): pair["curve"] for pair in of["divergence"]}, "steps", "divergence",
                )
            ] if len(of["divergence"]) <= len(figures.SERIES) else [],
        }  # fmt: skip
