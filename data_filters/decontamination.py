r"""Drop trajectories whose problem stands in a benchmark.

    - decontamination: {benchmarks: [aime24, math500, my_problems.jsonl]}

The first check that hits drops the row, and the reason names the benchmark's item:

    words       a run of 8 words, lower case, split at white space: the rule of s1 and open-r1
    exact       the whole problem, or one line of it, in normal form (`text_match.normalise`)
    characters  a run of 50 characters of the normal form without white space
    numbers     the whole problem, or one line of it, equal but for its numbers

`words` and `numbers` read the items of at least 8 words; a shorter item has no run of 8 words and would never be
found, so `characters` reads those, and `exact` reads all. A prompt's instruction ("Put your final answer within
\boxed{}.") is in the way of `exact` unless it stands in a line of its own.

A run of 8 words is a low bar on purpose: benchmarks and training sets of one style share phrases ("how many positive
integers less than 1000 are"). `min_overlap` raises it: the share of the item's 8-grams that the row must hold.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from ..core.benchmark_files import task_file
from ..core.errors import DataError, RecipeError
from ..core.recipe import plain, read_recipe
from ..core.row_sources import source_rows
from ..core.trajectory import prompt_text
from .columns import source_names
from .result import FilterResult, ShowProgress, bar_of
from .selection import count_by, histogram
from .text_match import char_ngrams, normalise, without_numbers, word_ngrams

PROMPT_COLUMNS = ("prompt", "problem", "question")
READ_ROWS = 512
REMEMBERED = 4096  # the trajectories of one problem share its prompt


@dataclass
class DecontaminationConfig:
    """Which benchmarks must not be in the training set."""

    benchmarks: list[str] = field(
        metadata={"help": "Benchmarks of the package (aime24), task files (.yaml), files of problems (.jsonl[.gz], "
                          ".json, .parquet), or datasets on the hub (owner/name[:subset[:split]])."}
    )  # fmt: skip
    columns: dict[str, str] = field(
        default_factory=dict,
        metadata={"help": "prompt, problem_id -> the column of the files of problems. Default: the first of prompt, "
                          "problem, question."},
    )  # fmt: skip
    ngram_words: int = field(default=8, metadata={"help": "Words in a row that mark a copy."})
    ngram_chars: int = field(default=50, metadata={"help": "Characters in a row that mark a copy of a short item."})
    min_overlap: float = field(
        default=0.0, metadata={"help": "Share of an item's n-grams that a row must hold; 0: one is enough."}
    )

    def __post_init__(self):
        if not self.benchmarks:
            raise ValueError("`benchmarks` is empty: name at least one")
        if self.ngram_words < 2 or self.ngram_chars < 10:
            raise ValueError("`ngram_words` must be at least 2 and `ngram_chars` at least 10")
        if not 0 <= self.min_overlap <= 1:
            raise ValueError(f"`min_overlap` must be from 0 to 1, got {self.min_overlap}")

    @property
    def sources(self) -> list[str]:
        """The files that the benchmarks are read from."""
        return [source for name in self.benchmarks for source in _made_of(name)]


# ---------------------------------------------------------------------------------------------------------------------
# benchmarks


def _task_of(name: str) -> dict[str, Any]:
    """Return the keys of the task file that a name means; nothing for a file of problems or a hub id."""
    path = task_file(name)
    if path is None:
        return {}
    task = plain(read_recipe(path).values)
    if "data" not in task:
        raise RecipeError(f"{path}: `data` is missing, so this is no task file of a benchmark.")
    return {"split": "test"} | task  # as `eval` reads it


def _made_of(name: str) -> list[str]:
    """Return the files, or the dataset on the hub, that a benchmark comes from."""
    path = task_file(name)
    return [str(path), str(_task_of(name)["data"])] if path else [name]


def read_benchmark(name: str, columns: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield (item, problem as text) of one benchmark.

    Raises:
        DataError: no such file or dataset, no item in it, or a row without the column of the problem.
        RecipeError: a task file that is no YAML.
    """
    task: dict[str, Any] = {"data": name, "columns": columns, "split": "train", "subset": None}
    task |= _task_of(name)
    subsets = task["subset"] if isinstance(task["subset"], list) else [task["subset"]]
    number = -1
    for subset in subsets:
        for where, row in source_rows(task["data"], task["split"], subset):
            number += 1
            names = [task["columns"]["prompt"]] if "prompt" in task["columns"] else PROMPT_COLUMNS
            text = next((row[column] for column in names if row.get(column) is not None), None)
            if isinstance(text, list):
                text = prompt_text(text)
            if not isinstance(text, str):
                raise DataError(
                    f"{where}: no text in {' or '.join(f'`{column}`' for column in names)}; the row has {sorted(row)}. "
                    "Name the problem's column with `columns: {prompt: <its column>}` of `decontamination`."
                )
            item = row.get(task["columns"].get("problem_id", "problem_id"))
            yield str(number if item is None else item), text
    if number < 0:
        raise DataError(f"`decontamination`: {name} has no item. Check the file, or leave it out of `benchmarks`.")


class Match(NamedTuple):
    """What a problem has in common with a benchmark: which check hit, which item, and the share of its n-grams."""

    check: str
    benchmark: str
    item: str
    share: float


class BenchmarkIndex:
    """The n-grams and normal forms of all items; answers which item a text is a copy of."""

    def __init__(self, ngram_words: int = 8, ngram_chars: int = 50, min_overlap: float = 0.0):
        self.ngram_words, self.ngram_chars, self.min_overlap = ngram_words, ngram_chars, min_overlap
        self.items: list[tuple[str, str]] = []
        self._sizes: list[int] = []
        self._grams: dict[str, dict[str, list[int]]] = {"words": {}, "characters": {}}
        self._forms: dict[str, dict[str, int]] = {"exact": {}, "numbers": {}}

    def add(self, benchmark: str, item: str, text: str) -> None:
        """Take in one item; a text without a word is never matched."""
        words, normal, number = text.lower().split(), normalise(text), len(self.items)
        if not normal:
            return
        short = len(words) < self.ngram_words
        grams = (
            char_ngrams(normal.replace(" ", ""), self.ngram_chars) if short else word_ngrams(words, self.ngram_words)
        )
        owners = self._grams["characters" if short else "words"]
        for gram in grams:
            owners.setdefault(gram, []).append(number)
        self._forms["exact"].setdefault(normal, number)
        if not short:
            self._forms["numbers"].setdefault(without_numbers(normal), number)
        self.items.append((benchmark, item))
        self._sizes.append(len(grams))

    def find(self, text: str) -> Match | None:
        """Return the first check that hits with the item that it hits best; ties go to the item added first."""
        lines = {normalise(line): None for line in (text, *text.splitlines())}  # in order
        return (
            self._by_grams("words", word_ngrams(text.lower().split(), self.ngram_words))
            or self._by_form("exact", lines)
            or (self._by_grams("characters", self._char_ngrams(normalise(text))) if self._grams["characters"] else None)
            or self._by_form("numbers", map(without_numbers, lines))
        )

    def _char_ngrams(self, normal: str) -> set[str]:
        return char_ngrams(normal.replace(" ", ""), self.ngram_chars)

    def _by_grams(self, check: str, grams: set[str]) -> Match | None:
        owners = self._grams[check]
        hits = Counter(item for gram in grams if gram in owners for item in owners[gram])
        shares = {item: count / self._sizes[item] for item, count in hits.items()}
        shares = {item: share for item, share in shares.items() if share >= self.min_overlap}
        if not shares:
            return None
        best = min(shares, key=lambda item: (-shares[item], item))
        return Match(check, *self.items[best], shares[best])

    def _by_form(self, check: str, forms: Any) -> Match | None:
        item = next((self._forms[check][form] for form in forms if form in self._forms[check]), None)
        return None if item is None else Match(check, *self.items[item], 1.0)


def load_index(config: DecontaminationConfig) -> BenchmarkIndex:
    """Read all benchmarks.

    Raises:
        DataError: one cannot be read; names file and row.
    """
    index = BenchmarkIndex(config.ngram_words, config.ngram_chars, config.min_overlap)
    for benchmark in config.benchmarks:
        name = Path(benchmark).name.removesuffix(".gz") if Path(benchmark).exists() else benchmark
        for item, text in read_benchmark(benchmark, config.columns):
            index.add(name, item, text)
    return index


# ---------------------------------------------------------------------------------------------------------------------
# the filter


def check(table: Dataset, config: DecontaminationConfig, filled: set[str]) -> None:
    """Read the benchmarks before any step starts, so that a missing one stops the chain at once.

    Raises:
        DataError: a benchmark cannot be read.
    """
    load_index(config)


def _reason(match: Match, config: DecontaminationConfig) -> str:
    share = f", {100 * match.share:.0f}% of its n-grams"
    return {
        "words": f"has {config.ngram_words} words in a row of {match.benchmark} (item {match.item}{share})",
        "exact": f"equals an item of {match.benchmark} (item {match.item})",
        "characters": f"has {config.ngram_chars} characters in a row of {match.benchmark} (item {match.item}{share})",
        "numbers": f"equals an item of {match.benchmark} but for numbers (item {match.item})",
    }[match.check]


def apply(
    table: Dataset, config: DecontaminationConfig, *, seed: int, cache_folder: Path, progress: ShowProgress | None
) -> FilterResult:
    """Drop rows whose problem is in a benchmark; adds `contaminated_by` and `contamination`, the share of the item.

    Raises:
        DataError: a benchmark cannot be read.
    """
    index = load_index(config)
    find = lru_cache(REMEMBERED)(index.find)
    dropped: dict[int, str] = {}
    matches: list[Match | None] = []
    prompts = table.select_columns(["prompt"])
    with bar_of(progress, "decontamination", len(table)) as bar:
        for start in range(0, len(table), READ_ROWS):
            batch = prompts[start : start + READ_ROWS]["prompt"]
            matches.extend(find(prompt_text(prompt)) for prompt in batch)
            bar.advance(len(batch))
    for row, match in enumerate(matches):
        if match:
            dropped[row] = _reason(match, config)
    scores = {
        "contaminated_by": [f"{match.benchmark}/{match.item}" if match else None for match in matches],
        "contamination": [match.share if match else None for match in matches],
    }
    return FilterResult(scores, dropped, _report(table, index, matches))


def _report(table: Dataset, index: BenchmarkIndex, matches: Sequence[Match | None]) -> dict:
    found = [match for match in matches if match]
    return {
        "items": count_by(benchmark for benchmark, _ in index.items),
        "items_found": count_by(benchmark for benchmark, _ in {(match.benchmark, match.item) for match in found}),
        "checks": count_by(match.check for match in found),
        "share_of_the_item": histogram([match.share if match else None for match in matches], source_names(table)),
    }
