"""`afterglow filter RECIPE --explain ID`: what every step of a chain decided about one row, with the numbers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..core.errors import DataError, RunFolderError
from ..core.recipe import Section, plain
from ..core.run_folder import RunFolder
from .chain import identity_of, parse
from .flow import REASON


@dataclass(frozen=True)
class Decision:
    """What one step said of one row.

    Attributes:
        step: its name.
        reason: why the row was dropped; None where it was kept.
        scores: what the step wrote in the row's columns.
        ranks: column of numbers -> (rows of this step with a lower value, rows with a value).
        settings: keys of the step, defaults included.
        rows: how many rows the step saw.
    """

    step: str
    reason: str | None
    scores: dict[str, Any]
    ranks: dict[str, tuple[int, int]]
    settings: dict[str, Any]
    rows: int


def explain(section: Section, row_id: str) -> tuple[list[Decision], list[str]]:
    """Return the decisions about a row, in order, and the steps that never saw it.

    A chain that was killed explains the steps that it finished.

    Raises:
        RunFolderError: the folder holds no run of this recipe, or none that finished a step.
        DataError: no row of that id came into the chain.
    """
    config, data, steps = parse(section)
    folder = Path(config.output_dir)
    RunFolder.check(folder, **identity_of(config, data, steps))
    decisions: list[Decision] = []
    for index, (name, settings) in enumerate(steps):
        step_folder = folder / "steps" / f"{index}-{name}"
        if not (step_folder / "report.json").exists():
            break
        decision = _decision(step_folder / "rows.parquet", name, plain(settings), row_id)
        if decision is None:
            if not decisions:
                raise DataError(_unknown(folder, row_id))
            break
        decisions.append(decision)
        if decision.reason is not None:
            break
    if not decisions:
        raise RunFolderError(f"{folder}: no step has finished here. Run `afterglow filter` first, then ask again.")
    return decisions, [name for name, _ in steps[len(decisions) :]]


def _unknown(folder: Path, row_id: str) -> str:
    left_out = folder / "invalid.txt"
    invalid = f" Rows left out as invalid never had one: {left_out}." if left_out.exists() else ""
    return (
        f"{folder}: no row with the id {row_id!r} came in. Ids stand in the column `id` of {folder / 'kept.jsonl'} and "
        f"{folder / 'dropped.jsonl'}.{invalid}"
    )


def _decision(path: Path, step: str, settings: dict[str, Any], row_id: str) -> Decision | None:
    """Read one row of a stored step; one column at a time, so that a million rows need no memory for all of them."""
    with pq.ParquetFile(path) as file:
        row = file.read(["id"]).column("id").index(row_id).as_py()
        if row < 0:
            return None
        scores, ranks, reason = {}, {}, None
        for name in file.schema_arrow.names:
            if name == "id":
                continue
            column = file.read([name]).column(name)
            value = column[row].as_py()
            if name == REASON:
                reason = value
                continue
            scores[name] = json.loads(value) if isinstance(column.type, pa.JsonType) and value is not None else value
            if value is not None and (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
                numbers = column.drop_null().to_numpy()
                ranks[name] = (int((numbers < value).sum()), len(numbers))
        return Decision(step, reason, scores, ranks, settings, file.metadata.num_rows)


def show_explanation(section: Section, row_id: str) -> None:
    """Print the decisions about a row.

    Raises:
        RunFolderError: the folder holds no run of this recipe, or none that finished a step.
        DataError: no row of that id came into the chain.
    """
    from rich.console import Console
    from rich.markup import escape

    decisions, unseen = explain(section, row_id)
    console = Console(highlight=False)
    for number, found in enumerate(decisions, 1):
        kept = found.reason is None
        verdict = "[green]kept[/]" if kept else f"[red]dropped[/]: {escape(found.reason or '')}"
        console.print(f"[bold]{number} {found.step}[/] ({found.rows:,} rows)  {verdict}", soft_wrap=True)
        for name, value in found.scores.items():
            text = f"{value:.6g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
            place = "above {:,} of {:,} rows".format(*found.ranks[name]) if name in found.ranks else ""
            console.print(f"    {escape(name)} = {escape(text[:500])}  [dim]{place}[/]", soft_wrap=True)
        told = ", ".join(f"{key}: {value}" for key, value in found.settings.items() if value not in (None, {}, []))
        if told:
            console.print(f"    [dim]{escape(told)}[/]", soft_wrap=True)
    if decisions[-1].reason is not None:
        after = f" {', '.join(unseen)} never saw it." if unseen else ""
        console.print(f"{escape(row_id)} was dropped by {decisions[-1].step}.{after}", soft_wrap=True)
    elif unseen:
        console.print(f"{escape(row_id)} is kept so far; {', '.join(unseen)} did not run yet.", soft_wrap=True)
    else:
        console.print(f"{escape(row_id)} was kept by every step.", soft_wrap=True)
