"""What the report says of scores, filters and trainings: numbers and figures from the files of their run folders."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.pass_at_k import pass_at_k
from ..core.trajectory import read_rows
from . import report_figures as figures
from .report_ledger import describe_ledger
from .scores import PROBLEMS_FILE, SCORES_FILE, percent, shown_metrics
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


def describe_tasks(evaluations: list[Run]) -> Iterator[dict[str, Any]]:
    """Yield for each task: the runs that have it, their curves, and how they differ from the first."""
    scores = {run.name: run.json(SCORES_FILE) for run in evaluations}
    counts = {run.name: run.rows(PROBLEMS_FILE) for run in evaluations}
    for task in dict.fromkeys(name for of_run in scores.values() for name in of_run):
        runs = {name: of_run[task] for name, of_run in scores.items() if task in of_run}
        problems = {name: [row for row in counts[name] if row["task"] == task] for name in runs}
        first = next(iter(runs))
        metrics = shown_metrics(runs.values())
        yield {
            "name": task,
            "metrics": metrics,
            "runs": [_score_row(name, of, metrics) for name, of in runs.items()],
            "changes": [_change(first, name, problems, runs) for name in list(runs)[1:]],
            "figures": _task_figures(runs, problems),
            "agreement": {name: of["agreement"] for name, of in runs.items() if "agreement" in of},
        }


def _task_figures(runs: Mapping[str, Any], problems: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    rates = {name: [(row["correct"], row["n"]) for row in rows] for name, rows in problems.items()}
    drawn = [figures.pass_at_k_curves("pass@k", runs), figures.solve_rates("how often each problem is solved", rates)]
    lengths = {
        name: [row["mean_tokens"] for row in rows if row["mean_tokens"] is not None] for name, rows in problems.items()
    }
    if any(lengths.values()):
        edges = np.histogram_bin_edges([value for values in lengths.values() for value in values], bins=20)
        counts = {name: np.histogram(values, edges)[0].tolist() for name, values in lengths.items()}
        drawn.append(figures.histogram("mean tokens of each problem's samples", edges.tolist(), counts, "problems"))
    return drawn


def _score_row(name: str, of: Mapping[str, Any], metrics: list[str]) -> dict[str, Any]:
    ungradable = of["ungradable"]
    return {
        "name": name,
        "metrics": [percent(of[metric]).split(" ", 1) if metric in of else ("", "") for metric in metrics],
        "problems": f"{of['n_problems']:,}",
        "n": of["n"],
        "truncated": _share(of["truncated"]),
        "ungradable": _share(ungradable),
        "reasons": ", ".join(f"{count:,} {reason}" for reason, count in ungradable["reasons"].items()),
        "tokens": "–" if of["mean_tokens"] is None else f"{of['mean_tokens']:,.0f}",
    }


def _share(found: Mapping[str, Any] | None) -> tuple[str, str]:
    return (f"{found['count']:,}", f"{100 * found['share']:.1f}%") if found else ("–", "")


def _change(
    first: str, second: str, problems: Mapping[str, list[dict]], runs: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Compare a run with the first one, over the same problems."""
    pair = {name: {row["problem_id"]: row for row in problems[name]} for name in (first, second)}
    change: dict[str, Any] = {"first": first, "second": second, "problems": len(pair[first]), "rows": []}
    if pair[first].keys() != pair[second].keys() or len(pair[first]) < 2:
        return change | {"note": "other problems or another version: not comparable"}
    both = [key for key in runs[first] if key.startswith("pass@") and key in runs[second]]
    for metric in dict.fromkeys((both[0], both[-1])):
        k = int(metric.removeprefix("pass@"))
        values = [{i: float(pass_at_k(row["n"], [row["correct"]], k)[0]) for i, row in pair[name].items()}
                  for name in (first, second)]  # fmt: skip
        found = paired_difference(*values)
        change["rows"].append(
            {
                "metric": metric,
                "from": f"{100 * runs[first][metric]['value']:.1f}",
                "to": f"{100 * runs[second][metric]['value']:.1f}",
                "difference": f"{100 * found.value:+.1f}",
                "interval": f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}]",
                "sign": 1 if found.low > 0 else -1 if found.high < 0 else 0,
            }
        )
    return change | {"note": None}


# ---------------------------------------------------------------------------------------------------------------------
# filters and training


def describe_filter(run: Run) -> dict[str, Any]:
    """Return the steps of a chain of filters with every histogram that they report."""
    steps = run.json("steps.json")
    drawn = [
        figures.histogram(f"{step['step']}{title}", edges, counts)
        for step in steps["steps"]
        for title, edges, counts in find_histograms(step["report"])
    ]
    return {"name": run.name, "summary": steps, "steps": steps["steps"], "figures": drawn}


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
    ):
        rows = [row for row in metrics if names[0] in row]
        present = [name for name in names if rows and all(isinstance(row.get(name), int | float) for row in rows)]
        if present and len(rows) > 1:
            series = {name.removeprefix("glow/").replace("_", " "): [row[name] for row in rows] for name in present}
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
