"""Six membership-inference attacks: can the forget set be told from text that was never trained on?

Every score is oriented alike: higher means LESS likely to have been trained on. So with held-out texts as positives an
AUC of 1 says that the forget set is recognised as training data, 0.5 that it cannot be told apart, and towards 0 that
it looks less familiar than text the model never saw (over-unlearned).
"""

import math
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from ..core.errors import DataError
from .uncertainty import LEVEL, Interval

if TYPE_CHECKING:
    import torch

ATTACKS = ("loss", "zlib", "min_k", "min_k++", "reference", "gradnorm")
SHARE = 0.4  # of the tokens that Min-K% and Min-K%++ look at: MUSE's and open-unlearning's k = 40%


def zlib_score(mean_nll: float, text: str) -> float:
    """Mean NLL over the length in bytes of the compressed text (2012.07805): familiar though not repetitive."""
    return mean_nll / len(zlib.compress(text.encode()))


def min_k_score(nll: Sequence[float] | np.ndarray, share: float = SHARE) -> float:
    """Mean NLL of the least likely tokens, Min-K% (2310.16789). Denominator: max(1, floor(share * tokens)) tokens."""
    return _mean_of_largest(np.asarray(nll, dtype=float), share)


def min_k_plus_score(
    nll: Sequence[float] | np.ndarray,
    entropy: Sequence[float] | np.ndarray,
    varentropy: Sequence[float] | np.ndarray,
    share: float = SHARE,
) -> float:
    """Min-K%++ (2404.02936): Min-K% of NLLs standardised by what the model expects at each position.

    z = (-log p(x_t) - H) / sigma, with H the entropy and sigma^2 the variance of -log p under the predicted
    distribution; the paper's (log p - mu) / sigma with the sign turned.

    Args:
        nll: (tokens,) -log p of the true tokens.
        entropy: (tokens,) of the predicted distributions, in nats.
        varentropy: (tokens,) variance of -log p under them.
        share: of the tokens that count.
    """
    deviation = np.sqrt(np.maximum(np.asarray(varentropy, dtype=float), 1e-6))
    return _mean_of_largest((np.asarray(nll, dtype=float) - np.asarray(entropy, dtype=float)) / deviation, share)


def _mean_of_largest(values: np.ndarray, share: float) -> float:
    if not len(values):
        raise DataError("a text without tokens cannot be attacked: is it empty?")
    return float(np.sort(values)[::-1][: max(1, int(share * len(values)))].mean())


def gradient_norm(model: Any, input_ids: "torch.Tensor", labels: "torch.Tensor") -> float:
    """Mean over parameter tensors of the gradient's L2 norm for one text: small where the model fits it already.

    Args:
        model: a causal language model whose parameters require gradients; its own gradients are cleared.
        input_ids: (tokens,).
        labels: (tokens,), -100 where no loss is taken; the loss is the mean over the others.
    """
    model.zero_grad(set_to_none=True)
    model(input_ids=input_ids[None], labels=labels[None], use_cache=False).loss.backward()
    norms = [float(p.grad.detach().float().norm()) for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return float(np.mean(norms))


def auc(forget: Sequence[float] | np.ndarray, holdout: Sequence[float] | np.ndarray) -> Interval:
    """Probability that a held-out text scores above a forget text, ties counted half, with a 95% interval.

    DeLong's variance (1988) on the logit scale, which stays within [0, 1]. Where all pairs agree the variance is 0, and
    the bound is what the smaller group could hide, 1 - 0.05^(1/n).

    Raises:
        DataError: one of the groups is empty.
    """
    members, others = np.asarray(forget, dtype=float), np.asarray(holdout, dtype=float)
    if not len(members) or not len(others):
        raise DataError("an attack needs forget texts and held-out texts; one of the two sets is empty")
    together = stats.rankdata(np.concatenate([members, others]))
    # Placements: for each text, the share of the other group that it stands above (others) or below (members).
    above = (together[len(members) :] - stats.rankdata(others)) / len(members)
    below = 1 - (together[: len(members)] - stats.rankdata(members)) / len(others)
    value = float(above.mean())
    smaller = min(len(members), len(others))
    if smaller < 2:
        return Interval(value, 0.0, 1.0, "one text says nothing about others")
    variance = float(above.var(ddof=1) / len(others) + below.var(ddof=1) / len(members))
    unseen = 1 - (1 - LEVEL) ** (1 / smaller)
    if variance < 1e-12 or not 0 < value < 1:
        return Interval(value, max(0.0, value - unseen), min(1.0, value + unseen), "no pair disagrees")
    centre = math.log(value / (1 - value))
    half = float(stats.norm.ppf(0.5 + LEVEL / 2)) * math.sqrt(variance) / (value * (1 - value))
    low, high = (1 / (1 + math.exp(-min(max(x, -700.0), 700.0))) for x in (centre - half, centre + half))
    return Interval(value, low, high, "DeLong, logit")
