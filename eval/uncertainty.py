"""How far a score could be off, and whether two differ.

Two questions have two answers, and every number says which one it is:

* *new problems of this kind*: what would another draw of problems give? Samples of one problem are not independent, so
  a problem counts once: its score (a number in [0, 1], such as its pass@k) is one observation. All intervals are of
  this kind.
* *run to run on this benchmark*: what would the same model give on the same problems with other seeds? Only this error
  shrinks with more samples per problem (arXiv 2411.00640).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ..core.errors import DataError

LEVEL = 0.95
POWER = 0.8
EXACT_SIGNS = 16  # up to so many problems that differ, all signs are tried
SIGN_DRAWS = 100_000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval, and how the interval was made."""

    value: float
    low: float
    high: float
    method: str

    def overlaps(self, other: "Interval") -> bool:
        """Whether both intervals share a point."""
        return self.low <= other.high and other.low <= self.high


def mean_interval(scores: Sequence[float] | np.ndarray) -> Interval:
    """Mean of per-problem scores in [0, 1] with Wilson's interval at the effective sample size.

    The effective sample size is the number of independent right-or-wrong problems that would have the variance found,
    n* = m(1 - m) / (s^2/N), as survey statistics treat clusters (Korn and Graubard 1998), with Student's t for N - 1
    degrees of freedom. For plain 0/1 scores it is Wilson's interval, up to s^2's N - 1. It stays within [0, 1] and has
    a width where all problems agree. Simulated coverage with 10 to 500 problems, easy to hard, n = 1 and 8, is 89 to
    99%, where t and BCa intervals of a hard benchmark of 30 problems fall to 54% and 70%. Where pass@k is above 0.99
    nothing that was tried covers as it should.

    Args:
        scores: one per problem, (problems,).
    """
    values = np.asarray(scores, dtype=float)
    count = len(values)
    if count == 0:
        raise DataError("there is no problem to score.")
    mean = float(values.mean())
    if count == 1:
        return Interval(mean, 0.0, 1.0, "one problem says nothing about others")
    variance = float(values.var(ddof=1)) / count
    effective = mean * (1 - mean) / variance if variance > 1e-24 else float(count)
    z = float(stats.t.ppf(0.5 + LEVEL / 2, count - 1))
    shrink = 1 + z * z / effective
    centre = (mean + z * z / (2 * effective)) / shrink
    half = z / shrink * np.sqrt(max(mean * (1 - mean), 0) / effective + (z / (2 * effective)) ** 2)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Interval(mean, float(min(low, mean)), float(max(high, mean)), "Wilson, effective sample size, problems")


def mean_over_seeds(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean of one score over runs with different seeds, with Student's t interval over the runs: what other seeds give.

    Args:
        values: one per run, (runs,).

    Raises:
        DataError: there are fewer than two runs.
    """
    runs = np.asarray(values, dtype=float)
    if len(runs) < 2:
        raise DataError(f"an interval over seeds needs at least two runs, there are {len(runs)}.")
    mean = float(runs.mean())
    half = float(stats.t.ppf(0.5 + LEVEL / 2, len(runs) - 1) * runs.std(ddof=1) / np.sqrt(len(runs)))
    return Interval(mean, mean - half, mean + half, f"Student's t over {len(runs)} runs")


def new_problems_error(scores: Sequence[float] | np.ndarray) -> float | None:
    """Standard error of a mean over problems: s / sqrt(N). None for a single problem.

    Args:
        scores: one per problem, (problems,).
    """
    values = np.asarray(scores, dtype=float)
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def run_to_run_error(n: int, correct: Sequence[int] | np.ndarray, by_count: np.ndarray) -> float | None:
    """Standard error of a mean score over reruns with other seeds on the same problems. None where n is 1.

    sqrt(sum_i Var(f(C_i))) / N with C_i ~ Binomial(n, c_i / n), times n / (n - 1): for f = c / n that is the unbiased
    p(1 - p) / (n - 1) of arXiv 2411.00640, section 3.2; for other f the same correction is our choice.

    Args:
        n: samples per problem.
        correct: correct samples c_i of each problem, (problems,).
        by_count: the score f of a problem with 0, 1, ..., n correct samples, (n + 1,).
    """
    if n < 2:
        return None
    counts, problems_with = np.unique(np.asarray(correct, dtype=int), return_counts=True)
    weights = stats.binom.pmf(np.arange(n + 1), n, counts[:, None] / n)
    variances = weights @ by_count**2 - (weights @ by_count) ** 2
    total = float(problems_with @ np.maximum(variances, 0)) * n / (n - 1)
    return float(np.sqrt(total)) / len(correct)


def resolvable(error: float) -> float:
    """Smallest true difference that a two-sided 5% test finds with 80% power: (z_{0.975} + z_{0.8}) x its error.

    Args:
        error: standard error of the difference.
    """
    return float(stats.norm.ppf(0.5 + LEVEL / 2) + stats.norm.ppf(POWER)) * error


def problems_needed(difference: float, error: float, problems: int) -> int | None:
    """Problems of this kind on which a difference would be found with 80% power. None for a difference of zero.

    (z_{0.975} + z_{0.8})^2 omega^2 / difference^2 with omega^2 = N error^2, the variance of a problem's difference,
    which holds that between samples as well: arXiv 2411.00640, equation 9.

    Args:
        difference: the true difference that is to be found.
        error: standard error of the difference on the present problems.
        problems: how many these are, N.
    """
    return int(np.ceil(problems * (resolvable(error) / difference) ** 2)) if difference else None


def paired_difference(first: Mapping[str, float], second: Mapping[str, float]) -> Interval:
    """Mean of second - first over the same problems, with Student's t interval of the differences.

    Pairing removes what both runs share, the difficulty of the problems: the interval is often half as wide as that of
    two separate scores. Where every problem has the same difference, the interval is widened by the largest share of
    unseen problems that could differ, 1 - 0.05^(1/N).

    Args:
        first: problem id -> score of the first run.
        second: the same of the second run.

    Raises:
        DataError: the runs have different problems.
    """
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())
        raise DataError(
            f"the two runs have different problems ({len(odd)} are in one only, such as {odd[0]!r}). Compare runs of "
            "the same task and version."
        )
    differences = np.array([second[name] - first[name] for name in first])
    count = len(differences)
    if count < 2:
        raise DataError(f"a paired interval needs at least two problems, there are {count}.")
    mean = float(differences.mean())
    error = float(differences.std(ddof=1)) / np.sqrt(count)
    if error < 1e-12:
        half, method = 1 - (1 - LEVEL) ** (1 / count), "all problems differ alike; rule of three"
    else:
        half, method = float(stats.t.ppf(0.5 + LEVEL / 2, count - 1)) * error, "paired t, problems"
    return Interval(mean, max(-1.0, mean - half), min(1.0, mean + half), method)


def sign_flip_test(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p-value of a mean difference, by exchanging the two runs in each problem.

    Nothing is assumed of the differences but that, without an effect, a and b of a problem could be exchanged. With up
    to 16 problems that differ all exchanges are counted, with more 100,000 drawn from a fixed seed, p = (1 + hits) /
    (1 + draws).

    Args:
        differences: one per problem, (problems,).
    """
    values = np.asarray(differences, dtype=float)
    values = values[np.abs(values) > 1e-12]
    count, found = len(values), abs(values.sum()) - 1e-9
    if not count:
        return 1.0
    if count <= EXACT_SIGNS:
        signs = 1 - 2 * (np.arange(1 << count)[:, None] >> np.arange(count) & 1)
        return float((np.abs(signs @ values) >= found).mean())
    rng, hits, block = np.random.default_rng(0), 0, 1_000
    for _ in range(SIGN_DRAWS // block):
        signs = rng.integers(0, 2, (block, count), dtype=np.int8) * 2 - 1
        hits += int((np.abs(signs @ values) >= found).sum())
    return (1 + hits) / (1 + SIGN_DRAWS)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm 1979): below 0.05 all together are wrong in at most 5% of cases."""
    order = np.argsort(p_values, kind="stable")
    adjusted, highest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * float(p_values[index])))
        adjusted[index] = highest
    return adjusted
