"""Eighty numbers of one pass over expert trajectories that may foretell accuracy (arXiv 2605.18607).

Ten statistics m of each expert token y, eight weights w of it: sum(w m) / sum(w) over a sequence's last 1,000 tokens,
then the mean over sequences. The paper does not give the Gaussian kernel; exp(-(nll - mu)^2 / (2 sd^2)) with mean and
deviation over the set is our reading, as is the floor under what is inverted.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from ..core.errors import DataError

# What a report shows of a checkpoint, of all that is measured.
SHOWN = ("rankme_cov", "rankme_sv", "alpha_cov", "alpha_sv", "nll/uniform", "top1/inverse_frequency",
         "top5/frequency", "pathway_distance", "pathway_consistency")  # fmt: skip

LAST_TOKENS = 1000
METRICS = (
    "nll", "top1", "top2", "top3", "top5", "entropy", "rank", "reciprocal_rank", "margin", "wrong_confidence",
)  # fmt: skip
WEIGHTS = (
    "uniform", "probability", "one_minus_probability", "entropy", "inverse_entropy", "frequency", "inverse_frequency",
    "gaussian_nll",
)  # fmt: skip
NAMES = tuple(f"{metric}/{weight}" for metric in METRICS for weight in WEIGHTS)
FLOOR = 1e-3
"""Least normalised entropy that is inverted: a sure token must not outweigh all others."""


@dataclass(frozen=True)
class ExpertTokens:
    """Scored tokens of one sequence, (n,) each: ids, NLL and entropy in nats, rank from 1, largest probability."""

    ids: np.ndarray
    nll: np.ndarray
    entropy: np.ndarray
    rank: np.ndarray
    confidence: np.ndarray


def token_metrics(tokens: ExpertTokens, vocabulary: int) -> np.ndarray:
    """Return (10, n), the statistics of each token in the order of `METRICS`."""
    hits = [tokens.rank <= k for k in (1, 2, 3, 5)]
    return np.stack(
        [
            tokens.nll, *hits, tokens.entropy / np.log(vocabulary), tokens.rank, 1 / tokens.rank,
            tokens.confidence - np.exp(-tokens.nll), np.where(tokens.rank > 1, tokens.confidence, 0),
        ]
    ).astype(float)  # fmt: skip


def token_weights(tokens: ExpertTokens, vocabulary: int, frequency: np.ndarray, mean: float, sd: float) -> np.ndarray:
    """Return (8, n), the weights of each token in the order of `WEIGHTS`.

    Args:
        tokens: of one sequence.
        vocabulary: its size.
        frequency: (n,) share of each token among all of the set.
        mean: of NLL over the set.
        sd: its standard deviation.
    """
    p, entropy = np.exp(-tokens.nll), tokens.entropy / np.log(vocabulary)
    kernel = np.exp(-0.5 * ((tokens.nll - mean) / max(sd, 1e-12)) ** 2)
    return np.stack(
        [
            np.ones_like(p), p, 1 - p, entropy, 1 / np.maximum(entropy, FLOOR), frequency, 1 / frequency, kernel,
        ]
    ).astype(float)  # fmt: skip


def proxy_metrics(sequences: Sequence[ExpertTokens], vocabulary: int) -> dict[str, float]:
    """Return the eighty proxies as `metric/weight` -> value.

    A weighting that is zero on all tokens of a sequence (a model that is sure of everything) counts them alike.

    Args:
        sequences: the last `LAST_TOKENS` tokens of each, at least one.
        vocabulary: size of the model's vocabulary.

    Raises:
        DataError: there is no token.
    """
    sequences = [tokens for tokens in sequences if len(tokens.ids)]
    if not sequences:
        raise DataError("no expert token was scored: the trajectories are empty")
    counts = Counter(np.concatenate([tokens.ids for tokens in sequences]).tolist())
    total = sum(counts.values())
    nll = np.concatenate([tokens.nll for tokens in sequences]).astype(float)
    found = np.zeros((len(METRICS), len(WEIGHTS)))
    for tokens in sequences:
        frequency = np.array([counts[token] / total for token in tokens.ids.tolist()])
        weights = token_weights(tokens, vocabulary, frequency, float(nll.mean()), float(nll.std()))
        weights = np.maximum(weights, np.finfo(float).tiny)
        found += token_metrics(tokens, vocabulary) @ (weights / weights.sum(1, keepdims=True)).T
    return dict(zip(NAMES, (found / len(sequences)).ravel().tolist(), strict=True))


def choose_proxy(proxies: Mapping[str, Sequence[float]], held_in: Mapping[str, Sequence[float]]) -> tuple[str, float]:
    """Choose a proxy by its mean Spearman correlation with accuracies of held-in tasks, never the target's.

    Args:
        proxies: name -> its value for each model.
        held_in: task -> accuracy of each model.

    Returns:
        Name and mean correlation of the proxy whose correlation is furthest from 0; the first of equal ones.

    Raises:
        DataError: fewer than three models, or no task.
    """
    models = {len(values) for values in (*proxies.values(), *held_in.values())}
    if len(models) != 1 or min(models) < 3 or not held_in:
        raise DataError("a proxy is chosen on at least one held-in task and three models, the same for all")

    def correlation(values: Sequence[float]) -> float:
        if len(set(values)) < 2:
            return 0.0
        found: list[Any] = [stats.spearmanr(values, task)[0] for task in held_in.values() if len(set(task)) > 1]
        return float(np.mean(found)) if found else 0.0

    of = {name: correlation(values) for name, values in proxies.items()}
    best = max(of, key=lambda name: abs(of[name]))
    return best, of[best]
