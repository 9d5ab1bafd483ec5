"""`afterglow compare A B ...`: do these runs differ, problem by problem, and could the benchmark tell?

The first folder is the baseline. A single folder whose tasks were asked with and without tools is compared with itself:
text-only is the baseline. Runs that share a task but no mode of it are compared across modes. Every difference is
paired (the same problems), comes with its 95% interval over new problems of this kind and a sign-flip p-value, and all
p-values of the table are adjusted together (Holm). Beside it stands what the comparison could have found at all.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import DataError, RecipeError, RunFolderError
from ..core.pass_at_k import check_k, pass_at_k
from ..core.row_sources import read_rows
from ..core.run_folder import write_atomic
from . import report_figures as figures
from .scores import PROBLEMS_FILE, SCORES_FILE, read_scores
from .uncertainty import LEVEL, holm, new_problems_error, paired_difference, problems_needed, resolvable, sign_flip_test

COMPARE_SCHEMA = 1
COMPARE_FILE, COMPARE_PAGE = "compare.json", "compare.html"
FLIPS_SHOWN = 40


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: its scores, and for each task the rows of its problems by their id."""

    name: str
    scores: dict[str, Any]
    problems: dict[str, dict[str, dict[str, Any]]]


def run_compare(folders: Sequence[str], k: Sequence[int] | None = None, output_dir: str | None = None) -> None:
    """Print the comparison of finished evaluations with the first of them.

    Args:
        folders: run folders of `afterglow eval`, the baseline first; or one with both modes.
        k: which pass@k to compare; default: 1 and the largest that both runs can answer.
        output_dir: where compare.json and compare.html are written; nowhere by default.

    Raises:
        RecipeError: one folder with a single mode, or a k above n.
        RunFolderError: a folder is no finished evaluation.
        DataError: the runs have no task in common, or other problems or another version of one.
    """
    runs = [read_evaluation(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    if len(runs) == 1:
        runs = by_mode(runs[0])
    found = compare(runs, k)
    _show(found)
    if output_dir is not None:
        path = Path(output_dir)
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(path / COMPARE_FILE, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        write_atomic(path / COMPARE_PAGE, _page(found))
        print(path / COMPARE_PAGE)


def read_evaluation(folder: str | Path, name: str) -> Evaluation:
    """Read what an evaluation wrote.

    Raises:
        RunFolderError: the folder is no finished evaluation.
    """
    path = Path(folder)
    if not (path / SCORES_FILE).exists() or not (path / PROBLEMS_FILE).exists():
        raise RunFolderError(
            f"{folder}: no {SCORES_FILE} and {PROBLEMS_FILE} in it. Give the folder of a finished `afterglow eval`."
        )
    problems: dict[str, dict[str, dict[str, Any]]] = {}
    for _, row in read_rows(path / PROBLEMS_FILE):
        problems.setdefault(row["task"], {})[row["problem_id"]] = row
    return Evaluation(name, read_scores(path), problems)


def by_mode(run: Evaluation) -> list[Evaluation]:
    """Split an evaluation of both modes in two, text-only first.

    Raises:
        RecipeError: it has one mode only.
    """
    labels: dict[str, list[str]] = {}
    for label, of in run.scores.items():
        labels.setdefault(of.get("mode", "none"), []).append(label)
    if len(labels) < 2:
        raise RecipeError(
            f"afterglow compare: {run.name} has one mode. Give at least two folders of evaluations, the baseline "
            "first, or one whose tasks were asked with `tools: [none, python]`."
        )
    return [
        Evaluation(
            run.name if mode == "none" else f"{run.name} +{mode}",
            {label: run.scores[label] for label in of_mode},
            {label: run.problems[label] for label in of_mode},
        )
        for mode, of_mode in sorted(labels.items(), key=lambda item: item[0] != "none")
    ]


def _pairs(first: Evaluation, second: Evaluation) -> list[tuple[str, str]]:
    """Return which scores are compared: those of one name; of tasks that share none, one mode with the other."""
    found = [(label, label) for label in first.scores if label in second.scores]
    tasks = [{label: of.get("task", label) for label, of in run.scores.items()} for run in (first, second)]
    paired = {tasks[0][label] for label, _ in found}
    return found + [
        (one, other)
        for one, task in tasks[0].items()
        for other, of_task in tasks[1].items()
        if task == of_task and task not in paired
    ]


def compare(runs: Sequence[Evaluation], k: Sequence[int] | None = None) -> dict[str, Any]:
    """Compare evaluations with the first of them; see `run_compare`. What is returned is compare.json."""
    baseline, *others = runs
    rows: list[dict[str, Any]] = []
    flips: list[dict[str, Any]] = []
    unmatched: dict[str, list[str]] = {}
    for other in others:
        pairs = _pairs(baseline, other)
        if not pairs:
            raise DataError(
                f"{baseline.name} has {', '.join(baseline.scores)}, {other.name} has {', '.join(other.scores)}: no "
                "task in common. Evaluate both on the same tasks."
            )
        compared = [set(labels) for labels in zip(*pairs, strict=True)]
        if odd := sorted((baseline.scores.keys() - compared[0]) | (other.scores.keys() - compared[1])):
            unmatched[other.name] = odd
        for labels in pairs:
            rows += _differences(labels, baseline, other, k)
            flips.append(_flips(labels, baseline, other))
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = adjusted
    return {
        "schema": COMPARE_SCHEMA, "baseline": baseline.name, "runs": [run.name for run in others],
        "differences": rows, "flips": flips, "not_compared": unmatched,
    }  # fmt: skip


def _title(labels: tuple[str, str]) -> str:
    return labels[0] if labels[0] == labels[1] else " → ".join(labels)


def _differences(
    labels: tuple[str, str], first: Evaluation, second: Evaluation, k: Sequence[int] | None
) -> list[dict[str, Any]]:
    task, runs = _title(labels), list(zip((first, second), labels, strict=True))
    versions = [run.scores[label].get("version") for run, label in runs]
    if versions[0] != versions[1]:
        raise DataError(
            f"{task}: {first.name} has version {versions[0]}, {second.name} version {versions[1]}; their scores do not "
            "compare. Run the older one again."
        )
    n = [run.scores[label]["n"] for run, label in runs]
    sizes = sorted(set(k)) if k else sorted({1, min(n)})
    check_k(sizes, min(n))
    rows = []
    for size in sizes:
        solved = [_solve_rates(run.problems[label], size) for run, label in runs]
        try:
            interval = paired_difference(*solved)
        except DataError as error:
            raise DataError(f"{task}: {error}") from None
        values = np.array([solved[1][name] - solved[0][name] for name in solved[0]])
        error = new_problems_error(values) or 0.0
        rows.append(
            {
                "task": task, "run": second.name, "metric": f"pass@{size}", "n": n, "n_problems": len(values),
                "from": float(np.mean(list(solved[0].values()))), "to": float(np.mean(list(solved[1].values()))),
                "difference": interval.value, "low": interval.low, "high": interval.high, "method": interval.method,
                "se": error, "p": sign_flip_test(values), "resolvable": resolvable(error) if error else None,
                "problems_needed": problems_needed(interval.value, error, len(values)) if error else None,
                "mean_tokens": [run.scores[label]["mean_tokens"] for run, label in runs],
            }
        )  # fmt: skip
    return rows


def _solve_rates(problems: Mapping[str, Mapping[str, Any]], k: int) -> dict[str, float]:
    return {name: float(pass_at_k(row["n"], [row["correct"]], k)[0]) for name, row in problems.items()}


def _flips(labels: tuple[str, str], first: Evaluation, second: Evaluation) -> dict[str, Any]:
    """Which problems are solved more or less often, the largest changes first."""
    changes = []
    for name, before in first.problems[labels[0]].items():
        after = second.problems[labels[1]][name]
        change = after["correct"] / after["n"] - before["correct"] / before["n"]
        counts = [[row["correct"], row["n"]] for row in (before, after)]
        changes.append({"problem_id": name, "change": change, "from": counts[0], "to": counts[1]})
    changes.sort(key=lambda found: (-abs(found["change"]), found["problem_id"]))
    return {
        "task": _title(labels),
        "run": second.name,
        "better": sum(found["change"] > 0 for found in changes),
        "worse": sum(found["change"] < 0 for found in changes),
        "same": sum(found["change"] == 0 for found in changes),
        "newly_solved": sum(found["from"][0] == 0 < found["to"][0] for found in changes),
        "no_longer_solved": sum(found["to"][0] == 0 < found["from"][0] for found in changes),
        "problems": [found for found in changes if found["change"]],
    }


def _names(folders: Sequence[str]) -> list[str]:
    """Last parts of the paths, as many as tell them apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise RecipeError("afterglow compare: the same folder is given twice.")


# ---------------------------------------------------------------------------------------------------------------------
# what a person sees


def verdict(row: Mapping[str, Any]) -> str:
    """Say in one sentence what a difference means."""
    if row["resolvable"] is None:
        return "every problem changes alike: nothing can be said of others"
    if row["p_holm"] < 1 - LEVEL:
        return "a difference"
    could = f"no difference shown; these {row['n_problems']:,} problems resolve {100 * row['resolvable']:.1f} points"
    if row["problems_needed"] is None:
        return could
    return f"{could}, and {row['problems_needed']:,} would resolve this one"


def _texts(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "from": f"{100 * row['from']:.1f}", "to": f"{100 * row['to']:.1f}",
        "difference": f"{100 * row['difference']:+.1f}",
        "interval": f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]",
        "p": f"{row['p_holm']:.4f}" if row["p_holm"] >= 1e-4 else "< 0.0001",
        "verdict": verdict(row),
    }  # fmt: skip


def _show(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"compared with {found['baseline']}", title_justify="left",
        caption=f"%, paired over problems, 95% intervals; p: sign flips, Holm over {len(found['differences'])}",
    )  # fmt: skip
    for name in ("run", "task", "metric", "from", "to", "difference", "p", "verdict"):
        table.add_column(name, justify="right" if name in ("from", "to", "difference", "p") else "left")
    for row in found["differences"]:
        said = _texts(row)
        cells = (said["from"], said["to"], f"{said['difference']} {said['interval']}", said["p"], said["verdict"])
        table.add_row(row["run"], row["task"], row["metric"], *cells)
    console = Console()
    console.print(table)
    for of in found["flips"]:
        console.print(f"{of['run']}, {of['task']}: {flips_text(of)}", soft_wrap=True, markup=False, highlight=False)
    for run, tasks in found["not_compared"].items():
        console.print(f"{run}: only in one of the two: {', '.join(tasks)}", soft_wrap=True, markup=False)


def flips_text(of: Mapping[str, Any]) -> str:
    """Say how many problems changed."""
    return (
        f"{of['better']:,} problems better, {of['worse']:,} worse, {of['same']:,} alike; {of['newly_solved']:,} solved "
        f"for the first time, {of['no_longer_solved']:,} no more"
    )


def _page(found: Mapping[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("afterglow.eval"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    labels = [f"{row['task']}, {row['metric']}" for row in found["differences"]]
    several = len(found["runs"]) > 1
    if several:
        labels = [f"{row['run']}: {label}" for row, label in zip(found["differences"], labels, strict=True)]
    intervals = [(row["difference"], row["low"], row["high"]) for row in found["differences"]]
    drawn = [figures.differences(f"difference from {found['baseline']}", labels, intervals)]
    drawn += [
        figures.sorted_changes(
            f"{of['run'] + ', ' if several else ''}{of['task']}: change of each problem",
            [problem["change"] for problem in of["problems"]] + [0.0] * of["same"],
        )
        for of in found["flips"]
    ]
    return environment.get_template("compare.html.jinja").render(
        title=f"{found['baseline']} and {', '.join(found['runs'])}",
        found=found,
        rows=[row | _texts(row) | {"sign": _sign(row)} for row in found["differences"]],
        flips=[of | {"text": flips_text(of), "shown": of["problems"][:FLIPS_SHOWN]} for of in found["flips"]],
        figures=drawn,
    )


def _sign(row: Mapping[str, Any]) -> int:
    return 0 if row["p_holm"] >= 1 - LEVEL or row["resolvable"] is None else 1 if row["difference"] > 0 else -1
