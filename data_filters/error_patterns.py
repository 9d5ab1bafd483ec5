"""Tag trajectories with the patterns they show, by a taxonomy that the recipe can replace.

    - error_patterns
    - error_patterns: {patterns: {unit_slip: ["forgot to convert", "wrong unit"]}, drop: [unit_slip]}

GLOW (2601.04992) counts 22 recurring patterns of wrong chains; their names are not published. `OUR_TAXONOMY` is this
project's own: words that can be found without a model, no reconstruction of the paper's. A pattern is a list of regular
expressions; a row has its tag if one of them is found in what the assistant wrote. The report compares each tag's share
among wrong rows with its share among right ones, since what both show alike is a habit and no error.

The control of `drop` is `- random` at the same number of rows. Expressions of your own run as they are: one that
backtracks without bound will hang on a long row.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

from ..core.trajectory import completion_text
from .columns import source_names, values_of
from .reasoning_steps import reasoning_text, split_steps
from .result import FilterResult, ShowProgress, bar_of
from .selection import mean

OUR_TAXONOMY = {
    "gives_up": [
        "i give up", r"\b(?:i'm|i am) (?:stuck|lost)\b", r"cannot be (?:determined|solved)",
        r"(?:there is|there's) no (?:solution|answer)", "not enough information",
    ],
    "guesses": [
        r"(?:best|educated|my) guess", r"(?:i'll|i will|let me|let's|just) guess", r"i(?:'ll| will) (?:just )?assume",
        r"must be the (?:expected|intended) answer",
    ],
    "doubts_the_problem": [
        r"(?:the problem|the question) (?:might|may|must|could) (?:mean|have a typo|be wrong)", r"\btypo\b",
        r"the problem (?:is|seems|must be) (?:flawed|wrong|inconsistent)",
        r"i (?:misread|misunderstood|misinterpreted)",
    ],
    "contradicts_itself": [
        r"\bcontradict\w*", r"(?:that|this) (?:is|seems) impossible", r"(?:that|this) can(?:not|'t) be right",
    ],
    "goes_in_circles": [
        r"going (?:around )?in circles", r"back to (?:the )?(?:same|square one)",
        r"same (?:result|state|problem) (?:as before|again)",
    ],
    "corrects_a_slip": [
        r"i made (?:a|an) (?:mistake|error)", r"(?:arithmetic|calculation|sign) error", r"\boops\b",
        r"let me (?:redo|recompute|recalculate)",
    ],
}  # fmt: skip
REPEATS = "repeats_steps"
LABELS: tuple[tuple[str, bool | None], ...] = (("wrong", False), ("right", True), ("not_gradable", None))
READ_ROWS = 512


@dataclass
class ErrorPatternsConfig:
    """The taxonomy, and which tags cost a row its place."""

    patterns: dict[str, list[str]] = field(
        default_factory=lambda: dict(OUR_TAXONOMY),
        metadata={"help": "Tag -> regular expressions in lower case, for text of any case; replaces our taxonomy."},
    )
    repeats_from: float = field(
        default=0.2,
        metadata={
            "help": f"A row has the tag `{REPEATS}` from this share of steps on that stood there before, word for word."
        },
    )
    drop: list[str] = field(default_factory=list, metadata={"help": "Tags whose rows are dropped; default: none."})

    def __post_init__(self):
        if REPEATS in self.patterns:
            raise ValueError(f"`patterns`: the tag `{REPEATS}` is measured from the steps; give yours another name")
        for tag, words in self.patterns.items():
            if not words:
                raise ValueError(f"`patterns`: `{tag}` has no expressions")
            for word in words:
                try:
                    re.compile(word)
                except re.error as error:
                    raise ValueError(f"`patterns`: `{tag}`: {word!r} is not a regular expression ({error})") from None
        if not 0 < self.repeats_from <= 1:
            raise ValueError(f"`repeats_from` must be above 0 and at most 1, got {self.repeats_from}")
        if unknown := sorted(set(self.drop) - {*self.patterns, REPEATS}):
            raise ValueError(f"`drop` names {', '.join(unknown)}; the tags are {', '.join([*self.patterns, REPEATS])}")


def repeated_share(steps: Sequence[str]) -> float | None:
    """Return the share of steps that stood there before, white space and case apart; None without steps."""
    seen = {" ".join(step.lower().split()) for step in steps}
    return 1 - len(seen) / len(steps) if steps else None


def tags_of(text: str, answer: str, config: ErrorPatternsConfig) -> tuple[list[str], float | None]:
    """Return the tags of a row, and the share of its steps that repeat an earlier one.

    Args:
        text: its reasoning.
        answer: what it wrote besides, in which patterns are looked for as well.
        config: the taxonomy.
    """
    lowered = f"{text}\n{answer}".lower().replace("’", "'")
    tags = [tag for tag, words in config.patterns.items() if any(re.search(word, lowered) for word in words)]
    share = repeated_share(split_steps(text))
    return tags + [REPEATS] * (share is not None and share >= config.repeats_from), share


def apply(
    table: Dataset, config: ErrorPatternsConfig, *, seed: int, cache_folder: Path, progress: ShowProgress | None
) -> FilterResult:
    """Add `patterns` (a list of tags) and `repeated_steps`; drop rows with a tag of `drop`."""
    tags: list[list[str]] = []
    repeated: list[float | None] = []
    completions = table.select_columns(["completion"])
    with bar_of(progress, "error_patterns", len(table)) as bar:
        for start in range(0, len(table), READ_ROWS):
            batch = completions[start : start + READ_ROWS]["completion"]
            for completion in batch:
                found, share = tags_of(reasoning_text(completion), completion_text(completion), config)
                tags.append(found)
                repeated.append(share)
            bar.advance(len(batch))
    dropped = {row: f"shows the pattern {tag}" for row, found in enumerate(tags) if (tag := _first(found, config.drop))}
    labels, sources = values_of(table, "correct"), source_names(table)
    scores = {"patterns": pa.array(tags, pa.list_(pa.string())), "repeated_steps": repeated}
    return FilterResult(scores, dropped, _report(tags, labels, sources, config))


def _first(found: list[str], wanted: list[str]) -> str | None:
    return next((tag for tag in found if tag in wanted), None)


def _report(tags: list[list[str]], labels: list[bool | None], sources: list[str], config: ErrorPatternsConfig) -> dict:
    def share(tag: str, rows: list[int]) -> float | None:
        return mean(float(tag in tags[row]) for row in rows)

    groups = {name: [row for row, own in enumerate(labels) if own is label] for name, label in LABELS}
    by_source = {name: [row for row, own in enumerate(sources) if own == name] for name in sorted(set(sources))}
    return {
        "taxonomy": "ours" if config.patterns == OUR_TAXONOMY else "the recipe's",
        "rows": {name: len(rows) for name, rows in groups.items()},
        "tagged": sum(bool(found) for found in tags),
        "patterns": {
            tag: {
                "rows": sum(tag in found for found in tags),
                **{f"share_of_{name}": share(tag, rows) for name, rows in groups.items()},
                "share_by_source": {name: share(tag, rows) for name, rows in by_source.items()},
            }
            for tag in [*config.patterns, REPEATS]
        },
    }
