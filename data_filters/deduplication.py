"""Drop copies: exact ones after normalisation, and near ones by the Jaccard similarity of their word 5-grams.

    - deduplication                       # near duplicates among the trajectories of each problem
    - deduplication: {within: all}        # among all rows, problem and solution read together
    - deduplication: {threshold: null}    # exact duplicates only

MinHash (datasketch) finds the pairs that may be alike; each such pair is then compared word by word, so no row goes
because of an estimate. What MinHash misses stays: at the default settings one pair in 600 with a similarity just at
the threshold, and far fewer above it.

Rows are visited in an order drawn by seed and id; a row goes if a row that already stays is at least `threshold`
alike. So every dropped row has a kept one like it, named in the reason, and chains of likeness do not carry over.

Per row stay in memory: 16 bytes of digest and 8 per band (below 300 bytes in all); texts are read again from the table.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset

from ..core.trajectory import prompt_text
from .columns import source_names, values_of
from .result import FilterResult, ShowProgress, bar_of
from .selection import histogram, seeded_order
from .text_match import assistant_text, normalise, word_ngrams

READ_ROWS = 512
SHINGLES_AT_ONCE = 8192  # times num_perm times 4 bytes: the scratch memory of one MinHash update
REMEMBERED = 1024
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit is lost
MISSED = 0.005  # largest share of the pairs at the threshold that MinHash may not propose


@dataclass
class DeduplicationConfig:
    """What counts as a copy."""

    within: Literal["problem", "all"] = field(
        default="problem",
        metadata={"help": "problem: compare what the assistant wrote, among rows of one problem_id. all: compare "
                          "problem and solution together, among all rows."},
    )  # fmt: skip
    threshold: float | None = field(
        default=0.8,
        metadata={"help": "Smallest Jaccard similarity of a near duplicate; null: exact duplicates only."},
    )
    ngram_words: int = field(default=5, metadata={"help": "Words of an n-gram. A shorter text is one n-gram."})
    num_perm: int = field(default=128, metadata={"help": "Permutations of MinHash: more miss fewer near duplicates."})

    def __post_init__(self):
        if self.threshold is not None and not 0.1 <= self.threshold <= 1:
            raise ValueError(f"`threshold` must be from 0.1 to 1, got {self.threshold}")
        if self.ngram_words < 1:
            raise ValueError(f"`ngram_words` must be at least 1, got {self.ngram_words}")
        if not 16 <= self.num_perm <= 1024:
            raise ValueError(f"`num_perm` must be from 16 to 1024, got {self.num_perm}")


# ---------------------------------------------------------------------------------------------------------------------
# texts as numbers


def compared_text(prompt: list[dict], completion: list[dict], within: str) -> str:
    """Return the normal form of what is compared: all that the assistant wrote, with `all` after the problem."""
    said = assistant_text(completion)
    return normalise(said if within == "problem" else f"{prompt_text(prompt)}\n{said}")


def shingles(text: str, n: int) -> set[str]:
    """Return the word n-grams of a normal form; a text of fewer words is one n-gram."""
    words = text.split()
    return word_ngrams(words, n) or {text}


def shingle_hashes(text: str, n: int) -> np.ndarray:
    """Return a 32-bit number for each of the shingles of a text, repeated ones repeated."""
    words = text.split() or [""]
    n = min(n, len(words))
    of_words = np.fromiter((zlib.crc32(word.encode()) for word in words), dtype=np.uint64, count=len(words))
    mixed = np.zeros(len(words) - n + 1, dtype=np.uint64)
    for place in range(n):
        mixed = (mixed + of_words[place : place + len(mixed)]) * _MIX  # modulo 2^64
    return (mixed >> np.uint64(32)).astype(np.uint32)


def similarity(one: set[str], other: set[str]) -> float:
    """Return the Jaccard similarity of two sets that are not both empty."""
    common = len(one & other)
    return common / (len(one) + len(other) - common)


def bands_and_rows(threshold: float, num_perm: int) -> tuple[int, int]:
    """Return the fewest bands, and their rows, that miss at most `MISSED` of the pairs just at the threshold.

    Two texts of similarity s agree in no band with probability (1 - s^rows)^bands (Leskovec et al., Mining of Massive
    Datasets, 3.4). A missed pair stays for good, a false one only costs a comparison.
    """
    for rows in range(num_perm, 1, -1):
        if (1 - threshold**rows) ** (num_perm // rows) <= MISSED:
            return num_perm // rows, rows
    return num_perm, 1


class Bands:
    """MinHash signatures cut into bands: two texts that agree in one band are compared."""

    def __init__(self, threshold: float, num_perm: int):
        from datasketch import MinHash

        self.count, self.rows = bands_and_rows(threshold, num_perm)
        self._minhash = MinHash(num_perm=num_perm, seed=1, hashfunc=int)  # it mixes the numbers it is given itself
        rng = np.random.default_rng(1)
        self._mix = rng.integers(1, 2**63, size=self.rows, dtype=np.uint64) | np.uint64(1)

    def of(self, hashes: np.ndarray, salt: int) -> np.ndarray:
        """Return one 64-bit number per band for what `shingle_hashes` returned; other salts share none."""
        self._minhash.clear()
        for start in range(0, len(hashes), SHINGLES_AT_ONCE):
            self._minhash.update_batch(hashes[start : start + SHINGLES_AT_ONCE].tolist())
        used = self._minhash.hashvalues[: self.count * self.rows].reshape(self.count, self.rows).astype(np.uint64)
        return (used * self._mix).sum(axis=1, dtype=np.uint64) ^ np.uint64(salt)


def _digest(*parts: str, size: int = 16) -> bytes:
    return blake2b("\0".join(parts).encode(errors="surrogatepass"), digest_size=size).digest()


# ---------------------------------------------------------------------------------------------------------------------
# the filter


def apply(
    table: Dataset, config: DeduplicationConfig, *, seed: int, cache_folder: Path, progress: ShowProgress | None
) -> FilterResult:
    """Keep one row of every set of copies; adds `duplicate_of` (an id) and `similarity` to it."""
    columns = table.select_columns(["problem_id", "prompt", "completion"])
    bands = None if config.threshold is None else Bands(config.threshold, config.num_perm)
    digests = np.zeros(len(table), dtype="S16")
    hashes = np.zeros((len(table), bands.count if bands else 0), dtype=np.uint64)

    def texts() -> Iterator[tuple[int, str, str]]:
        for start in range(0, len(table), READ_ROWS):
            batch = columns[start : start + READ_ROWS]
            rows = zip(batch["problem_id"], batch["prompt"], batch["completion"], strict=True)
            for row, (problem, prompt, completion) in enumerate(rows, start):
                text = compared_text(prompt, completion, config.within)
                yield row, problem if config.within == "problem" else "", text

    with bar_of(progress, "deduplication", len(table)) as bar:
        for row, scope, text in texts():
            digests[row] = _digest(scope, text)
            if bands:
                salt = int.from_bytes(_digest(scope, size=8), "little")
                hashes[row] = bands.of(shingle_hashes(text, config.ngram_words), salt)
            bar.advance(1)
    ids = values_of(table, "id")
    exact = _exact(digests, ids, seed)
    near, compared = _near(columns, hashes, exact, ids, config, seed) if bands else ({}, 0)
    twins = {row: near.get(first, (first, 1.0)) for row, first in exact.items()} | near
    dropped = {}
    for row in sorted(twins):
        other, alike = twins[row]
        copy = "exact duplicate" if row in exact and exact[row] not in near else "near duplicate"
        dropped[row] = f"{copy} (of {ids[other]}{'' if copy[0] == 'e' else f', similarity {alike:.3f}'})"
    scores: dict[str, list] = {"duplicate_of": [None] * len(ids), "similarity": [None] * len(ids)}
    for row, (other, alike) in twins.items():
        scores["duplicate_of"][row], scores["similarity"][row] = ids[other], alike
    report = {
        "exact": len(exact), "near": len(near), "pairs_compared": compared,
        "bands": bands and {"count": bands.count, "rows": bands.rows},
        "similarity": histogram(scores["similarity"], source_names(table)),
    }  # fmt: skip
    return FilterResult(scores, dropped, report)


def _exact(digests: np.ndarray, ids: list[str], seed: int) -> dict[int, int]:
    """Return for every copy the row that stays in its place."""
    groups = _repeated(digests)
    first: dict[int, int] = {}
    copies = {}
    for row in seeded_order(np.flatnonzero(groups >= 0).tolist(), ids, seed, "deduplication"):
        kept = first.setdefault(int(groups[row]), row)
        if kept != row:
            copies[row] = kept
    return copies


def _repeated(keys: np.ndarray) -> np.ndarray:
    """Number the keys that stand more than once; -1 for those that stand once."""
    _, number, count = np.unique(keys, return_inverse=True, return_counts=True)
    shared = count > 1
    return np.where(shared, np.cumsum(shared) - 1, -1)[number]


def _near(
    columns: Dataset, hashes: np.ndarray, exact: dict[int, int], ids: list[str], config: DeduplicationConfig, seed: int
) -> tuple[dict[int, tuple[int, float]], int]:
    """Return for every near copy the kept row that is most like it, and how many pairs were compared."""
    rows = np.array([row for row in range(len(ids)) if row not in exact])
    buckets = np.full((len(ids), hashes.shape[1]), -1, dtype=np.int32)
    count = 0
    for band in range(hashes.shape[1]):
        shared = _repeated(hashes[rows, band])
        buckets[rows, band] = np.where(shared >= 0, shared + count, -1)
        count += int(shared.max(initial=-1)) + 1

    @lru_cache(REMEMBERED)
    def shingles_of(row: int) -> set[str]:
        found = columns[row]
        text = compared_text(found["prompt"], found["completion"], config.within)
        return shingles(text, config.ngram_words)

    # Most buckets hold one kept row: a list for each would take gigabytes at a million rows.
    first, more = np.full(count, -1, dtype=np.int32), dict[int, list[int]]()
    near, compared = {}, 0
    suspects = np.flatnonzero((buckets >= 0).any(axis=1)).tolist()
    for row in seeded_order(suspects, ids, seed, "deduplication"):
        own = [bucket for bucket in buckets[row].tolist() if bucket >= 0]
        others = {int(first[bucket]) for bucket in own} | {other for bucket in own for other in more.get(bucket, ())}
        alike = {other: similarity(shingles_of(row), shingles_of(other)) for other in others - {-1}}
        compared += len(alike)
        best = min(alike, key=lambda other: (-alike[other], ids[other]), default=None)
        if best is not None and alike[best] >= (config.threshold or 0):
            near[row] = (best, alike[best])
            continue
        for bucket in own:
            if first[bucket] < 0:
                first[bucket] = row
            else:
                more.setdefault(bucket, []).append(row)
    return near, compared
