"""What the report says of scores, filters and trainings: numbers and figures from the files of their run folders."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.pass_at_k import pass_at_k
from ..core.row_sources import read_rows
from . import report_figures as figures
from .report_flow import flow
from .report_heat_map import heat_map
from .report_ledger import describe_ledger
from .report_samples import TaskSamples, sample_figures
from .report_steps import describe_report
from .scores import PROBLEMS_FILE, SCORES_FILE, percent, points, shown_metrics
from .tool_use import TOOL_FACTS
from .uncertainty import paired_difference


@dataclass(frozen=True)
class Run:
    """One run folder."""

    name: str
    path: Path
    manifest: dict[str, Any]

    @property
    def stage(self) -> str:
        """The verb that made it."""
        return self.manifest["stage"]

    def json(self, file: str) -> Any:
        """Return a JSON file of the folder, None where there is none."""
        path = self.path / file
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def rows(self, file: str) -> list[dict[str, Any]]:
        """Return the rows of a JSONL file of the folder, none where there is no file."""
        path = self.path / file
        return [row for _, row in read_rows(path)] if path.exists() else []


# ---------------------------------------------------------------------------------------------------------------------
# scores


@dataclass(frozen=True)
class _Entry:
    """A run's scores on one task in one mode, with the counts of its problems."""

    run: str
    mode: str
    scores: dict[str, Any]
    problems: list[dict[str, Any]]
    samples: TaskSamples | None

    @property
    def name(self) -> str:
        return self.run if self.mode == "none" else f"{self.run} +{self.mode}"


def describe_tasks(
    evaluations: list[Run], samples: Mapping[str, Mapping[str, TaskSamples]]
) -> Iterator[dict[str, Any]]:
    """Yield for each task: the runs that have it in every mode, their curves, and how they differ.

    Args:
        evaluations: run folders with scores.
        samples: run -> task -> its samples.
    """
    tasks: dict[str, list[_Entry]] = {}
    for run in evaluations:
        counts: dict[str, list[dict[str, Any]]] = {}
        for row in run.rows(PROBLEMS_FILE):
            counts.setdefault(row["task"], []).append(row)
        for label, of in run.json(SCORES_FILE).items():
            entry = _Entry(run.name, of.get("mode", "none"), of, counts[label], samples[run.name].get(label))
            tasks.setdefault(of.get("task", label), []).append(entry)
    for task, entries in tasks.items():
        scores = {entry.name: entry.scores for entry in entries}
        metrics = shown_metrics(scores.values())
        with_tools = {name: of["tools"] for name, of in scores.items() if "tools" in of}
        pairs = list(_pairs(entries))
        changes = [_change(first, second) for first, second in pairs]
        yield {
            "name": task,
            "metrics": metrics,
            "runs": [_score_row(name, of, metrics) for name, of in scores.items()],
            "changes": changes,
            "headlines": _headlines(pairs, changes),
            "figures": _task_figures(entries),
            "tools": {
                "runs": list(with_tools),
                "rows": [
                    (fact, [show(use) or "–" for use in with_tools.values()]) for fact, show in TOOL_FACTS.items()
                ],
            },
            "agreement": {name: of["agreement"] for name, of in scores.items() if "agreement" in of},
        }


def _pairs(entries: list[_Entry]) -> Iterator[tuple[_Entry, _Entry]]:
    """Yield what is compared: each entry with the first of its mode, and that one with its own run without tools."""
    first: dict[str, _Entry] = {}
    for entry in entries:
        if entry.mode in first:
            yield first[entry.mode], entry
            continue
        first[entry.mode] = entry
        yield from (
            (other, entry) for other in entries if other.run == entry.run and other.mode == "none" != entry.mode
        )


def _headlines(pairs: list[tuple[_Entry, _Entry]], changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what stands at the top of the page: what training did in each mode, or, of a single run, what tools do."""
    of_modes = {two.mode: found for (one, two), found in zip(pairs, changes, strict=True) if one.mode == two.mode}
    return [found for found in (list(of_modes.values()) or changes[-1:]) if found["rows"]]


def _task_figures(entries: list[_Entry]) -> list[str]:
    rates = {e.name: {row["problem_id"]: (row["correct"], row["n"]) for row in e.problems} for e in entries}
    return [
        figures.pass_at_k_curves("pass@k", {entry.name: entry.scores for entry in entries}),
        figures.solve_rates(
            "how often each problem is solved", {name: list(found.values()) for name, found in rates.items()}
        ),
        heat_map("each problem", rates),
        *sample_figures({entry.name: entry.samples for entry in entries if entry.samples}),
    ]


def _score_row(name: str, of: Mapping[str, Any], metrics: list[str]) -> dict[str, Any]:
    ungradable = of["ungradable"]
    return {
        "name": name,
        "metrics": [percent(of[metric]).split(" ", 1) if metric in of else ("", "") for metric in metrics],
        "problems": f"{of['n_problems']:,}",
        "n": of["n"],
        "resolves": points(of["resolvable"]["same_problems"]),
        "truncated": _share(of["truncated"]),
        "ungradable": _share(ungradable),
        "reasons": ", ".join(f"{count:,} {reason}" for reason, count in ungradable["reasons"].items()),
        "tokens": "–" if of["mean_tokens"] is None else f"{of['mean_tokens']:,.0f}",
    }


def _share(found: Mapping[str, Any] | None) -> tuple[str, str]:
    return (f"{found['count']:,}", f"{100 * found['share']:.1f}%") if found else ("–", "")


def _change(first: _Entry, second: _Entry) -> dict[str, Any]:
    """Compare two entries over the same problems."""
    runs = (first.scores, second.scores)
    pair = [{row["problem_id"]: row for row in entry.problems} for entry in (first, second)]
    change: dict[str, Any] = {"first": first.name, "second": second.name, "problems": len(pair[0]), "rows": []}
    if pair[0].keys() != pair[1].keys() or len(pair[0]) < 2:
        return change | {"note": "other problems or another version: not comparable"}
    both = [key for key in runs[0] if key.startswith("pass@") and key in runs[1]]
    for metric in dict.fromkeys((both[0], both[-1])):
        k = int(metric.removeprefix("pass@"))
        values = [{i: float(pass_at_k(row["n"], [row["correct"]], k)[0]) for i, row in rows.items()} for rows in pair]
        found = paired_difference(*values)
        change["rows"].append(
            {
                "metric": metric,
                "from": f"{100 * runs[0][metric]['value']:.1f}",
                "to": f"{100 * runs[1][metric]['value']:.1f}",
                "difference": f"{100 * found.value:+.1f}",
                "interval": f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}]",
                "sign": 1 if found.low > 0 else -1 if found.high < 0 else 0,
            }
        )
    return change | {"note": None}


# ---------------------------------------------------------------------------------------------------------------------
# filters and training


def describe_filter(run: Run) -> dict[str, Any]:
    """Return the steps of a chain of filters: the flow of its rows, and every histogram that the steps report."""
    steps = run.json("steps.json")
    drawn = [flow(f"rows of {run.name}, step by step", steps["steps"])] if steps["steps"] else []
    drawn += [
        figures.histogram(f"{step['step']}{title}", edges, counts)
        for step in steps["steps"]
        for title, edges, counts in find_histograms(step["report"])
    ]
    own = [(step["step"], *describe_report(step["report"])) for step in steps["steps"] if step["report"]]
    return {"name": run.name, "summary": steps, "steps": steps["steps"], "own": own, "figures": drawn}


def find_histograms(report: Any, path: str = "") -> Iterator[tuple[str, list[float], dict[str, list[int]]]]:
    """Yield `(where, edges, counts by group)` of every histogram in a report, at any depth.

    A histogram is a mapping of `edges` and either `counts` (a list, or lists by group) or lists by name beside them.
    """
    if isinstance(report, list):
        for item in report:
            yield from find_histograms(item, path)
    if not isinstance(report, dict):
        return
    edges = report.get("edges")
    if isinstance(edges, list):
        found = report.get("counts", {name: value for name, value in report.items() if name != "edges"})
        groups = found if isinstance(found, dict) else {"rows": found}
        if len(edges) > 1 and groups:
            yield path, edges, figures.few(groups)
        return
    for name, value in report.items():
        yield from find_histograms(value, path if name == "histogram" else f"{path}, {name}".replace("_", " "))


def describe_training(run: Run) -> dict[str, Any]:
    """Return the curves of a training, and its loss ledger where it has one."""
    metrics = run.rows("metrics.jsonl") or _trainer_log(run.path)
    drawn = []
    for title, names, ylabel in (
        ("loss", ("loss", "unweighted_loss", "eval_loss"), "nats per token"),
        ("weights", ("glow/weight_mean", "glow/weight_min", "glow/weight_max"), "weight"),
        ("share of samples that got worse", ("glow/regressed",), "share"),
        ("gradient norm", ("grad_norm",), ""),
        ("reward", ("reward",), "mean"),
        ("rollouts", ("rollouts/with_calls", "rollouts/call_error_rate", "rollouts/truncated"), "share"),
    ):
        rows = [row for row in metrics if names[0] in row]
        present = [name for name in names if rows and all(isinstance(row.get(name), int | float) for row in rows)]
        if present and len(rows) > 1:
            series = {name.rpartition("/")[2].replace("_", " "): [row[name] for row in rows] for name in present}
            drawn.append(figures.lines(title, [row["step"] for row in rows], series, "step", ylabel))
    ledger = describe_ledger(run.path)
    summary = run.manifest.get("summary") or {}
    numbers = {name: _number(value) for name, value in summary.items() if isinstance(value, int | float | str)}
    drawn += ledger["figures"]
    return {"name": run.name, "summary": numbers, "figures": drawn, "notable": ledger["notable"]}


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _trainer_log(path: Path) -> list[dict[str, Any]]:
    """The log of transformers' own trainer, of the newest checkpoint."""
    states = sorted(path.glob("checkpoint-*/trainer_state.json"), key=lambda file: int(file.parent.name.split("-")[1]))
    return json.loads(states[-1].read_text(encoding="utf-8"))["log_history"] if states else []
