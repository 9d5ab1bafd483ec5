"""Keep the trajectories of the problems where tools help, from an evaluation of both modes.

    - tool_suitability: {samples: runs/eval/teacher/samples.jsonl}

`samples` holds rows of an evaluation with tools and without (`tools: [none, python]`), several of each per problem. Per
problem, with the accuracy of each mode over its graded samples, it

* helps     accuracy with tools - accuracy without >= `min_gain`, or
* rescues   accuracy without <= `hard` and accuracy with tools >= `min_gain`,

and the right rollouts with tools made at least `min_calls` successful calls on average: a model that opens no notebook
was not helped by one. TRICE (arXiv 2605.06326) names "tool-advantaged problems" as a lever and publishes no rule: this
one and its numbers are our choice. `keep: varied` instead keeps the problems that are neither always nor never solved
with tools, where a policy gradient has something to learn (problems of zero variance give none).

Of the problems that stay, a row whose calls failed more often than `max_failed` goes: it would teach calls that fail.

The control is `- random` at the same number of problems; the report counts the problems of every kind.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from ..core.errors import DataError
from ..core.row_sources import read_rows
from .columns import values_of
from .mixture import TEXT, TOOL, mode_of
from .result import FilterResult, ShowProgress, bar_of
from .selection import count_by, histogram

NOT_MEASURED = "problem was not sampled in both modes"


@dataclass
class ToolSuitabilityConfig:
    """Where the evaluation is, and when a problem counts."""

    samples: str | list[str] = field(
        metadata={"help": "samples.jsonl of an evaluation of both modes (or one file for each)."}
    )
    keep: Literal["helped", "varied"] = field(
        default="helped",
        metadata={"help": "helped: problems where tools help. varied: problems that are neither always nor never "
                          "solved with tools."},
    )  # fmt: skip
    min_gain: float = field(default=0.25, metadata={"help": "Least gain of accuracy, or least accuracy with tools."})
    hard: float = field(default=0.25, metadata={"help": "Most accuracy without tools, for a problem that is rescued."})
    min_calls: float = field(
        default=2.0, metadata={"help": "Least mean number of successful calls in right rollouts with tools."}
    )
    min_samples: int = field(
        default=8, metadata={"help": "Graded samples of each mode that a problem needs; with fewer it is dropped."}
    )

    max_failed: float = field(
        default=0.5,
        metadata={
            "help": "Largest share of failed calls of a row (`n_failed` / `n_calls`); a row without these two columns "
            "stays."
        },
    )

    def __post_init__(self):
        for key in ("min_gain", "hard", "max_failed"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"`{key}` is a share, from 0 to 1, got {getattr(self, key)}")
        if self.min_samples < 1:
            raise ValueError(f"`min_samples` must be at least 1, got {self.min_samples}")


@dataclass
class ProblemRecord:
    """What an evaluation found for one problem: graded samples and right ones by mode, calls of the right tool ones."""

    graded: dict[str, int]
    right: dict[str, int]
    calls_when_right: float = 0.0  # summed

    def accuracy(self, mode: str) -> float:
        """Share of right samples among the graded ones of a mode."""
        return self.right[mode] / self.graded[mode]

    @property
    def mean_calls(self) -> float:
        """Successful calls of a right rollout with tools, on average; 0 where none was right."""
        return self.calls_when_right / self.right[TOOL] if self.right[TOOL] else 0.0

    def kind(self, config: ToolSuitabilityConfig) -> str:
        """Name what tools do for the problem; it is kept if that is `config.keep`."""
        modes = (TOOL, TEXT) if config.keep == "helped" else (TOOL,)
        if any(self.graded[mode] < config.min_samples for mode in modes):
            return f"fewer than {config.min_samples} graded samples of a mode"
        tool = self.accuracy(TOOL)
        if config.keep == "varied":
            return "varied" if 0 < tool < 1 else "always solved with tools" if tool else "never solved with tools"
        text = self.accuracy(TEXT)
        if tool - text < config.min_gain and not (text <= config.hard and tool >= config.min_gain):
            return "never solved" if tool == text == 0 else "tools hurt" if tool < text else "tools do not help enough"
        return "helped" if self.mean_calls >= config.min_calls else "solved almost without calls"


def check(table: Dataset, config: ToolSuitabilityConfig, filled: Iterable[str] = ()) -> None:
    """Look at the first row of each file, before an earlier step computes.

    Raises:
        DataError: a file is missing or is no evaluation.
    """
    for file in _files(config):
        for where, row in islice(read_rows(file), 1):
            _refuse_others(where, row)


def _files(config: ToolSuitabilityConfig) -> list[str]:
    return [config.samples] if isinstance(config.samples, str) else config.samples


def _refuse_others(where: str, row: Mapping[str, Any]) -> None:
    missing = [name for name in ("problem_id", "completion", "correct") if name not in row]
    if missing:
        raise DataError(f"{where}: no `{missing[0]}`. Name the samples.jsonl of `afterglow eval`.")


def read_record(rows: Iterable[tuple[str, dict]]) -> dict[str, ProblemRecord]:
    """Count an evaluation's rows by problem. Rows that are not gradable count nowhere."""
    found: dict[str, ProblemRecord] = {}
    for where, row in rows:
        _refuse_others(where, row)
        record = found.setdefault(str(row["problem_id"]), ProblemRecord({TOOL: 0, TEXT: 0}, {TOOL: 0, TEXT: 0}))
        if row["correct"] is None:
            continue
        mode = mode_of(row["completion"], row.get("tools"))
        record.graded[mode] += 1
        record.right[mode] += row["correct"]
        if mode == TOOL and row["correct"]:
            record.calls_when_right += successful_calls(row)
    return found


def successful_calls(row: Mapping[str, Any]) -> int:
    """Calls of a row that ran without an error: as its evaluation counted them, or else all that were answered."""
    if row.get("n_calls") is not None:
        return row["n_calls"] - (row.get("n_failed") or 0)
    return sum(message["role"] == "tool" for message in row["completion"])


def failed_shares(table: Dataset) -> list[float]:
    """Return the share of failed calls of each row; 0 without calls, and where nobody counted them."""
    if not {"n_calls", "n_failed"} <= set(table.column_names):
        return [0.0] * len(table)
    return [
        (failed or 0) / calls if calls else 0.0
        for calls, failed in zip(values_of(table, "n_calls"), values_of(table, "n_failed"), strict=True)
    ]


def apply(
    table: Dataset, config: ToolSuitabilityConfig, *, seed: int, cache_folder: Path, progress: ShowProgress | None
) -> FilterResult:
    """Keep every row of the problems of the wanted kind; adds `accuracy_tool`, `accuracy_text`, `calls_when_right`.

    Raises:
        DataError: a file is missing or no evaluation, or it shares no problem with the data.
    """
    files = _files(config)
    record = read_record(row for file in files for row in read_rows(file))
    problems = values_of(table, "problem_id")
    if record.keys().isdisjoint(problems):
        raise DataError(
            f"`tool_suitability`: no problem of {', '.join(files)} is in the data (such as {next(iter(record), '-')!r} "
            f"there and {problems[0]!r} here). Sample the same problems, or map `problem_id` in `columns`."
        )
    kinds = {problem: found.kind(config) for problem, found in record.items()}
    dropped, failed = {}, failed_shares(table)
    with bar_of(progress, "tool_suitability", len(table)) as bar:
        for row, problem in enumerate(problems):
            kind = kinds.get(problem, NOT_MEASURED)
            if kind != config.keep:
                dropped[row] = kind
            elif failed[row] > config.max_failed:
                dropped[row] = f"more than {100 * config.max_failed:.3g}% of its calls failed"
            bar.advance()
    scores = {
        f"accuracy_{mode}": [_accuracy(record.get(problem), mode) for problem in problems] for mode in (TOOL, TEXT)
    }
    calls = [found.mean_calls if (found := record.get(problem)) else None for problem in problems]
    gains = [
        found.accuracy(TOOL) - found.accuracy(TEXT)
        for found in record.values()
        if found.graded[TOOL] and found.graded[TEXT]
    ]
    seen = Counter(kinds[problem] for problem in set(problems) & kinds.keys())
    report = {
        "problems": count_by(seen.elements()),
        "problems_not_measured": len(set(problems) - kinds.keys()),
        "gain_histogram": histogram(gains, ["all problems"] * len(gains), bins=16),
    }
    return FilterResult(scores | {"calls_when_right": calls}, dropped, report)


def _accuracy(found: ProblemRecord | None, mode: str) -> float | None:
    return found.accuracy(mode) if found and found.graded[mode] else None
