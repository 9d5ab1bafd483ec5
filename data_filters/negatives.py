"""Which wrong solutions to keep for training, after GLOW (2601.04992): finished ones, as many as right ones.

    - grade
    - negatives: {mode: balanced, max_per_problem: 4, max_similarity: 0.8}

The label only decides which rows are in the set. It never enters the loss: GLOW imitates right and wrong chains alike
with plain NLL, and so do our trainers (the released trainer has no label input). How the paper drew and balanced its
sets is not published; `finished`, the balance and the cap are choices of this project.

A wrong solution is a negative only if it is finished: graded wrong on an answer it gave (not "not gradable"), its
think block closed, and neither cut off nor stopped by an error. A truncated chain teaches never to stop.

`max_similarity` leaves out a row that is nearly a copy of one already taken of the same problem *and* label, so that a
cap of m buys m different mistakes; `deduplication` before this step would also weigh a wrong row against a right one.

Controls: `mode: positive_only`, and `- random` at the same number of rows.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from datasets import Dataset

from ..core.answer_extraction import after_think
from ..core.errors import DataError
from ..core.trajectory import final_text
from .columns import all_null, source_names, values_of
from .deduplication import shingles, similarity
from .result import FilterResult, ShowProgress, bar_of
from .selection import seeded_order
from .text_match import assistant_text, normalise

Kind = Literal["positive", "negative", "unfinished", "not_gradable"]

NOT_FINISHED = "wrong but not finished"
NOT_GRADABLE = "not gradable"
OVER_CAP = "over `max_per_problem`"
NEAR_COPY = "nearly a copy of a row of its problem and label"
NGRAM_WORDS = 5
READ_ROWS = 512


@dataclass
class NegativesConfig:
    """Which labels stay, and in which proportion."""

    mode: Literal["keep_all", "positive_only", "negative_only", "balanced"] = field(
        metadata={
            "help": "keep_all: every row, counted only. positive_only: right. negative_only: wrong and finished. "
            "balanced: as many finished wrong ones as right ones."
        }
    )
    balance: Literal["overall", "per_problem"] = field(
        default="overall",
        metadata={
            "help": "Where `balanced` counts. per_problem: equal numbers in each problem, so that a problem that is "
            "always right or always wrong is left out."
        },
    )
    max_per_problem: int | None = field(
        default=None, metadata={"help": "At most so many right and so many wrong rows of each problem."}
    )

    max_similarity: float | None = field(
        default=None,
        metadata={
            "help": "Leave out a row whose word 5-grams have at least this Jaccard similarity with a row taken before "
            "it, of the same problem and label; default: all may be alike."
        },
    )

    def __post_init__(self):
        if self.max_similarity is not None and not 0 < self.max_similarity <= 1:
            raise ValueError(f"`max_similarity` must be above 0 and at most 1, got {self.max_similarity}")
        if self.max_per_problem is not None and self.max_per_problem < 1:
            raise ValueError(f"`max_per_problem` must be at least 1, got {self.max_per_problem}")
        for key in ("max_per_problem", "max_similarity"):
            if self.mode == "keep_all" and getattr(self, key) is not None:
                raise ValueError(f"`{key}` drops rows and `mode: keep_all` keeps them all: leave one out")
        if self.mode != "balanced" and self.balance != "overall":
            raise ValueError(f"`balance` belongs to `mode: balanced`, not to `mode: {self.mode}`")


def check(table: Dataset, config: NegativesConfig, filled: Iterable[str] = ()) -> None:
    """Refuse a table that no one has graded, before anything is computed.

    Args:
        table: the chain's input.
        config: `keep_all` needs no labels.
        filled: columns that earlier steps will write.

    Raises:
        DataError: `correct` is null in every row and no earlier step fills it.
    """
    if config.mode != "keep_all" and "correct" not in filled and all_null(table, "correct"):
        raise DataError(
            "`negatives` needs the column `correct`, which is null in every row. Put `- grade` before `- negatives` "
            "in `steps`, or map the file's labels with `columns: {correct: <your column>}`."
        )


def kind_of(correct: bool | None, finish_reason: str | None, completion: list[dict]) -> Kind:
    """Say what a graded row can serve as."""
    if correct is None:
        return "not_gradable"
    if correct:
        return "positive"
    finished = finish_reason in (None, "stop") and after_think(final_text(completion)) is not None
    return "negative" if finished else "unfinished"


def select_rows(
    kinds: list[Kind],
    ids: list[str],
    problems: list[str],
    config: NegativesConfig,
    seed: int,
    text_of: Callable[[int], str] = lambda row: "",
) -> dict[int, str]:
    """Return the rows to drop, with the reason.

    All draws follow one random order of the rows by (seed, id): more rows in the file leave the order of the others
    as it was.

    Args:
        kinds: what each row can serve as.
        ids: of the rows.
        problems: of the rows.
        config: what to keep.
        seed: of the draw.
        text_of: row -> what the assistant wrote, asked for with `max_similarity` only.

    Raises:
        DataError: `balanced` without a row of one of the labels.
    """
    if config.mode == "keep_all":
        return {}
    wanted = {"positive_only": ("positive",), "negative_only": ("negative",)}.get(config.mode, ("positive", "negative"))
    other = {"unfinished": NOT_FINISHED, "not_gradable": NOT_GRADABLE}
    dropped = {
        row: other.get(kind, f"{kind}, and `mode` is {config.mode}")
        for row, kind in enumerate(kinds)
        if kind not in wanted
    }
    order = seeded_order((row for row, kind in enumerate(kinds) if kind in wanted), ids, seed, "negatives")
    if config.max_similarity is not None:
        dropped |= _near_copies(order, kinds, problems, config.max_similarity, text_of)
    taken: Counter = Counter()
    for row in order:
        if row in dropped:
            continue
        taken[problems[row], kinds[row]] += 1
        if config.max_per_problem is not None and taken[problems[row], kinds[row]] > config.max_per_problem:
            dropped[row] = OVER_CAP
    if config.mode == "balanced":
        groups = problems if config.balance == "per_problem" else ["all"] * len(kinds)
        dropped |= _surplus([row for row in order if row not in dropped], kinds, groups)
    return dict(sorted(dropped.items()))


def _near_copies(
    order: list[int], kinds: list[Kind], problems: list[str], most: float, text_of: Callable[[int], str]
) -> dict[int, str]:
    """Rows that are nearly a copy of an earlier one of their problem and label; one problem is in memory at a time."""
    groups: dict[tuple[str, Kind], list[int]] = {}
    for row in order:
        groups.setdefault((problems[row], kinds[row]), []).append(row)
    copies = {}
    for rows in groups.values():
        taken: list[set[str]] = []
        for row in rows if len(rows) > 1 else ():
            grams = shingles(normalise(text_of(row)), NGRAM_WORDS)
            if any(similarity(grams, other) >= most for other in taken):
                copies[row] = NEAR_COPY
            else:
                taken.append(grams)
    return copies


def _surplus(rows: list[int], kinds: list[Kind], groups: list[str]) -> dict[int, str]:
    """The rows beyond an equal number of both labels in each group: the last ones of the random order."""
    counts = Counter((groups[row], kinds[row]) for row in rows)
    totals = Counter(kinds[row] for row in rows)
    if not totals["positive"] or not totals["negative"]:
        raise DataError(
            f"`negatives` with `mode: balanced` needs both labels; it has {totals['positive']} right and "
            f"{totals['negative']} finished wrong row(s). Choose another `mode`, or sample more."
        )
    taken: Counter = Counter()
    dropped = {}
    for row in rows:
        group, kind = groups[row], kinds[row]
        taken[group, kind] += 1
        if taken[group, kind] > min(counts[group, "positive"], counts[group, "negative"]):
            dropped[row] = f"surplus {kind}"
    return dropped


def apply(
    table: Dataset, config: NegativesConfig, *, seed: int, cache_folder: Path, progress: ShowProgress | None
) -> FilterResult:
    """Keep the rows of the wanted labels, in the wanted proportion.

    Raises:
        DataError: nothing is graded, or `balanced` lacks one of the labels.
    """
    check(table, config)
    kinds: list[Kind] = []
    columns = table.select_columns(["correct", "finish_reason", "completion"])
    with bar_of(progress, "negatives", len(table)) as bar:
        for start in range(0, len(table), READ_ROWS):
            batch = columns[start : start + READ_ROWS]
            kinds.extend(map(kind_of, batch["correct"], batch["finish_reason"], batch["completion"]))
            bar.advance(len(batch["correct"]))
    problems = values_of(table, "problem_id")
    completions = table.select_columns(["completion"])

    def text_of(row: int) -> str:
        return assistant_text(completions[row]["completion"])

    dropped = select_rows(kinds, values_of(table, "id"), problems, config, seed, text_of)
    return FilterResult({}, dropped, _report(kinds, dropped, problems, table))


def _report(kinds: list[Kind], dropped: dict[int, str], problems: list[str], table: Dataset) -> dict:
    def counts(rows: Iterable[int]) -> dict[str, int]:
        found = Counter(kinds[row] for row in rows)
        return {kind: found[kind] for kind in ("positive", "negative", "unfinished", "not_gradable")}

    sources: dict[str, list[int]] = {}
    for row, source in enumerate(source_names(table)):
        sources.setdefault(source, []).append(row)
    kept = [row for row in range(len(kinds)) if row not in dropped]
    return {
        "in": counts(range(len(kinds))),
        "kept": counts(kept),
        "problems_in": len(set(problems)),
        "problems_kept": len({problems[row] for row in kept}),
        "by_source": {
            source: {"in": counts(rows), "kept": counts(row for row in rows if row not in dropped)}
            for source, rows in sorted(sources.items())
        },
    }
