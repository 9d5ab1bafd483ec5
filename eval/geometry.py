"""How many directions a model's representations use: RankMe and alpha-ReQ, each in both definitions.

    RankMe    exp(-sum_i p_i ln p_i),  p_i = s_i / sum_j s_j
    alpha     minus the slope of ln s_i over ln i

`cov`: s are the eigenvalues of the centred covariance (arXiv 2509.23024); `sv`: s are the singular values of the
features as they are, with 1e-7 added to each p_i (RankMe's own definition, arXiv 2210.02885). RankMe_sv is the larger.
Features are one vector per sequence: the last layer's state of one token. Only a d x d matrix in float64 is kept.
RankMe is at most min(M - 1, d): numbers of different M or d do not compare.
"""

from typing import Any

import torch
from torch import Tensor

FIRST_RANK, LAST_RANK = 11, 500
"""Ranks of alpha's line, the last one at most d / 2: head and tail are no power law. The paper's range is not known."""
FEWEST_RANKS = 8
EPSILON = 1e-7


class RunningCovariance:
    """Mean and scatter of features that come batch by batch (Chan et al. 1979), in float64 on the CPU."""

    def __init__(self, dimensions: int):
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64)
        self.scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Take in (m, d) features."""
        batch = features.detach().to("cpu", torch.float64)
        if not len(batch):
            return
        mean = batch.mean(0)
        centred, shift = batch - mean, mean - self.mean
        total = self.count + len(batch)
        self.scatter += centred.T @ centred + torch.outer(shift, shift) * (self.count * len(batch) / total)
        self.mean += shift * (len(batch) / total)
        self.count = total

    def covariance_spectrum(self) -> Tensor:
        """Return (d,) eigenvalues of the centred covariance, the largest first."""
        values = torch.linalg.eigvalsh(self.scatter / max(self.count - 1, 1))
        return values.flip(0).clamp(min=0)

    def singular_values(self) -> Tensor:
        """Return (d,) singular values of the features, not centred, the largest first."""
        moment = self.scatter + self.count * torch.outer(self.mean, self.mean)
        return torch.linalg.eigvalsh(moment).flip(0).clamp(min=0).sqrt()


def rank_me(values: Tensor, epsilon: float = 0.0) -> float:
    """Return the effective rank of a spectrum: 1 where one value is all, d where all d are alike. NaN without any."""
    if not values.sum() > 0:
        return float("nan")
    p = values / values.sum() + epsilon
    return float(torch.exp(-torch.xlogy(p, p).sum()))


def alpha_req(values: Tensor, most: int) -> float | None:
    """Return the exponent of a spectrum s_i ~ i^-alpha by least squares over ranks; None where too few are left.

    Args:
        values: (d,), the largest first.
        most: rank of the features, min(M - 1, d): what follows is rounding.
    """
    last = min(LAST_RANK, len(values) // 2, most)
    if last - FIRST_RANK + 1 < FEWEST_RANKS or values[last - 1] <= 1e-12 * values[0]:
        return None
    x = torch.arange(FIRST_RANK, last + 1, dtype=torch.float64).log()
    y = values[FIRST_RANK - 1 : last].log()
    x = x - x.mean()
    return float(-(x @ y) / (x @ x))


def describe_geometry(covariance: RunningCovariance) -> dict[str, Any]:
    """Return `sequences`, `dimensions`, whether there are `enough` (4 d) sequences, and the four numbers."""
    count, d = covariance.count, len(covariance.mean)
    eigenvalues, singular = covariance.covariance_spectrum(), covariance.singular_values()
    rank = min(count - 1, d)
    return {
        "sequences": count,
        "dimensions": d,
        "enough": count >= 4 * d,
        "rankme_cov": rank_me(eigenvalues),
        "rankme_sv": rank_me(singular, EPSILON),
        "alpha_cov": alpha_req(eigenvalues, rank),
        "alpha_sv": alpha_req(singular, rank),
    }
