"""Branch filtering (2604.01702): drop the trajectories whose reasoning starts new ideas most often.

    - branching: {keep_ratio: 0.9}
    - branching: {proxy: step_excess, reference: gpt-oss-120b}

The default score is the paper's second proxy, the share of steps that hold a branching keyword; its best reported rule
keeps the lowest 90 %. The paper's list of keywords and its way of cutting steps are not published: it names "Perhaps",
"Another" and "Alternatively", the rest of `BRANCH_KEYWORDS` and the segmentation are choices of this project. Words of
backtracking and of checking are counted apart and never enter the score. The paper's first proxy, `step_excess`, asks
how many more steps a chain takes than a reference teacher's chains of the same problem; the formula is our reading.

A row that scores 0 or less is never dropped by `keep_ratio`: where most chains are plain, a quantile among ties at zero
would be a random drop under another name. A response of one step, such as a bare final answer of a teacher that hides
its reasoning, has ratio 0 and would win `per_problem`: the report counts these rows, `length` can drop them before.

Controls: `- random: {keep_ratio: 0.9}` and `- length: {keep_ratio: 0.9}`, with the share that this step really kept
(it stands in `steps.json`). The report says how far the removal agrees with the one by length.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal

from datasets import Dataset

from ..core.errors import DataError
from .columns import values_of
from .reasoning_steps import Segmentation, reasoning_text, split_steps, word_count
from .result import FilterResult, ShowProgress, bar_of
from .selection import histogram, jaccard, lowest, mean, source_name

BRANCH_KEYWORDS = (
    "perhaps", "maybe", "alternatively", "another (?:approach|way|method|idea|possibility|option)", "what if",
    "on second thought", "let me reconsider",
    # "Okay, let me try to figure out ..." opens nearly every chain of R1 and starts no second idea.
    "(?:let me|let's) try(?! to (?:figure|understand|make sense|recall|outline|parse|see|solve))",
    "instead of \\w+ing", "(?:a |some )?different (?:approach|angle|strategy|sequence)",
    "alternative(?::| (?:approach|way|method|idea|plan|path|option|solution|step))",
)  # fmt: skip
BACKTRACK_KEYWORDS = (
    "wait", "hmm+", "hold on", "oops", "actually,", "no,", "scratch that", "let me go back",
    "(?:this|that)(?:'s| is) (?:not right|wrong|incorrect)", "i made a mistake",
)  # fmt: skip
VERIFY_KEYWORDS = (
    "check(?:s|ing)?", "double[- ]check(?:ing)?", "verif(?:y|ies|ying|ication)", "confirm(?:s|ing)?", "make sure",
)  # fmt: skip
SCORE_OF = {"keywords": "branch_ratio", "step_excess": "step_excess"}
RATES = ("branch_ratio", "branch_per_1k_words")
READ_ROWS = 512


@dataclass
class BranchingConfig:
    """How steps are cut, which words make a branch, and which rows stay."""

    proxy: Literal["keywords", "step_excess"] = field(
        default="keywords",
        metadata={
            "help": "What ranks the rows. keywords: `branch_ratio`. step_excess: (steps - steps of the `reference`'s "
            "chain of the same problem, their mean if several) / that."
        },
    )
    reference: str | None = field(default=None, metadata={"help": "The `source` that `step_excess` compares with."})
    select: Literal["quantile", "per_problem", "threshold"] = field(
        default="quantile",
        metadata={
            "help": "quantile: the `keep_ratio` lowest rows of all, and all rows at 0 or below. "
            "per_problem: the lowest row of each problem. threshold: rows up to `threshold`."
        },
    )
    keep_ratio: float = field(default=0.9, metadata={"help": "Share of rows that `quantile` keeps; 1 only scores."})
    threshold: float | None = field(default=None, metadata={"help": "Highest score that `threshold` keeps."})
    without_score: Literal["keep", "drop"] = field(
        default="keep", metadata={"help": "What becomes of rows whose reasoning is empty."}
    )
    segmentation: Segmentation = field(
        default="paragraph", metadata={"help": "How reasoning is cut into steps: paragraph, sentence or lcot2tree."}
    )
    min_step_chars: int = field(default=30, metadata={"help": "A shorter piece joins the step before it."})
    position: Literal["anywhere", "start"] = field(
        default="anywhere", metadata={"help": "Where in a step a keyword counts."}
    )
    branch_keywords: list[str] = field(
        default_factory=lambda: list(BRANCH_KEYWORDS),
        metadata={"help": "Regular expressions in lower case, for whole words of any case; replaces the English list."},
    )
    backtrack_keywords: list[str] = field(
        default_factory=lambda: list(BACKTRACK_KEYWORDS), metadata={"help": "Counted apart, in `n_backtrack`."}
    )
    verify_keywords: list[str] = field(
        default_factory=lambda: list(VERIFY_KEYWORDS), metadata={"help": "Counted apart, in `n_verify`."}
    )

    def __post_init__(self):
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"`keep_ratio` must be above 0 and at most 1, got {self.keep_ratio}")
        if (self.threshold is not None) != (self.select == "threshold"):
            raise ValueError("`threshold` and `select: threshold` go together: give both or neither")
        if (self.reference is not None) != (self.proxy == "step_excess"):
            raise ValueError("`reference` and `proxy: step_excess` go together: give both or neither")
        if not self.branch_keywords:
            raise ValueError("`branch_keywords` is empty; without words nothing is a branch")
        for name in ("branch_keywords", "backtrack_keywords", "verify_keywords"):
            for word in getattr(self, name):
                try:
                    re.compile(word)
                except re.error as error:
                    raise ValueError(f"`{name}`: {word!r} is not a regular expression ({error})") from None
                if re.search("[A-Z]", re.sub(r"\\.", "", word)):
                    raise ValueError(f"`{name}`: write {word!r} in lower case; it matches text of any case")


def keyword_matcher(keywords: list[str], position: str = "anywhere") -> Callable[[str], bool]:
    """Return a test for whether a lower-case step holds one of the keywords as whole words.

    Args:
        keywords: regular expressions; a space stands for any white space.
        position: `anywhere` in the step, or `start`: nothing but punctuation before it.
    """
    if not keywords:
        return lambda step: False
    words = "|".join(word.replace(" ", r"\s+") for word in keywords)
    pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)")
    if position == "anywhere":
        return lambda step: pattern.search(step) is not None
    return lambda step: pattern.match(step, len(step) - len(step.lstrip("*_#>-–—.,:;\"'(“ \t\n"))) is not None


def branching_scores(texts: list[str], config: BranchingConfig) -> dict[str, list]:
    """Score reasoning texts; a text without steps has None everywhere.

    Returns:
        `branch_ratio` (n_branch / n_steps, the paper's proxy P2), `branch_per_1k_words` (by white space), `n_steps`,
        the longest run of branching steps, `branch_run`, and the steps that hold a word of each class: `n_branch`,
        `n_backtrack`, `n_verify`.
    """
    classes = {
        name: keyword_matcher(keywords, config.position)
        for name, keywords in (
            ("n_branch", config.branch_keywords),
            ("n_backtrack", config.backtrack_keywords),
            ("n_verify", config.verify_keywords),
        )
    }
    scores: dict[str, list] = {name: [] for name in (*RATES, "n_steps", "branch_run", *classes)}
    for text in texts:
        steps = [step.lower() for step in split_steps(text, config.segmentation, config.min_step_chars)]
        if not steps:
            for column in scores.values():
                column.append(None)
            continue
        found = {name: [matches(step) for step in steps] for name, matches in classes.items()}
        for name, hits in found.items():
            scores[name].append(sum(hits))
        branches = found["n_branch"]
        scores["n_steps"].append(len(steps))
        scores["branch_run"].append(max((len(list(run)) for hit, run in groupby(branches) if hit), default=0))
        scores["branch_ratio"].append(sum(branches) / len(steps))
        scores["branch_per_1k_words"].append(1000 * sum(branches) / len(text.split()))
    return scores


def step_excess(
    n_steps: Sequence[int | None], problems: Sequence[str], sources: Sequence[str | None], reference: str
) -> list[float | None]:
    """Return (steps - steps of the reference) / steps of the reference: the paper's proxy P1, in our reading.

    Args:
        n_steps: steps of each row; None without reasoning, and so is its excess.
        problems: problem of each row.
        sources: source of each row.
        reference: the source to compare with: the mean over its rows of a problem.

    Raises:
        DataError: a problem has no chain of the reference to compare with.
    """
    of_reference: dict[str, list[int]] = {}
    for count, problem, source in zip(n_steps, problems, sources, strict=True):
        if source == reference and count is not None:
            of_reference.setdefault(problem, []).append(count)
    unpaired = {p for p, count in zip(problems, n_steps, strict=True) if count is not None} - of_reference.keys()
    if unpaired:
        named = sorted(map(source_name, set(sources)))
        raise DataError(
            f"`branching` with `proxy: step_excess` compares chains of one problem; {len(unpaired)} of "
            f"{len(set(problems))} problem(s) have no reasoning of the `reference` {reference!r}, such as "
            f"{min(unpaired)!r}. Sources here are {', '.join(named)}. Name another one, keep the paired problems only, "
            "or use `proxy: keywords`."
        )
    base = {problem: math.fsum(counts) / len(counts) for problem, counts in of_reference.items()}
    return [
        None if count is None else (count - base[problem]) / base[problem]
        for count, problem in zip(n_steps, problems, strict=True)
    ]


def select_rows(
    ratios: list[float | None], ids: list[str], problems: list[str], config: BranchingConfig
) -> dict[int, str]:
    """Return the rows to drop, with the reason. What becomes of rows without a score, `config.without_score` says."""
    scored = {row: ratio for row, ratio in enumerate(ratios) if ratio is not None}
    dropped: dict[int, str] = {}
    if config.without_score == "drop":
        dropped = {row: "no reasoning" for row, ratio in enumerate(ratios) if ratio is None}
    if config.threshold is not None:
        reason = f"{SCORE_OF[config.proxy]} above {config.threshold:g}"
        dropped |= {row: reason for row, ratio in scored.items() if ratio > config.threshold}
    elif config.select == "per_problem":
        best: dict[str, int] = {}
        for row in sorted(scored, key=lambda row: (scored[row], ids[row])):
            best.setdefault(problems[row], row)
        reason = "not the least branching of its problem"
        dropped |= {row: reason for row in scored if best[problems[row]] != row}
    else:
        kept = lowest(ratios, ids, config.keep_ratio)
        reason = f"among the most branching {100 * (1 - config.keep_ratio):.3g}%"
        dropped |= {row: reason for row, ratio in scored.items() if row not in kept and ratio > 0}
    return dict(sorted(dropped.items()))


def apply(
    table: Dataset, config: BranchingConfig, *, seed: int, cache_folder: Path, progress: ShowProgress | None
) -> FilterResult:
    """Score every row and drop the most branching ones; rows without reasoning have None.

    Raises:
        DataError: `step_excess` finds a problem without a chain of the reference.
    """
    scores: dict[str, list] = {}
    lengths: list[int] = []
    completions = table.select_columns(["completion"])
    with bar_of(progress, "branching", len(table)) as bar:
        for start in range(0, len(table), READ_ROWS):
            batch = completions[start : start + READ_ROWS]["completion"]
            for name, values in branching_scores([reasoning_text(c) for c in batch], config).items():
                scores.setdefault(name, []).extend(values)
            lengths.extend(map(word_count, batch))
            bar.advance(len(batch))
    ids, problems, sources = (values_of(table, name) for name in ("id", "problem_id", "source"))
    if config.reference is not None:
        scores["step_excess"] = step_excess(scores["n_steps"], problems, sources, config.reference)
    ranked = scores[SCORE_OF[config.proxy]]
    dropped = select_rows(ranked, ids, problems, config)
    return FilterResult(scores, dropped, _report(scores, ranked, dropped, ids, [*map(source_name, sources)], lengths))


def _report(
    scores: dict[str, list],
    ranked: list[float | None],
    dropped: dict[int, str],
    ids: list[str],
    sources: list[str],
    lengths: list[int],
) -> dict:
    scored = [row for row, score in enumerate(ranked) if score is not None]
    branching = dropped.keys() & set(scored)  # dropped for their score, not for lack of one
    longest = set(sorted(scored, key=lambda row: (-lengths[row], ids[row]))[: len(branching)])
    kept = [ranked[row] for row in scored if row not in dropped]
    return {
        "scored": len(scored),
        "without_reasoning": len(ranked) - len(scored),
        "of_one_step": scores["n_steps"].count(1),
        "mean_branch_ratio": mean(scores["branch_ratio"]),
        "highest_kept_score": max(kept, default=None),  # pyright: ignore[reportArgumentType]
        "without_a_branch": scores["branch_ratio"].count(0),
        "by_source": _by_source(scores, dropped, sources),
        "length": {
            "jaccard_with_dropping_the_longest": jaccard(branching, longest),
            "expected_jaccard_at_random": _random_jaccard(len(branching), len(scored)),
            "spearman": spearman([ranked[row] for row in scored], [lengths[row] for row in scored]),
        },
        "histogram": histogram(ranked, sources),
    }


def _by_source(scores: dict[str, list], dropped: dict[int, str], sources: list[str]) -> dict[str, dict]:
    rows: dict[str, list[int]] = {}
    for row, source in enumerate(sources):
        rows.setdefault(source, []).append(row)
    return {
        source: {
            "rows": len(members),
            "dropped": sum(row in dropped for row in members),
            **{f"mean_{name}": mean(column[row] for row in members) for name, column in scores.items()},
        }
        for source, members in sorted(rows.items())
    }


def _random_jaccard(dropped: int, total: int) -> float | None:
    """About what two independent draws of that many rows have in common: share / (2 - share)."""
    return dropped / total / (2 - dropped / total) if total and dropped else None


def spearman(one: list, other: list) -> float | None:
    """Return the rank correlation, or None where one side does not vary."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(one, other)[0])  # pyright: ignore[reportArgumentType]
