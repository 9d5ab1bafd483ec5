"""The mathematics of the Rank-Surprisal Ratio (arXiv 2601.14249): trajectories, sets, teachers, choices."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.token_stats import TokenStats
from .selection import seeded_order

MIN_SURPRISAL = 1e-3
"""A trajectory of lower mean surprisal (nats) is memorised: its ratio is noise."""

_DRAWS, _DRAW_ELEMENTS = 1000, 10_000_000
"""Bootstrap resamples, and how many counts of them are held at once."""


@dataclass(frozen=True)
class RSRScore:
    """Rank-Surprisal Ratio of one trajectory, with the two averages that it is made of (Eq. 8).

    Attributes:
        n_tokens: Number of scored tokens.
        avg_rank_clip: Mean of min(rank, r_max).
        avg_surprisal: Mean negative log-likelihood in nats.
        fault: Why the trajectory could not be scored at all, or None.
    """

    n_tokens: int
    avg_rank_clip: float
    avg_surprisal: float
    fault: str | None = None

    @property
    def invalid(self) -> str | None:
        """Why the trajectory has no ratio, or None."""
        if self.fault:
            return self.fault
        if self.n_tokens == 0:
            return "no scored tokens"
        if math.isnan(self.avg_surprisal):
            return "the student's logits are NaN"
        if self.avg_surprisal < MIN_SURPRISAL:
            return f"mean surprisal {self.avg_surprisal:.1e} is below {MIN_SURPRISAL}: memorised"
        return None if math.isfinite(self.avg_surprisal) else "a token of probability zero"

    @property
    def rsr(self) -> float:
        """The ratio; NaN when it is invalid."""
        return math.nan if self.invalid else self.avg_rank_clip / self.avg_surprisal


@dataclass(frozen=True)
class DatasetRSR:
    """Rank-Surprisal Ratio of a set of trajectories.

    Attributes:
        n: Number of valid trajectories.
        n_invalid: Trajectories left out because they have no ratio.
        rsr: Ratio of the means of the per-trajectory averages (Eq. 9): what the paper ranks teachers by.
        simple_mean: Mean of the trajectories' own ratios.
        avg_rank_clip: Mean of the trajectories' mean clipped ranks.
        avg_surprisal: Mean of the trajectories' mean surprisals.
    """

    n: int
    n_invalid: int
    rsr: float
    simple_mean: float
    avg_rank_clip: float
    avg_surprisal: float


@dataclass(frozen=True)
class Certainty:
    """How sure a teacher's ratio is, by a bootstrap over problems.

    Attributes:
        low: Lower end of the 95% interval of the ratio; NaN with fewer than two problems.
        high: Its upper end.
        best_share: Share of the resamples in which no other teacher had a lower ratio.
    """

    low: float
    high: float
    best_share: float


def trajectory_rsr(stats: TokenStats, r_max: int = 100) -> RSRScore:
    """Return the ratio of one trajectory from its token statistics (arXiv 2601.14249, Eq. 7)."""
    if not len(stats.nll):
        return RSRScore(0, math.nan, math.nan)
    rank = stats.rank.clamp(max=r_max).double().mean().item()
    return RSRScore(len(stats.nll), rank, stats.nll.double().mean().item())


def dataset_rsr(scores: Sequence[RSRScore]) -> DatasetRSR:
    """Return the ratio of a set of trajectories (arXiv 2601.14249, Eq. 8-9).

    Every trajectory counts once, whatever its length: neither tokens nor ratios are pooled.
    """
    valid = [score for score in scores if not score.invalid]
    if not valid:
        return DatasetRSR(0, len(scores), math.nan, math.nan, math.nan, math.nan)
    rank = float(np.mean([score.avg_rank_clip for score in valid]))
    surprisal = float(np.mean([score.avg_surprisal for score in valid]))
    simple = float(np.mean([score.rsr for score in valid]))
    return DatasetRSR(len(valid), len(scores) - len(valid), rank / surprisal, simple, rank, surprisal)


def rank_teachers(scores_by_teacher: Mapping[str, Sequence[RSRScore]]) -> list[tuple[str, DatasetRSR]]:
    """Return the teachers with the ratio of their trajectories, the most suitable (lowest) first.

    A few hundred trajectories per teacher are enough (arXiv 2601.14249, section 5.2). Teachers without a valid
    trajectory come last.
    """
    ranked = [(teacher, dataset_rsr(scores)) for teacher, scores in scores_by_teacher.items()]
    return sorted(ranked, key=lambda item: (math.isnan(item[1].rsr), item[1].rsr, item[0]))


def bootstrap_teachers(
    problem_ids: Sequence[str], teachers: Sequence[str], scores: Sequence[RSRScore], seed: int
) -> dict[str, Certainty]:
    """Return how sure the ratio (Eq. 9) of each teacher is, from 1,000 resamples of the problems.

    Problems are resampled, the same ones for all teachers: trajectories of one problem are alike, and a hard problem
    is hard for every teacher, which cancels in the comparison.
    """
    rows = [i for i, score in enumerate(scores) if not score.invalid]
    names = sorted(set(teachers))
    problem_of = {problem: i for i, problem in enumerate(dict.fromkeys(problem_ids[i] for i in rows))}
    sums = np.zeros((3, len(problem_of), len(names)))  # rank, surprisal, trajectories
    for i in rows:
        at = problem_of[problem_ids[i]], names.index(teachers[i])
        sums[:, *at] += scores[i].avg_rank_clip, scores[i].avg_surprisal, 1
    drawn = _resampled_ratios(sums[0], sums[1], np.random.default_rng(seed))
    enough = (sums[2] > 0).sum(0) >= 2
    low, high = (np.full(len(names), math.nan) for _ in range(2))
    with_value = np.where(np.isnan(drawn), np.inf, drawn)
    best = (with_value == with_value.min(1, keepdims=True)) & np.isfinite(with_value)
    for t in np.flatnonzero(enough):
        low[t], high[t] = np.nanpercentile(drawn[:, t], (2.5, 97.5))
    return {name: Certainty(float(low[t]), float(high[t]), float(best[:, t].mean())) for t, name in enumerate(names)}


def _resampled_ratios(rank: np.ndarray, surprisal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return (draws, teachers) ratios of sums over resampled rows of (problems, teachers); NaN where none was drawn."""
    problems = len(rank)
    if not problems:
        return np.full((_DRAWS, rank.shape[1]), math.nan)
    drawn = []
    at_once = max(1, _DRAW_ELEMENTS // problems)
    for start in range(0, _DRAWS, at_once):
        size = min(at_once, _DRAWS - start)
        times = rng.multinomial(problems, np.full(problems, 1 / problems), size=size).astype(float)
        above, below = times @ rank, times @ surprisal
        drawn.append(np.divide(above, below, out=np.full_like(above, math.nan), where=below > 0))
    return np.concatenate(drawn)


def select_per_problem(
    problem_ids: Sequence[str], teachers: Sequence[str | None], ids: Sequence[str], ratios: Sequence[float | None]
) -> list[int]:
    """Return the indices of the rows with the lowest ratio of their problem, in order (arXiv 2601.14249, section 5.1).

    Ties go to the teacher, then the id, that sorts first. Rows whose ratio is None or NaN are no candidates.
    """
    best: dict[str, tuple[float, str, str, int]] = {}
    for i, (problem, teacher, key, ratio) in enumerate(zip(problem_ids, teachers, ids, ratios, strict=True)):
        if ratio is None or math.isnan(ratio):
            continue
        candidate = (ratio, teacher or "", key, i)
        best[problem] = min(best.get(problem, candidate), candidate)
    return sorted(candidate[3] for candidate in best.values())


def sample_teachers(
    problem_ids: Sequence[str], teachers: Sequence[str], ids: Sequence[str], per_teacher: int, seed: int
) -> list[int]:
    """Return the rows, in order, of at most `per_teacher` trajectories of each teacher, on the same problems.

    Problems come in one random order for all teachers, so that what is compared are teachers and not problems.
    """
    problems = sorted(set(problem_ids))
    place = {problems[p]: i for i, p in enumerate(seeded_order(range(len(problems)), problems, seed, "rsr sample"))}
    taken: dict[str, int] = {}
    chosen = []
    for row in sorted(range(len(ids)), key=lambda row: (place[problem_ids[row]], ids[row])):
        if taken.get(teachers[row], 0) < per_teacher:
            taken[teachers[row]] = taken.get(teachers[row], 0) + 1
            chosen.append(row)
    return sorted(chosen)
