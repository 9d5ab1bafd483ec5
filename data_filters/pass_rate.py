"""Keep the problems of a middling pass rate, from the rows of any evaluation, and order them for a curriculum.

    - pass_rate: {samples: runs/eval/student/samples.jsonl, min_rate: 0.2, max_rate: 0.8, curriculum: easy_first}
    - pass_rate                     # 0 < pass rate < 1, of the data's own rows: put `grade` before it

The pass rate of a problem is the share of right samples among its graded ones. A problem that is always or never solved
has no variance: every advantage of a group-relative policy gradient is zero on it, and it is dropped at any bounds.
`curriculum` adds the column `curriculum_rank`, and a chain that has it writes kept.jsonl in that order: train on it
without shuffling.

The rate is an estimate: of a problem solved with probability 0.05, eight samples show nothing right two times in three.
The report gives the standard error of the rates, and how many problems each bound cost. Control: `- random` at the same
number of problems, and `curriculum: random` for the order.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from ..core.errors import DataError
from ..core.row_sources import read_rows
from ..core.trajectory import content_hash
from .columns import all_null, values_of
from .result import FilterResult, ShowProgress, bar_of
from .selection import count_by, histogram

ORDER = "curriculum_rank"
NOT_SAMPLED = "problem was not sampled"


@dataclass
class PassRateConfig:
    """Where the evaluation is, and which problems stay."""

    samples: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "samples.jsonl of an evaluation; several files count as one. Default: the labels of the data's own "
            "rows."
        },
    )
    min_rate: float = field(default=0.0, metadata={"help": "Drop problems with a lower pass rate."})
    max_rate: float = field(default=1.0, metadata={"help": "Drop problems with a higher pass rate."})
    keep_zero_variance: bool = field(
        default=False, metadata={"help": "Keep problems that are always or never solved, if the bounds allow them."}
    )
    min_samples: int = field(
        default=4, metadata={"help": "Graded samples that a problem needs; with fewer it is dropped."}
    )
    curriculum: Literal["none", "easy_first", "hard_first", "random"] = field(
        default="none",
        metadata={"help": "Order in `curriculum_rank`, equal rates in an order drawn by `seed`. random: the control."},
    )

    def __post_init__(self):
        if not 0 <= self.min_rate <= self.max_rate <= 1:
            raise ValueError(
                f"`min_rate` and `max_rate` are shares of samples, 0 <= min_rate <= max_rate <= 1, got {self.min_rate} "
                f"and {self.max_rate}"
            )
        if self.min_samples < 1:
            raise ValueError(f"`min_samples` must be at least 1, got {self.min_samples}")

    def kind(self, graded: int, right: int) -> str:
        """Name why a problem goes, or `kept`."""
        if graded < self.min_samples:
            return f"fewer than {self.min_samples} graded samples"
        if right in (0, graded) and not self.keep_zero_variance:
            return "always solved" if right else "never solved"
        rate = right / graded
        if rate < self.min_rate:
            return f"pass rate below {self.min_rate:g}"
        return f"pass rate above {self.max_rate:g}" if rate > self.max_rate else "kept"


def check(table: Dataset, config: PassRateConfig, filled: Iterable[str] = ()) -> None:
    """Look at the first row of each file, or for labels in the data, before an earlier step computes.

    Raises:
        DataError: a file is missing or is no evaluation, or nothing is graded.
    """
    for file in _files(config):
        for where, row in islice(read_rows(file), 1):
            _refuse_others(where, row)
    if config.samples is None and "correct" not in filled and all_null(table, "correct"):
        raise DataError(
            "`pass_rate` without `samples` reads the column `correct`, which is null in every row. Put `- grade` "
            "before `- pass_rate` in `steps`, or name the samples.jsonl of an evaluation."
        )


def _files(config: PassRateConfig) -> list[str]:
    return [config.samples] if isinstance(config.samples, str) else config.samples or []


def _refuse_others(where: str, row: Mapping[str, Any]) -> None:
    missing = [name for name in ("problem_id", "correct") if name not in row]
    if missing:
        raise DataError(f"{where}: no `{missing[0]}`. Name the samples.jsonl of `afterglow eval`, or graded rows.")
    if row["correct"] not in (True, False, None):
        raise DataError(f"{where}: `correct` must be true, false or null, got {row['correct']!r}.")


def count_right(rows: Iterable[tuple[str, dict]]) -> dict[str, tuple[int, int]]:
    """Return problem -> (graded samples, right ones). Rows that are not gradable count nowhere.

    Raises:
        DataError: a row has no `problem_id` or no label.
    """
    graded: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for where, row in rows:
        _refuse_others(where, row)
        problem = str(row["problem_id"])
        graded[problem] += row["correct"] is not None
        right[problem] += row["correct"] is True
    return {problem: (count, right[problem]) for problem, count in graded.items()}


def apply(
    table: Dataset, config: PassRateConfig, *, seed: int, cache_folder: Path, progress: ShowProgress | None
) -> FilterResult:
    """Keep every row of the problems within the bounds; adds `pass_rate`, `n_graded` and `curriculum_rank`.

    Raises:
        DataError: a file is missing or no evaluation, or it shares no problem with the data; nothing is graded.
    """
    check(table, config)
    files = _files(config)
    found = count_right(chain.from_iterable(map(read_rows, files)) if files else _own_rows(table))
    problems = values_of(table, "problem_id")
    if found.keys().isdisjoint(problems):
        raise DataError(
            f"`pass_rate`: no problem of {', '.join(files)} is in the data (such as {next(iter(found), '-')!r} there "
            f"and {problems[0]!r} here). Sample the same problems, or map `problem_id` in `columns`."
        )
    kinds = {problem: config.kind(*counts) for problem, counts in found.items()}
    dropped = {}
    with bar_of(progress, "pass_rate", len(table)) as bar:
        for row, problem in enumerate(problems):
            if (kind := kinds.get(problem, NOT_SAMPLED)) != "kept":
                dropped[row] = kind
            bar.advance()
    rate = {problem: right / graded for problem, (graded, right) in found.items() if graded}
    scores: dict[str, list] = {
        "pass_rate": [rate.get(problem) for problem in problems],
        "n_graded": [found.get(problem, (0, 0))[0] for problem in problems],
    }
    if config.curriculum != "none":
        kept = {problem for problem in problems if kinds.get(problem) == "kept"}
        place = {problem: n for n, problem in enumerate(curriculum_order(kept, rate, config.curriculum, seed))}
        scores[ORDER] = [place.get(problem) for problem in problems]
    return FilterResult(scores, dropped, _report(set(problems), found, kinds, rate))


def _own_rows(table: Dataset) -> Iterator[tuple[str, dict]]:
    for problem, correct in zip(values_of(table, "problem_id"), values_of(table, "correct"), strict=True):
        yield "the data", {"problem_id": problem, "correct": correct}


def curriculum_order(problems: Iterable[str], rate: Mapping[str, float], order: str, seed: int) -> list[str]:
    """Return problems from the easiest (or hardest) on; equal rates in an order drawn by seed and problem."""
    sign = {"easy_first": -1, "hard_first": 1, "random": 0}[order]
    return sorted(problems, key=lambda problem: (sign * rate[problem], content_hash(seed, "curriculum", problem)))


def _report(
    problems: set[str], found: Mapping[str, tuple[int, int]], kinds: Mapping[str, str], rate: Mapping[str, float]
) -> dict:
    seen = sorted(problems & rate.keys())
    rates = [rate[problem] for problem in seen]
    errors = [math.sqrt(rate[problem] * (1 - rate[problem]) / found[problem][0]) for problem in seen]
    return {
        "problems": count_by(kinds[problem] for problem in problems & kinds.keys()),
        "problems_not_sampled": len(problems - kinds.keys()),
        "mean_pass_rate": math.fsum(rates) / len(rates) if rates else None,
        "mean_standard_error": math.fsum(errors) / len(errors) if errors else None,
        "histogram": histogram(rates, ["all problems"] * len(rates), bins=16),
    }
