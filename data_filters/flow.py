"""The rows of a chain on their way through its steps: one table that is never copied, with columns laid beside it.

Per row stay in memory the scores and one reason, both as Arrow arrays; messages stay in the memory-mapped file.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..core.errors import DataError
from ..core.recipe import plain
from ..core.run_folder import write_atomic
from ..core.trajectory import content_hash
from .columns import arrow_column
from .result import FilterResult
from .selection import count_by, source_name

DROPPED_BY, REASON = "dropped_by", "reason"
READ_ROWS = 10_000


def store(result: FilterResult, rows: Dataset, seconds: float, step_folder: Path) -> None:
    """Write what a filter decided; `report.json` comes last and says that all is there."""
    columns = {"id": arrow_column(rows, "id")} | result.scores
    columns[REASON] = pa.array(map(result.dropped.get, range(len(rows))), pa.string(), size=len(rows))
    decided = pa.table({key: _as_arrow(values) for key, values in columns.items()})
    partial = step_folder / ".rows.parquet.partial"
    pq.write_table(decided, partial)
    partial.replace(step_folder / "rows.parquet")
    report = {"seconds": round(seconds, 3), "report": plain(result.report)}
    write_atomic(step_folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def _as_arrow(values: Any) -> Any:
    return values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)


class Flow:
    """The whole input table: score columns are laid beside it, and `kept` says which rows are left."""

    def __init__(self, table: Dataset):
        # A file that is itself the dropped.jsonl of an earlier chain must not say that our kept rows were dropped.
        stale = [name for name in (DROPPED_BY, REASON) if name in table.column_names]
        self.table = table.remove_columns(stale) if stale else table
        self.kept = np.arange(len(table))
        self._gone: list[tuple[np.ndarray, pa.Array, str]] = []  # rows, reasons, step
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
        sources = arrow_column(self.rows(), "source")
        for column in decided.column_names:
            if column not in ("id", REASON):
                self._lay_beside(column, decided.column(column).combine_chunks())
        reasons = decided.column(REASON)
        out = np.asarray(reasons.is_valid())
        reasons = reasons.drop_null().combine_chunks()
        self._gone.append((self.kept[out], reasons, name))
        self.kept = self.kept[~out]
        before, after = (
            Counter(map(source_name, _values(column))) for column in (sources, sources.filter(pa.array(~out)))
        )
        return {
            "step": name,
            "rows_in": len(out),
            "kept": len(self.kept),
            "dropped": len(reasons),
            "reasons": count_by(map(general, _values(reasons))),
            "by_source": {s: {"rows_in": before[s], "kept": after[s]} for s in sorted(before)},
            "report": stored["report"],
        }

    def outcome(self) -> tuple[Dataset, Dataset]:
        """The kept rows, and the dropped ones with who dropped them and why."""
        gone = np.concatenate([rows for rows, _, _ in self._gone])
        reasons = pa.concat_arrays([reasons for _, reasons, _ in self._gone])
        steps = pa.concat_arrays([pa.repeat(step, len(rows)) for rows, _, step in self._gone])
        dropped = self.table
        for name, values in ((DROPPED_BY, steps), (REASON, reasons)):
            dropped = self._add(dropped, name, values.take(self._places(gone)))
        return self.rows(), self._select(dropped, np.sort(gone))

    def _places(self, rows: np.ndarray) -> pa.Array:
        """For each row of the table its place in `rows`, null where it is not there."""
        place = np.full(len(self.table), -1)
        place[rows] = np.arange(len(rows))
        return pa.array(place, mask=place < 0)

    def _lay_beside(self, name: str, values: pa.Array) -> None:
        """Make a step's column one of the whole table; rows that the step did not see keep what they had."""
        places = self._places(self.kept)
        column = values.take(places)
        order = self.table.column_names
        if name in order:
            old, json_type = self.table.data.column(name), column.type if _is_json(column) else None
            try:
                column, old = (values.cast(pa.string()) if _is_json(values) else values for values in (column, old))
                if pa.types.is_null(column.type):
                    column = column.cast(old.type)
                both = pa.concat_arrays([old.cast(column.type).combine_chunks(), column])
                rows = np.arange(len(places))  # `take`, since `if_else` cannot choose between lists of messages
                column = both.take(pa.array(np.where(np.asarray(places.is_valid()), len(places) + rows, rows)))
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


def _values(column: pa.Array | pa.ChunkedArray) -> Iterator[str]:
    for start in range(0, len(column), READ_ROWS):
        yield from column.slice(start, READ_ROWS).to_pylist()


def general(reason: str) -> str:
    """Return a reason without what is the row's own: a score, and the brackets at the end (which copy, which item)."""
    return re.sub(r" \(.*\)$", "", re.sub(r"\d+\.\d+", "#", reason), flags=re.DOTALL)


def _is_json(column: Any) -> bool:
    """Whether a column holds JSON, which Arrow stores as text and does not compute with."""
    return isinstance(column.type, pa.JsonType)
