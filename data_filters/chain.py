"""Several filters in a row: one recipe, one folder, nothing lost.

    data: trajectories.jsonl
    output_dir: runs/filter
    steps:
      - grade: {extract: marked}
      - rsr: {model: Qwen/Qwen3-4B-Base}
      - branching: {keep_ratio: 0.9}
      - negatives: {mode: balanced}

Every step sees the rows that the steps before it kept, with the columns that they added. The folder then holds

    kept.jsonl      the training set: trajectories in the order of the input, with one column per score
    dropped.jsonl   every other row of the input, with `dropped_by`, `reason` and the scores it got
    steps.json      rows in and out of each step, by reason and by source, and the step's own report
    steps/0-grade/  what one step decided, stored when it ends, so that a killed chain goes on after it
"""

import difflib
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from datasets import Dataset

from ..core.errors import DataError, RecipeError
from ..core.progress import progress
from ..core.recipe import Section, build, plain
from ..core.run_folder import RunFolder, write_atomic
from ..core.trajectory import DataConfig, content_hash, load_trajectories, write_trajectories
from . import branching, grade, length, mixture, negatives, random_drop, rsr, tool_suitability
from .result import FilterResult
from .selection import count_by, source_name

DROPPED_BY, REASON = "dropped_by", "reason"


class Step(NamedTuple):
    """One filter: its configuration, its function, and what can be said before anything is computed."""

    config: type
    apply: Callable[..., FilterResult]
    check: Callable[[Dataset, Any, set[str]], None] | None = None  # (input, config, columns that earlier steps fill)
    fills: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()  # keys that name files or folders: changed content is another run


STEPS = {
    "grade": Step(grade.GradeConfig, grade.apply, grade.check, grade.FILLS),
    "rsr": Step(rsr.RSRConfig, rsr.apply, reads=("model",)),
    "branching": Step(branching.BranchingConfig, branching.apply),
    "negatives": Step(negatives.NegativesConfig, negatives.apply, negatives.check),
    "random": Step(random_drop.RandomConfig, random_drop.apply),
    "length": Step(length.LengthConfig, length.apply),
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
    identity = resolved(config, data, steps)
    opening = {"stage": "filter", "config": identity, "inputs": _inputs(data, steps)}
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
        _show_plan(identity, table, invalid)
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
        inputs |= {f"steps.{index}-{name}.{key}": getattr(config, key) for key in STEPS[name].reads}
    return inputs


def _check_steps(table: Dataset, steps: list[tuple[str, Any]]) -> None:
    """Ask every step what it needs, before any step computes."""
    filled: set[str] = set()
    for name, config in steps:
        if check := STEPS[name].check:
            check(table, config, filled)
        filled.update(STEPS[name].fills)


def _run_steps(folder: RunFolder, table: Dataset, steps: list[tuple[str, Any]], seed: int, invalid: list[str]) -> None:
    flow = _Flow(table)
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
    write_trajectories(kept, folder.path / "kept.jsonl")
    folder.finish(summary)


def _compute_step(name: str, config: Any, rows: Dataset, seed: int, step_folder: Path) -> None:
    """Run one filter and store what it decided; `report.json` is written last and says that all is there."""
    step_folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    result = STEPS[name].apply(rows, config, seed=seed, cache_folder=step_folder, progress=progress)
    columns = {"id": list(rows["id"])} | result.scores
    columns[REASON] = [result.dropped.get(row) for row in range(len(rows))]
    types = {REASON: pa.string()}
    decided = pa.table({key: pa.array(values, types.get(key)) for key, values in columns.items()})
    partial = step_folder / ".rows.parquet.partial"
    pq.write_table(decided, partial)
    partial.replace(step_folder / "rows.parquet")
    report = {"seconds": round(time.monotonic() - start, 3), "report": plain(result.report)}
    write_atomic(step_folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")


class _Flow:
    """The whole input table, never copied: score columns are laid beside it, and `kept` says which rows are left."""

    def __init__(self, table: Dataset):
        # A file that is itself the dropped.jsonl of an earlier chain must not say that our kept rows were dropped.
        stale = [name for name in (DROPPED_BY, REASON) if name in table.column_names]
        self.table = table.remove_columns(stale) if stale else table
        self.kept = np.arange(len(table))
        self._dropped_by = np.full(len(table), None, dtype=object)
        self._reason = np.full(len(table), None, dtype=object)
        self._changes = 0

    def rows(self) -> Dataset:
        """The rows that are left, with the scores so far."""
        return self._select(self.table, self.kept)

    def absorb(self, name: str, step_folder: Path) -> dict:
        """Take over what a step stored, and return its entry of steps.json.

        A resumed chain and an undisturbed one both come through here, with the same bytes.
        """
        decided = pq.read_table(step_folder / "rows.parquet")
        stored = json.loads((step_folder / "report.json").read_text(encoding="utf-8"))
        sources = [source_name(source) for source in self.rows()["source"]]
        for column in decided.column_names:
            if column not in ("id", REASON):
                self._lay_beside(column, decided.column(column).combine_chunks())
        reasons = decided.column(REASON).to_pylist()
        out = np.array([reason is not None for reason in reasons], dtype=bool)
        gone = self.kept[out]
        self._dropped_by[gone] = name
        self._reason[gone] = [reason for reason in reasons if reason is not None]
        self.kept = self.kept[~out]
        before, after = Counter(sources), Counter(s for s, dropped in zip(sources, out, strict=True) if not dropped)
        return {
            "step": name,
            "rows_in": len(reasons),
            "kept": len(self.kept),
            "dropped": len(gone),
            # a reason may state the row's own score: count such reasons as one
            "reasons": count_by(re.sub(r"\d+\.\d+", "#", reason) for reason in reasons if reason is not None),
            "by_source": {s: {"rows_in": before[s], "kept": after[s]} for s in sorted(before)},
            "report": stored["report"],
        }

    def outcome(self) -> tuple[Dataset, Dataset]:
        """The kept rows, and the dropped ones with who dropped them and why."""
        gone = np.flatnonzero(self._dropped_by != np.array(None))
        dropped = self._add(self._add(self.table, DROPPED_BY, self._dropped_by), REASON, self._reason)
        return self.rows(), self._select(dropped, gone)

    def _lay_beside(self, name: str, values: pa.Array) -> None:
        """Make a step's column one of the whole table; rows that the step did not see keep what they had."""
        place = np.full(len(self.table), -1)
        place[self.kept] = np.arange(len(self.kept))
        column = values.take(pa.array(place, mask=place < 0))
        order = self.table.column_names
        if name in order:
            old, json_type = self.table.data.column(name), column.type if _is_json(column) else None
            try:
                column, old = (values.cast(pa.string()) if _is_json(values) else values for values in (column, old))
                if pa.types.is_null(column.type):
                    column = column.cast(old.type)
                old = old.cast(column.type).combine_chunks()
                column = pc.if_else(pa.array(place >= 0), column, old)  # pyright: ignore[reportAttributeAccessIssue]
                column = json_type.wrap_array(column) if json_type else column
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise DataError(
                    f"the data has a column `{name}` of type {old.type}, and a step writes {values.type} there. Give "
                    f"the data's column another name with `columns: {{{name}_in_file: {name}}}`."
                ) from None
            self.table = self.table.remove_columns(name, new_fingerprint=self._fingerprint())
        self.table = self._add(self.table, name, column)
        if name in order:
            self.table = self.table.select_columns(order, new_fingerprint=self._fingerprint())

    # datasets would hash a whole column to name the changed table; a name of our own costs nothing.

    def _fingerprint(self) -> str:
        self._changes += 1
        return content_hash(id(self), time.time_ns(), self._changes)

    def _add(self, table: Dataset, name: str, values: Any) -> Dataset:
        return table.add_column(name, values, new_fingerprint=self._fingerprint())

    def _select(self, table: Dataset, rows: np.ndarray) -> Dataset:
        if len(rows) == len(table):
            return table
        return table.select(rows, new_fingerprint=self._fingerprint())


def _is_json(column: Any) -> bool:
    """Whether a column holds JSON, which Arrow stores as text and does not compute with."""
    return isinstance(column.type, pa.JsonType)


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
    sources = Counter(map(source_name, table["source"]))
    console.print(f"{len(table):,} rows: " + ", ".join(f"{n:,} {escape(s)}" for s, n in sources.most_common()))
    for fault in invalid:
        console.print(f"left out: {escape(fault)}", soft_wrap=True)
    first = table[0]
    for name in ("prompt", "completion"):
        text = "\n".join(f"[{m['role']}]\n{m.get('content') or json.dumps(m)}" for m in first[name])
        console.print(Panel(escape(text), title=f"first row, {name} ({first['id']})"))
    console.print("Nothing was written.")
