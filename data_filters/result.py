"""What every data filter returns."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ..core.progress import Bar

ShowProgress = Callable[[str, int | None], AbstractContextManager[Bar]]


@dataclass
class FilterResult:
    """The decision of one filter about every row of its input table.

    Attributes:
        scores: New columns, one value per row of the input table; `json_column` for lists and mappings.
        dropped: Row index -> reason; every other row is kept.
        report: JSON-able numbers for the report (histograms, counts, teacher tables).
    """

    scores: dict[str, list | pa.Array]
    dropped: dict[int, str]
    report: dict


def json_column(values: Sequence[Any]) -> pa.Array:
    """Return a column of JSON-able values that differ in shape (tool schemas, chat template variables)."""
    encoded = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    return pa.array(encoded, pa.json_(pa.string()))


class _NoBar:
    def advance(self, steps: int = 1, note: str = "") -> None:
        """Show nothing."""


@contextmanager
def bar_of(progress: ShowProgress | None, description: str, total: int) -> Iterator[Bar]:
    """Open a bar of the `progress` that a filter was given, or one that shows nothing where it was given None."""
    if progress is None:
        yield _NoBar()
    else:
        with progress(description, total) as bar:
            yield bar
