"""The losses of unlearning: pure functions, each one value per row, with its source, sign and normalisation.

Two rules hold for all of them:

- The result is one value per row. A trainer averages it over the rows of the *global* batch: that is the only
  denominator. Within a row tokens are summed or averaged, and `length_norm` says which. (Papers and their codes differ
  here, and so their betas do: a beta for summed log-probabilities is too small by about the answer's length for
  averaged ones.)
- Log-probabilities are at most 0, and minimising a loss makes the answer less likely. Other codebases work with the
  negative log-likelihood, so that their formulas show a minus where these show none, and the other way round.

Token tensors have shape (rows, seq - 1): position t holds the token at t + 1, as the model predicts it. `mask` is true
on answer tokens; what stands elsewhere is never read.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# What users of other codebases call a loss -> how to say it here.
ALIASES = {
    "GradAscent": "forget_loss: ga, retain_loss: none",
    "grad_ascent": "forget_loss: ga, retain_loss: none",
    "GradDiff": "forget_loss: ga, retain_loss: nll",
    "graddiff": "forget_loss: ga, retain_loss: nll",
    "grad_diff": "forget_loss: ga, retain_loss: nll",
    "ga_gdr": "forget_loss: ga, retain_loss: nll",
    "ga_klr": "forget_loss: ga, retain_loss: kl",
    "KL": "forget_loss: ga, retain_loss: kl",
    "NPO": "forget_loss: npo",
    "npo_grad_diff": "forget_loss: npo, retain_loss: nll",
    "npo_gdr": "forget_loss: npo, retain_loss: nll",
    "npo_klr": "forget_loss: npo, retain_loss: kl",
    "npo_KL": "forget_loss: npo, retain_loss: kl",
    "SimNPO": "forget_loss: simnpo",
    "simnpo_grad_diff": "forget_loss: simnpo, retain_loss: nll",
    "DPO": "forget_loss: dpo",
    "IdkDPO": "forget_loss: dpo, with `alternatives` a file of refusals",
    "idk": "forget_loss: dpo, with `alternatives` a file of refusals",
    "AltPO": "forget_loss: dpo, with a column `alternative`",
    "RMU": "forget_loss: rmu",
    "WGA": "forget_loss: wga",
    "SatImp": "forget_loss: satimp",
    "UNDIAL": "forget_loss: undial",
    "CEU": "forget_loss: ceu",
    "CE-U": "forget_loss: ceu",
}


def reduce_tokens(values: Tensor, mask: Tensor, length_norm: str) -> Tensor:
    """Sum ("sum") or average ("mean") values over the answer tokens of each row.

    Denominator of "mean": the row's own answer tokens, at least 1.

    Args:
        values: (rows, tokens).
        mask: (rows, tokens), true on answer tokens.
        length_norm: "sum" or "mean".

    Returns:
        (rows,).
    """
    total = values.masked_fill(~mask, 0).sum(1)
    return total / mask.sum(1).clamp(min=1) if length_norm == "mean" else total


def npo_loss(log_prob: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Negative preference optimisation: -(2 / beta) log sigmoid(-beta (log pi - log pi_ref)) (arXiv 2404.05868).

    At the reference it is (2 / beta) ln 2, and its gradient is that of gradient ascent on the same log-probability;
    further away that gradient is multiplied by 2 pi^beta / (pi^beta + pi_ref^beta), which fades as the answer is
    forgotten.

    Args:
        log_prob: (rows,) log-probability of the answer; summed over its tokens in the paper.
        reference: (rows,) the same of the model that unlearning started from.
        beta: inverse temperature.

    Returns:
        (rows,).
    """
    return -2 / beta * logsigmoid(-beta * (log_prob - reference))


def simnpo_loss(log_prob: Tensor, beta: float, margin: float = 0.0) -> Tensor:
    """SimNPO: -(2 / beta) log sigmoid(-beta (log pi + margin)) (arXiv 2410.07163, and its released code).

    The paper writes -(beta / |y|) log pi - gamma inside the sigmoid: gamma = beta * margin. All its published runs have
    margin 0. Its gradient is gradient ascent's times 2 p^beta / (1 + p^beta), p being the probability per token.

    Args:
        log_prob: (rows,) log-probability of the answer; averaged over its tokens in the paper.
        beta: inverse temperature.
        margin: reward margin, in nats of `log_prob`.

    Returns:
        (rows,).
    """
    return -2 / beta * logsigmoid(-beta * (log_prob + margin))


def dpo_loss(
    log_prob: Tensor, reference: Tensor, alternative: Tensor, alternative_reference: Tensor, beta: float
) -> Tensor:
    """DPO that prefers an alternative answer ("I don't know") to the one to be forgotten (arXiv 2404.05868, baselines).

    -(2 / beta) log sigmoid(beta ((log pi - log pi_ref)(alternative) - (log pi - log pi_ref)(answer))); the factor 2 /
    beta, which DPO itself has not, makes it comparable with NPO.

    Args:
        log_prob: (rows,) log-probability of the answer to be forgotten, summed over its tokens in the paper.
        reference: (rows,) the same of the start model.
        alternative: (rows,) log-probability of the preferred answer.
        alternative_reference: (rows,) the same of the start model.
        beta: inverse temperature.

    Returns:
        (rows,).
    """
    return -2 / beta * logsigmoid(beta * ((alternative - alternative_reference) - (log_prob - reference)))


def wga_tokens(log_probs: Tensor, beta: float) -> Tensor:
    """Weighted gradient ascent, per token: p^beta log p, the weight without a gradient (arXiv 2502.19301, WGA).

    beta 0 is gradient ascent. Tokens that are forgotten already weigh little.

    Args:
        log_probs: (rows, tokens).
        beta: exponent of the token's probability.

    Returns:
        (rows, tokens).
    """
    return (beta * log_probs.detach()).exp() * log_probs


def satimp_tokens(log_probs: Tensor, beta: float, beta2: float) -> Tensor:
    """SatImp, per token: p^beta (1 - p)^beta2 log p, the weight without a gradient (arXiv 2505.11953, released code).

    Both exponents 0 is gradient ascent.

    Args:
        log_probs: (rows, tokens).
        beta: exponent of the token's probability (saturation).
        beta2: exponent of what is left of it (importance).

    Returns:
        (rows, tokens).
    """
    p = log_probs.detach().exp()
    return p**beta * (1 - p) ** beta2 * log_probs


def undial_tokens(logits: Tensor, reference_logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    """UNDIAL, per token: cross-entropy to the start model's distribution with the true token's logit lowered by beta.

    arXiv 2402.10052. The released code lowers an arbitrary token's logit at masked positions and averages over
    them too; here only answer positions are given.

    Args:
        logits: (tokens, vocabulary) of answer positions.
        reference_logits: (tokens, vocabulary) of the start model.
        labels: (tokens,) the answer tokens.
        beta: how much their logits are lowered.

    Returns:
        (tokens,).
    """
    lowered = reference_logits.scatter_add(1, labels[:, None], torch.full_like(reference_logits[:, :1], -beta))
    return -(lowered.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def ceu_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """CE-U, per token: cross-entropy to the model's own distribution without the true token (arXiv 2503.01224).

    Args:
        logits: (tokens, vocabulary) of answer positions.
        labels: (tokens,) the answer tokens.

    Returns:
        (tokens,).
    """
    target = logits.detach().scatter(1, labels[:, None], -torch.inf).softmax(-1)
    return -(target * logits.log_softmax(-1)).sum(-1)


def kl_tokens(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(reference || model), per token: what keeps the model's distribution on retain rows.

    Args:
        logits: (tokens, vocabulary) of answer positions.
        reference_logits: (tokens, vocabulary) of the start model.

    Returns:
        (tokens,).
    """
    reference = reference_logits.log_softmax(-1)
    return (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1)


def rmu_loss(hidden: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared distance of hidden states to a target, over the answer tokens of each row (arXiv 2403.03218, RMU).

    To forget, `target` is the control vector; to retain, the start model's hidden states. The released code's
    broadcasting weighs rows by each other's lengths as soon as these differ.

    Args:
        hidden: (rows, seq, width).
        target: (width,) or (rows, seq, width).
        mask: (rows, seq), true on answer tokens (unshifted: a token's own hidden state).

    Returns:
        (rows,).
    """
    return reduce_tokens((hidden - target).square().mean(-1), mask, "mean")


def control_vector(width: int, coefficient: float, seed: int) -> Tensor:
    """RMU's target: a vector of length `coefficient` and a random direction, all of whose entries are positive.

    Uniform in [0, 1) as in the released code, but drawn from a seed, so that every process aims at the same one.

    Returns:
        (width,), float32.
    """
    u = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    return coefficient * u / u.norm()
