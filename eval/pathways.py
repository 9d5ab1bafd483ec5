"""How alike the ways of samples through a mixture of experts are, and how smooth (arXiv 2506.21551).

A sample's router probabilities are averaged over its tokens; its pathway is the top k experts of each layer, sorted by
weight, each tagged with its layer. The paper does not say how tokens become a sample: this is our reading.

    distance     mean Levenshtein distance of two pathways, divided by their length: 0 the same, 1 nothing shared
    consistency  mean over layers of cos(e_l, e_{l+1}),  e_l = sum_j w_lj W_l[j] over the top k, W_l the router's rows
"""

import itertools
from collections.abc import Sequence

import numpy as np


def pathway(probabilities: np.ndarray, top_k: int) -> np.ndarray:
    """Return the (layers * k,) symbols of a sample; of equal weights the lower expert comes first.

    Args:
        probabilities: (layers, experts), means over the sample's tokens.
        top_k: experts per token of the model.
    """
    chosen = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    return (chosen + np.arange(len(probabilities))[:, None] * probabilities.shape[1]).ravel()


def edit_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the Levenshtein distance of each pair, divided by the length.

    Args:
        first: (pairs, length) symbols.
        second: the same.
    """
    pairs, length = first.shape
    places = np.arange(length + 1)
    row = np.tile(places, (pairs, 1))
    for i in range(length):
        changed = np.empty_like(row)
        changed[:, 0] = i + 1
        changed[:, 1:] = np.minimum(row[:, 1:] + 1, row[:, :-1] + (first[:, i : i + 1] != second))
        # An insertion costs 1 for each step to the right: the least of all cells to the left, plus the way.
        row = np.minimum.accumulate(changed - places, axis=1) + places
    return row[:, -1] / length


def mean_distance(pathways: Sequence[np.ndarray], pairs: int, seed: int) -> float | None:
    """Return the mean distance of random pairs of different samples; None with fewer than two samples."""
    if len(pathways) < 2:
        return None
    rng, symbols = np.random.default_rng(seed), np.stack(pathways)
    one = rng.integers(0, len(symbols), pairs)
    other = (one + rng.integers(1, len(symbols), pairs)) % len(symbols)
    return float(edit_distances(symbols[one], symbols[other]).mean())


def consistency(probabilities: np.ndarray, embeddings: Sequence[np.ndarray], top_k: int) -> float | None:
    """Return the mean cosine of neighbouring layers' weighted experts; None for a single layer.

    Args:
        probabilities: (layers, experts), means over the sample's tokens.
        embeddings: of each layer, (experts, hidden): the rows of its router.
        top_k: experts per token of the model.
    """
    states = []
    for weights, rows in zip(probabilities, embeddings, strict=True):
        chosen = np.argsort(-weights, kind="stable")[:top_k]
        state = weights[chosen] @ rows[chosen]
        states.append(state / max(float(np.linalg.norm(state)), 1e-12))
    cosines = [float(one @ other) for one, other in itertools.pairwise(states)]
    return float(np.mean(cosines)) if cosines else None
