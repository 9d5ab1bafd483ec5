"""Control of every filter that drops a share: keep the same share at random.

    - random: {keep_ratio: 0.9}

A filter whose result does not beat this one on as many rows has shown nothing.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset

from .columns import values_of
from .result import FilterResult, ShowProgress
from .selection import kept_count, seeded_order


@dataclass
class RandomConfig:
    """How much to keep."""

    keep_ratio: float = field(default=0.9, metadata={"help": "Share of rows to keep, drawn by `seed`."})

    def __post_init__(self):
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"`keep_ratio` must be above 0 and at most 1, got {self.keep_ratio}")


def apply(
    table: Dataset, config: RandomConfig, *, seed: int, cache_folder: Path, progress: ShowProgress | None
) -> FilterResult:
    """Drop a random share. The draw depends on the seed and the ids, not on the order of the rows."""
    order = seeded_order(range(len(table)), values_of(table, "id"), seed, "random")
    dropped = dict.fromkeys(sorted(order[kept_count(len(table), config.keep_ratio) :]), "drawn at random")
    return FilterResult({}, dropped, {})
