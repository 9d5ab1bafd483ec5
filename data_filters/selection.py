"""Which rows to keep, and the numbers that describe a column: pure functions that filters and their controls share.

No choice here depends on the order of the rows: ties are broken by id, and random draws rank a hash of (seed, id).
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..core.trajectory import content_hash


def kept_count(total: int, keep_ratio: float) -> int:
    """Return how many of `total` rows a ratio keeps: rounded half up, and at least one.

    Filters and their controls both ask here, so that the same ratio removes the same number of rows.
    """
    return min(total, max(1, math.floor(keep_ratio * total + 0.5)))


def lowest(values: Sequence[float | None], ids: Sequence[str], keep_ratio: float) -> set[int]:
    """Return the rows that hold the lowest share of the values, ties by id. Rows with None do not take part."""
    rows = np.array([row for row, value in enumerate(values) if value is not None], dtype=np.int64)
    if not len(rows):
        return set()
    scores = np.array([value for value in values if value is not None], dtype=np.float64)
    count = kept_count(len(rows), keep_ratio)
    cut = np.partition(scores, count - 1)[count - 1]
    below = rows[scores < cut].tolist()
    equal: list[int] = rows[scores == cut].tolist()
    ties = sorted(equal, key=lambda row: ids[row])
    return {*below, *ties[: count - len(below)]}


def seeded_order(rows: Iterable[int], ids: Sequence[str], seed: int, purpose: str) -> list[int]:
    """Return rows in a random order that depends on the seed, the purpose and the ids alone."""
    return sorted(rows, key=lambda row: (content_hash(seed, purpose, ids[row]), ids[row]))


def source_name(source: str | None) -> str:
    """Return how a report calls the rows of a source."""
    return source if source is not None else "(no source)"


def count_by(values: Iterable[Any]) -> dict[str, int]:
    """Return value -> count, the most frequent first, ties by name."""
    return dict(sorted(Counter(map(str, values)).items(), key=lambda item: (-item[1], item[0])))


def histogram(values: Sequence[float | None], groups: Sequence[str], bins: int = 20) -> dict[str, Any]:
    """Return the counts of a score in equal bins, per group, over edges that all groups share.

    Returns:
        `{"edges": [bins + 1 floats], "counts": {group: [bins ints]}}`; no edges where nothing has a value.
    """
    there = [value for value in values if value is not None]
    if not there:
        return {"edges": [], "counts": {}}
    low, high = min(there), max(there)
    width = (high - low) / bins or 1.0 / bins
    counts: dict[str, list[int]] = {}
    for group, value in zip(groups, values, strict=True):
        if value is not None:
            counts.setdefault(group, [0] * bins)[min(bins - 1, int((value - low) / width))] += 1
    return {"edges": [low + width * edge for edge in range(bins + 1)], "counts": dict(sorted(counts.items()))}


def jaccard(one: set[int], other: set[int]) -> float | None:
    """Return the share of both sets' rows that is in both, or None if both are empty."""
    return len(one & other) / len(one | other) if one or other else None


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are there, or None."""
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else None
