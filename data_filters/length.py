"""Filter by length, and control of the filters that may be one in disguise.

- length: {min_words: 5, max_words: 8000}
- length: {keep_ratio: 0.9}                   # control: drop the longest 10 %
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset

from .columns import source_names, values_of
from .reasoning_steps import word_count
from .result import FilterResult, ShowProgress, bar_of
from .selection import histogram, lowest, mean

READ_ROWS = 512


@dataclass
class LengthConfig:
    """Bounds in words, by white space, of everything the assistant wrote, reasoning included."""

    min_words: int | None = field(default=None, metadata={"help": "Drop shorter rows."})
    max_words: int | None = field(default=None, metadata={"help": "Drop longer rows."})
    keep_ratio: float = field(default=1.0, metadata={"help": "Of the rest, keep this share: the shortest."})

    def __post_init__(self):
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"`keep_ratio` must be above 0 and at most 1, got {self.keep_ratio}")
        if self.min_words is not None and self.max_words is not None and self.min_words > self.max_words:
            raise ValueError(f"`min_words` is {self.min_words}, above `max_words` ({self.max_words})")


def apply(
    table: Dataset, config: LengthConfig, *, seed: int, cache_folder: Path, progress: ShowProgress | None
) -> FilterResult:
    """Count words (`n_words`), drop what is out of bounds, then the longest rows; ties by id."""
    words: list[int] = []
    completions = table.select_columns(["completion"])
    with bar_of(progress, "length", len(table)) as bar:
        for start in range(0, len(table), READ_ROWS):
            batch = completions[start : start + READ_ROWS]["completion"]
            words.extend(map(word_count, batch))
            bar.advance(len(batch))
    dropped = {}
    for row, count in enumerate(words):
        if config.min_words is not None and count < config.min_words:
            dropped[row] = f"fewer than {config.min_words} words"
        elif config.max_words is not None and count > config.max_words:
            dropped[row] = f"more than {config.max_words} words"
    rest = [None if row in dropped else count for row, count in enumerate(words)]
    short = lowest(rest, values_of(table, "id"), config.keep_ratio)
    for row, count in enumerate(rest):
        if count is not None and row not in short:
            dropped[row] = f"among the longest {100 * (1 - config.keep_ratio):.3g}%"
    return FilterResult(
        {"n_words": words}, dropped, {"mean_words": mean(words), "histogram": histogram(words, source_names(table))}
    )
