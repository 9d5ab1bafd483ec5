"""The page of a study and the overview of all, written from the raw rows; every number on them is computed here."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..eval.report_figures import differences as draw_differences
from ..eval.uncertainty import mean_interval, mean_over_seeds
from .results import Results
from .study import Difference, Study, deciding_differences, difference, reason, verdict

BASE = "base"  # the arm that is the model before training
START, END = "<!-- evidence: made by python -m afterglow.evidence -->", "<!-- /evidence -->"
STATED = {
    True: "which has not changed since the commit of the first run",
    False: "which is **not** that of the commit of the runs: it was not stated before",
}
COLOURS = (
    "<style>svg { --ink: #24231f; --line: #e3e0d8; --s0: #2f6db3; font-family: sans-serif } "
    "@media (prefers-color-scheme: dark) { svg { --ink: #ebe8e0; --line: #38362f; --s0: #79aff0 } }</style>"
)


def study_page(name: str, study: Study, results: Results) -> str:
    """Return the Markdown of a study's page.

    Raises:
        DataError: an arm that the verdict rests on was not run.
    """
    deciding = deciding_differences(study, results)
    about = results.about
    said = verdict(deciding, study.margin)
    samples = results.problems[0]["n"]
    parts = [
        f"# {study.title}",
        f"**{said.capitalize()} at this scale**: {reason(study, deciding)}.{_remark(study, results)}",
        f"Made by `python -m afterglow.evidence` from the rows in `evidence/results/{name}`, by the statement in "
        f"`recipes/evidence/{name}.yaml`, {STATED[about['stated_before']]}.",
        "## Claim",
        f"{study.claim} ({study.source})",
        "## Set-up",
        f"{study.setup} {_sizes(study, results)}, {samples} samples each.",
        _arms(study, results),
        "## What decides",
        f"{study.metric} {study.tasks[study.task]}, `{study.arm}` minus each arm of the table. Intervals are 95%, the "
        "hull of Student's t over the paired seeds and paired t over the problems. Supported: all lie above zero. Not "
        "supported: one lies below the smallest difference that would matter, "
        f"{_points(study.margin)} points. Inconclusive: otherwise.",
        _deciding(study, deciding),
        f"![{study.title}: differences with their intervals]({name}.svg)",
        "## Scores",
        "Mean over the seeds in %, 95% interval (Student's t over seeds; over problems where there is one run).",
        _scores(study, results),
        "## What else was measured",
        _observations(study, results),
        "## Compute",
        _compute(name, about),
    ]
    return "\n\n".join(parts) + "\n"


def study_figure(study: Study, results: Results) -> str:
    """Return an SVG that stands alone: `arm` minus every arm of `against`, on every task."""
    labels, intervals = [], []
    for task, called in study.tasks.items():
        for other in study.against:
            found = difference(results, study.arm, other, task, study.metric)
            labels.append(f"{called}: {study.arm} minus {other}")
            intervals.append((found.value, found.low, found.high))
    svg = draw_differences(f"{study.metric}, {study.arm}", labels, intervals)
    return svg.replace(">", f">{COLOURS}", 1) + "\n"


def overview(found: Mapping[str, tuple[Study, Results | None]], folder: str, all_studies: bool) -> str:
    """Return the table of studies: verdict and what it rests on; those without rows only with `all_studies`.

    Args:
        found: name -> study and its rows.
        folder: where the pages lie, seen from the page that holds the table.
        all_studies: name those that were not run too.
    """
    rows = []
    for name, (study, results) in found.items():
        if results is None:
            if all_studies:
                rows.append([study.title, "not run yet", "", "", f"`make evidence-{name}`"])
            continue
        deciding = deciding_differences(study, results)
        rests = "<br>".join(f"`{one.other}` {_interval(one)}" for one in deciding)
        measured = f"`{study.arm}`, {study.metric} {study.tasks[study.task]}"
        took = f"{_minutes(results.about)} min: `make evidence-{name}`"
        said = verdict(deciding, study.margin) + (
            " (all arms end below the base model)" if _below_base(study, results) else ""
        )
        rows.append([f"[{study.title}]({folder}{name}.md)", said, measured, rests, took])
    if not rows:
        return "No study has been run yet."
    return _table(["study", "verdict at this scale", "primary metric", "difference in points from", "rerun"], rows)


def replace_overview(text: str, table: str) -> str:
    """Put the table between the two marks of a page."""
    return re.sub(f"{START}.*{END}", lambda _: f"{START}\n\n{table}\n\n{END}", text, flags=re.DOTALL)


# ---------------------------------------------------------------------------------------------------------------------
# parts of a page


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(found: Difference) -> str:
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def _of_seeds(found: Difference) -> str:
    return ", ".join(f"{100 * value:+.1f}" for value in found.of_seeds)


def _seeds(results: Results, arm: str) -> str:
    return ", ".join(map(str, results.seeds(arm))) or "not run"


def _sizes(study: Study, results: Results) -> str:
    counts = {task: len({row["problem_id"] for row in results.problems if row["task"] == task}) for task in study.tasks}
    return "Problems: " + ", ".join(f"{counts[task]} {called}" for task, called in study.tasks.items())


def _below_base(study: Study, results: Results) -> bool:
    """Whether every trained arm scores less than the model before training, by the primary metric."""
    means = {arm: _mean_of(results, arm, study.task, study.metric) for arm in study.arms if results.seeds(arm)}
    return BASE in means and means.pop(BASE) > max(means.values())


def _remark(study: Study, results: Results) -> str:
    if not _below_base(study, results):
        return ""
    return (
        f" Every trained arm ends below `{BASE}` on the primary metric: here training costs more than it gives, and "
        "what is compared are losses. Read the verdict with that in mind."
    )


def _arms(study: Study, results: Results) -> str:
    rows = [[f"`{arm}`", what, _seeds(results, arm)] for arm, what in study.arms.items()]
    return _table(["arm", "what it is", "seeds"], rows)


def _deciding(study: Study, differences: Sequence[Difference]) -> str:
    rows = [
        [f"`{found.other}`", study.against[found.other], _interval(found), _of_seeds(found)] for found in differences
    ]
    return _table([f"`{study.arm}` minus", "why", "difference in points", "of each seed"], rows)


def _scores(study: Study, results: Results) -> str:
    head = ["arm", *(f"{called}, {metric}" for called in study.tasks.values() for metric in study.metrics)]
    rows = []
    for arm in study.arms:
        if not results.seeds(arm):
            continue
        cells = [f"`{arm}`"]
        for task in study.tasks:
            for metric in study.metrics:
                of_seeds = list(results.by_seed(arm, task, metric).values())
                problems = list((results.by_problem(arm, task, metric) or {}).values())
                found = mean_over_seeds(of_seeds) if len(of_seeds) > 1 else mean_interval(problems)
                cells.append(f"{_points(found.value)} [{_points(found.low)}, {_points(found.high)}]")
        rows.append(cells)
    return _table(head, rows)


def _observations(study: Study, results: Results) -> str:
    """Entropy of the answers and length by task; what the trainings saw. Means over the seeds."""
    head = ["arm"]
    for called in study.tasks.values():
        head += [f"{called}: answer entropy (nats)", "tokens per answer", "cut off"]
    head += ["training rows", "tokens", "loss on right chains by epoch", "on wrong ones"]
    rows = []
    for arm in study.arms:
        runs = [run for run in results.runs if run["arm"] == arm]
        if not runs:
            continue
        cells = [f"`{arm}`"]
        for task in study.tasks:
            of_task = [row for row in results.problems if row["arm"] == arm and row["task"] == task]
            cut = sum(row["truncated"] for row in of_task) / sum(row["n"] for row in of_task)
            entropy, tokens = (_mean_of(results, arm, task, score) for score in ("answer_entropy", "mean_tokens"))
            cells += [f"{entropy:.2f}", f"{tokens:.1f}", f"{_points(cut)}%"]
        trained = [run["training"] for run in runs if run["training"]]
        cells += _trained(trained) if trained else ["", "", "", ""]
        rows.append(cells)
    return _table(head, rows)


def _mean_of(results: Results, arm: str, task: str, metric: str) -> float:
    of_seeds = list(results.by_seed(arm, task, metric).values())
    return sum(of_seeds) / len(of_seeds)


def _trained(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [f"{runs[0]['rows']:,}", f"{runs[0]['tokens']:,}"]
    for kind in ("right", "wrong"):
        of_runs = [run["loss_by_epoch"][kind] for run in runs if kind in run["loss_by_epoch"]]
        means = [sum(epoch) / len(epoch) for epoch in zip(*of_runs, strict=True)]
        cells.append(", ".join(f"{mean:.3f}" for mean in means) or "none")
    return cells


def _compute(name: str, about: Mapping[str, Any]) -> str:
    machine = about["machine"]
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
    changed = ", with uncommitted changes" if about["uncommitted_changes"] else ""
    return (
        f"{_minutes(about)} minutes in {len(about['seconds'])} stages, {machine['cores']} cores of "
        f"{machine['processor']}, {gpus}; {about['started'][:16]} to {about['finished'][:16]} UTC. "
        f"Commit {', '.join(commit[:12] for commit in about['commits'])}{changed}. {versions}.\n\n"
        f"Again: `make evidence-{name}`."
    )


def _minutes(about: Mapping[str, Any]) -> str:
    return f"{sum(about['seconds'].values()) / 60:.0f}"
