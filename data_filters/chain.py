"""Several filters in a row: one recipe, one folder, nothing lost.

    data: trajectories.jsonl
    output_dir: runs/filter
    steps:
      - grade: {extract: marked}
      - rsr: {model: Qwen/Qwen3-4B-Base}
      - branching: {keep_ratio: 0.9}
      - negatives: {mode: balanced}

Every step sees the rows that the steps before it kept, with the columns that they added. The folder then holds

    kept.jsonl      the training set: trajectories in the order of the input (or of a curriculum, see pass_rate), with
                    one column per score
    dropped.jsonl   every other row of the input, with `dropped_by`, `reason` and the scores it got
    steps.json      rows in and out of each step, by reason and by source, and the step's own report
    steps/0-grade/  what one step decided, stored when it ends, so that a killed chain goes on after it
"""

import difflib
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from datasets import Dataset

from ..core.errors import DataError, RecipeError
from ..core.progress import progress
from ..core.recipe import Section, build, plain
from ..core.run_folder import RunFolder, write_atomic
from ..core.trajectory import DataConfig, load_trajectories, write_trajectories
from . import (
    branching,
    coreset,
    decontamination,
    deduplication,
    error_patterns,
    grade,
    judged_steps,
    length,
    message_format,
    mixture,
    negatives,
    pass_rate,
    random_drop,
    rsr,
    step_deletion,
    tool_suitability,
)
from .columns import source_names
from .flow import Flow, store
from .result import FilterResult


class Step(NamedTuple):
    """One filter: its configuration, its function, and what can be said before anything is computed."""

    config: type
    apply: Callable[..., FilterResult]
    check: Callable[[Dataset, Any, set[str]], None] | None = None  # (input, config, columns that earlier steps fill)
    fills: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()  # keys that name files or folders: changed content is another run


STEPS = {
    "grade": Step(grade.GradeConfig, grade.apply, grade.check, grade.FILLS),
    "rsr": Step(rsr.RSRConfig, rsr.apply, rsr.check, reads=("model", "more_students")),
    "branching": Step(branching.BranchingConfig, branching.apply),
    "delete_steps": Step(step_deletion.StepDeletionConfig, step_deletion.apply, fills=("completion",)),
    "judge_steps": Step(judged_steps.JudgedStepsConfig, judged_steps.apply),
    "negatives": Step(negatives.NegativesConfig, negatives.apply, negatives.check),
    "error_patterns": Step(error_patterns.ErrorPatternsConfig, error_patterns.apply),
    "pass_rate": Step(pass_rate.PassRateConfig, pass_rate.apply, pass_rate.check, reads=("samples",)),
    "coreset": Step(
        coreset.CoresetConfig, coreset.apply, coreset.check, reads=("losses", "checkpoint_folders", "validation")
    ),
    "random": Step(random_drop.RandomConfig, random_drop.apply),
    "length": Step(length.LengthConfig, length.apply),
    "format": Step(message_format.FormatConfig, message_format.apply),
    "deduplication": Step(deduplication.DeduplicationConfig, deduplication.apply),
    "decontamination": Step(
        decontamination.DecontaminationConfig, decontamination.apply, decontamination.check, reads=("sources",)
    ),
    "mixture": Step(mixture.MixtureConfig, mixture.apply, mixture.check),
    "tool_suitability": Step(
        tool_suitability.ToolSuitabilityConfig, tool_suitability.apply, tool_suitability.check, reads=("samples",)
    ),
}


@dataclass
class FilterConfig:
    """What to run and where to write."""

    output_dir: str = field(metadata={"help": "Folder of this run."})
    steps: list[Any] = field(metadata={"help": "Filters in order, each `- name: {key: value}`."})
    seed: int = field(default=0, metadata={"help": "Decides every random choice."})


# ---------------------------------------------------------------------------------------------------------------------
# the recipe


def parse(section: Section) -> tuple[FilterConfig, DataConfig, list[tuple[str, Any]]]:
    """Turn a recipe into configurations; the steps come as (name, configuration) in order.

    Raises:
        RecipeError: everything that is wrong with the recipe and all of its steps, in one message.
    """
    errors: list[str] = []
    config = data = None
    try:
        config, data = build(section, FilterConfig, DataConfig)
    except RecipeError as error:
        errors.append(str(error))
    steps: list[tuple[str, Any]] = []
    given = section.values.get("steps")
    for item in given if isinstance(given, list) else [] if given is None else [given]:
        try:
            steps.append(_parse_step(item, section.place("steps")))
        except RecipeError as error:
            errors.append(str(error))
    if "steps" in section.values and not steps and not errors:
        errors.append(f"{section.place('steps')}: `steps` is empty. Give at least one of {', '.join(STEPS)}.")
    if errors or config is None or data is None:
        raise RecipeError("\n".join(errors))
    return config, data, steps


def _parse_step(item: Any, where: str) -> tuple[str, Any]:
    if isinstance(item, str):
        item = Section({item: Section({}, {}, where)}, {item: where}, where)
    if not isinstance(item, Section):
        raise RecipeError(f"{where}: a step is `- name` or `- name: {{key: value}}`, got {item!r}.")
    name, keys = next(iter(item.values.items()))
    if name not in STEPS:
        near = difflib.get_close_matches(name, STEPS, n=1, cutoff=0.5)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise RecipeError(f"{item.place(name)}: unknown step `{name}`.{hint} Steps are {', '.join(STEPS)}.")
    return name, build(keys, STEPS[name].config)[0]


def resolved(config: FilterConfig, data: DataConfig, steps: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the recipe with all defaults filled in: the identity of the run."""
    return plain(config) | plain(data) | {"steps": [{name: plain(step)} for name, step in steps]}


# ---------------------------------------------------------------------------------------------------------------------
# the run


def identity_of(config: FilterConfig, data: DataConfig, steps: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return what a run folder is opened and checked with."""
    return {"stage": "filter", "config": resolved(config, data, steps), "inputs": _inputs(data, steps)}


def run(section: Section, overwrite: bool = False, dry_run: bool = False) -> Path:
    """Run a filter recipe, or go on where a killed run stopped, and return its folder.

    The recipe, the data, the gold answers and the labels that steps need are checked before the first step starts. A
    finished folder is only reported again.

    Args:
        section: what `core.recipe.read_recipe` returned.
        overwrite: delete what the folder holds and start again.
        dry_run: check everything, show the resolved recipe and the first row, and write nothing.

    Raises:
        RecipeError: a key, a value or a step's name is wrong.
        DataError: a row is wrong, a step lacks a column, or a step dropped every row.
        RunFolderError: the folder belongs to another recipe or to other data.
    """
    config, data, steps = parse(section)
    folder_path = Path(config.output_dir)
    opening = identity_of(config, data, steps)
    if not overwrite:
        RunFolder.check(folder_path, **opening)
        if not dry_run and (folder_path / "kept.jsonl").exists():
            with RunFolder.open(folder_path, **opening) as folder:
                if folder.finished:
                    show_summary(folder_path)
                    return folder_path
    invalid: list[str] = []
    table = load_trajectories(data, on_invalid=invalid.append)
    _check_steps(table, steps)
    if dry_run:
        _show_plan(opening["config"], table, invalid)
        return folder_path
    # Only now: a recipe or a file that is mended after an error meets no folder of its broken self.
    with RunFolder.open(folder_path, **opening, overwrite=overwrite, extra={"seed": config.seed}) as folder:
        _run_steps(folder, table, steps, config.seed, invalid)
    show_summary(folder_path)
    return folder_path


def _inputs(data: DataConfig, steps: list[tuple[str, Any]]) -> dict[str, str | list[str]]:
    inputs: dict[str, str | list[str]] = {"data": data.data}
    if data.problems:
        inputs["problems"] = data.problems
    for index, (name, config) in enumerate(steps):
        given = {key: getattr(config, key) for key in STEPS[name].reads}
        inputs |= {f"steps.{index}-{name}.{key}": source for key, source in given.items() if source}
    return inputs


def _check_steps(table: Dataset, steps: list[tuple[str, Any]]) -> None:
    """Ask every step what it needs, before any step computes."""
    filled: set[str] = set()
    for name, config in steps:
        if check := STEPS[name].check:
            check(table, config, filled)
        filled.update(STEPS[name].fills)


def _run_steps(folder: RunFolder, table: Dataset, steps: list[tuple[str, Any]], seed: int, invalid: list[str]) -> None:
    flow = Flow(table)
    entries: list[dict] = []
    for index, (name, config) in enumerate(steps):
        step_folder = folder.path / "steps" / f"{index}-{name}"
        if not (step_folder / "report.json").exists():
            _compute_step(name, config, flow.rows(), seed, step_folder)
        entries.append(flow.absorb(name, step_folder))
        if not len(flow.kept):
            break
    kept, dropped = flow.outcome()
    write_trajectories(dropped, folder.path / "dropped.jsonl")
    summary = {"rows_in": len(table), "rows_invalid": len(invalid), "kept": len(kept), "dropped": len(dropped)}
    if invalid:
        write_atomic(folder.path / "invalid.txt", "\n".join(invalid) + "\n")
    steps_json = json.dumps(summary | {"steps": entries}, indent=1, ensure_ascii=False)
    write_atomic(folder.path / "steps.json", steps_json + "\n")
    if not len(kept):
        last = entries[-1]
        reasons = "; ".join(f"{reason} ({count})" for reason, count in last["reasons"].items())
        raise DataError(
            f"step {len(entries)} (`{last['step']}`) dropped the last {last['rows_in']} row(s): {reasons}. Loosen it; "
            f"the rows stand in {folder.path / 'dropped.jsonl'}."
        )
    if pass_rate.ORDER in kept.column_names:
        kept = kept.sort(pass_rate.ORDER)
    write_trajectories(kept, folder.path / "kept.jsonl")
    folder.finish(summary)


def _compute_step(name: str, config: Any, rows: Dataset, seed: int, step_folder: Path) -> None:
    """Run one filter and store what it decided; `report.json` is written last and says that all is there."""
    step_folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    result = STEPS[name].apply(rows, config, seed=seed, cache_folder=step_folder, progress=progress)
    store(result, rows, time.monotonic() - start, step_folder)


# ---------------------------------------------------------------------------------------------------------------------
# what a person sees


def show_summary(folder: Path) -> None:
    """Print the table of a chain that ran: rows in and out of each step, and why rows went."""
    from rich.console import Console
    from rich.table import Table

    summary = json.loads((folder / "steps.json").read_text(encoding="utf-8"))
    table = Table(title=f"filter: {folder}", title_justify="left")
    for name in ("step", "in", "kept", "dropped", "seconds"):
        table.add_column(name, justify="left" if name == "step" else "right")
    table.add_column("reasons", overflow="fold")
    for index, entry in enumerate(summary["steps"]):
        stored = json.loads((folder / "steps" / f"{index}-{entry['step']}" / "report.json").read_text("utf-8"))
        reasons = [f"{count:,} {reason}" for reason, count in entry["reasons"].items()]
        more = [f"and {len(reasons) - 4} more reasons"] if len(reasons) > 4 else []
        counts = [f"{entry[key]:,}" for key in ("rows_in", "kept", "dropped")]
        table.add_row(entry["step"], *counts, f"{stored['seconds']:.1f}", "\n".join(reasons[:4] + more))
    console = Console()
    console.print(table)
    if summary["rows_invalid"]:
        console.print(f"{summary['rows_invalid']:,} invalid rows were left out: {folder / 'invalid.txt'}")
    console.print(f"{summary['kept']:,} of {summary['rows_in']:,} rows kept: {folder / 'kept.jsonl'}", soft_wrap=True)


def _show_plan(identity: dict[str, Any], table: Dataset, invalid: list[str]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.panel import Panel

    console = Console()
    console.print(Panel(escape(yaml.safe_dump(identity, sort_keys=False, allow_unicode=True).rstrip()), title="recipe"))
    sources = Counter(source_names(table))
    console.print(f"{len(table):,} rows: " + ", ".join(f"{n:,} {escape(s)}" for s, n in sources.most_common()))
    for fault in invalid:
        console.print(f"left out: {escape(fault)}", soft_wrap=True)
    first = table[0]
    for name in ("prompt", "completion"):
        text = "\n".join(f"[{m['role']}]\n{m.get('content') or json.dumps(m)}" for m in first[name])
        console.print(Panel(escape(text), title=f"first row, {name} ({first['id']})"))
    console.print("Nothing was written.")
