"""The mathematics of the trainers: pure functions on tensors, each with its source, shapes and denominator.

Token tensors have shape (batch, seq - 1): position t holds the token at t + 1, as the model predicts it.
`segments` says to which sample of the batch each position belongs, so that one form serves padded rows (a row is a
sample) and packed rows (a row holds several).
"""

import torch
from torch import Tensor


def sample_nll(log_probs: Tensor, label_mask: Tensor, segments: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood of each sample: l_i = -sum_k log p(y_ik) / T_i (arXiv 2601.04992, per-sample loss).

    Denominator: T_i, the trained tokens of the sample itself.

    Args:
        log_probs: (batch, seq - 1), zero where not trained.
        label_mask: (batch, seq - 1), true where trained.
        segments: (batch, seq - 1), index in 0..num_samples-1 of each position's sample.
        num_samples: samples in the batch.

    Returns:
        Loss (num_samples,) in float32, 0 for a sample without trained tokens, and T (num_samples,).
    """
    # In float64 the order of the additions does not show in the float32 result: padded equals packed, and a GPU's
    # atomic additions are reproducible.
    zeros = torch.zeros(num_samples, dtype=torch.float64, device=log_probs.device)
    where = segments.reshape(-1)
    nll = zeros.index_add(0, where, -log_probs.detach().reshape(-1).double())
    tokens = zeros.index_add(0, where, label_mask.reshape(-1).double())
    return (nll / tokens.clamp(min=1)).float(), tokens.float()


def token_factors(
    weights: Tensor, tokens: Tensor, segments: Tensor, reduction: str, token_weights: Tensor | None = None
) -> Tensor:
    """Factor of each token's NLL that turns a sum over tokens into the weighted loss.

    "token":  sum_i w_i sum_k v_ik nll_ik,             to be divided by the trained tokens of the global batch.
    "sample": sum_i w_i sum_k v_ik nll_ik / sum_k v_ik, to be divided by the samples of the global batch: with all
    v_ik = 1 this is sum_i w_i l_i (arXiv 2601.04992, its code). So a v that is the same for all tokens of a sample
    changes nothing in "sample": it says how the tokens share the sample's loss, and w_i how much that loss counts.

    Args:
        weights: (samples,), w_i.
        tokens: (samples,), T_i, the trained tokens.
        segments: (batch, seq - 1), index of each position's sample.
        reduction: "token" or "sample".
        token_weights: (batch, seq - 1), v_ik, zero where not trained; None is 1 for every trained token.

    Returns:
        (batch, seq - 1): w_i v_ik, or w_i v_ik / sum_k v_ik.
    """
    if reduction == "sample":
        if token_weights is not None:
            zeros = torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
            sums = zeros.index_add(0, segments.reshape(-1), token_weights.reshape(-1).double()).float()
            weights = weights / torch.where(sums > 0, sums, 1)
        else:
            weights = weights / tokens.clamp(min=1)
    return weights[segments] if token_weights is None else weights[segments] * token_weights


def glow_weight(
    previous_loss: Tensor,
    current_loss: Tensor,
    alpha: float = 1.0,
    beta: float = 20.0,
    form: str = "scaled",
    w_min: float | None = 0.5,
    w_max: float | None = 5.0,
) -> Tensor:
    """Weight of each sample by its gain since the previous epoch: what improves least weighs most (arXiv 2601.04992).

    gain = previous_loss - current_loss

    "scaled":   w = alpha (1 - sigmoid(beta gain))      the authors' released code
    "one_plus": w = 1 + alpha (1 - sigmoid(beta gain))  there too, commented out

    then clamped to [w_min, w_max]. Denominator: none, the weights are not normalised here.

    Args:
        previous_loss: (samples,), NaN for a sample that was not seen before: its weight is 1, as in its first epoch.
        current_loss: (samples,).
        alpha: height of the sigmoid.
        beta: its steepness, in 1 / nats.
        form: "scaled" or "one_plus".
        w_min: smallest weight; None is no limit.
        w_max: largest weight; None is no limit.

    Returns:
        (samples,), without a gradient.
    """
    lag = alpha * torch.sigmoid(-beta * (previous_loss - current_loss).detach())  # 1 - sigmoid(x) = sigmoid(-x)
    weight = lag if form == "scaled" else 1 + lag
    if w_min is not None or w_max is not None:
        weight = weight.clamp(w_min, w_max)
    return torch.where(previous_loss.isnan(), torch.ones_like(weight), weight)


def drop_penalty_slope(past_loss: Tensor, current_loss: Tensor, strength: float, margin: float) -> Tensor:
    """Weight that stands for a penalty on losses that fall suddenly; the gradient of the penalty is exact.

    R = strength * mean_i relu(past_i - l_i - margin)

    where past_i is the loss some epochs ago. R is linear in l_i wherever its slope is not 0, so its gradient is that of
    a weighted loss with weight -strength on the samples that fell by more than the margin. Denominator: the samples of
    the global batch. This is our scalar reading of the trajectory loss of SAF (arXiv 2205.14083), which compares whole
    output distributions; those of a language model cannot be stored.

    Args:
        past_loss: (samples,), NaN for a sample that was not seen then: it is not penalised.
        current_loss: (samples,).
        strength: lambda.
        margin: fall in nats per token that costs nothing.

    Returns:
        (samples,): -strength or 0, without a gradient.
    """
    return -strength * (past_loss - current_loss > margin).to(current_loss)  # false for NaN
