"""The mathematics of reinforcement learning from verifiable rewards: pure functions on tensors.

A generation batch is P prompts times G rollouts: rewards and token counts are (P, G). TRL's token-sum losses (`cispo`,
`dapo`, `vespo`) are linear in a positive factor of the advantage, so each choice below is one number per rollout that
multiplies its advantage: the losses themselves stay TRL's own.

The objective with the defaults is ScaleRL's (arXiv 2510.13786, its final objective):

    J = mean over kept prompts of 1/T_p sum_i sum_t sg(min(rho_it, eps)) A_i / std_batch(A) log pi(y_it)

T_p: the trained tokens of all rollouts of the prompt. A_i = r_i - mean of its group. Kept: groups with different
rewards. All means run over the global generation batch.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Update:
    """What a generation batch does to the policy.

    Attributes:
        advantages: (P, G), to be used in a sum over tokens that is divided by `tokens`.
        trained: (P, G) bool, rollouts whose tokens are in the update.
        tokens: the denominator, the number of trained tokens.
    """

    advantages: Tensor
    trained: Tensor
    tokens: int


def plan_update(
    rewards: Tensor,
    tokens: Tensor,
    masked: Tensor,
    scale: str = "batch",
    aggregation: str = "prompt",
    drop_zero_variance: bool = True,
) -> Update:
    """Decide which rollouts of a generation batch train, and with what advantage.

    Args:
        rewards: (P, G).
        tokens: (P, G), the model's own tokens of each rollout.
        masked: (P, G) bool, rollouts that leave the update and stay in their group's statistics: void turns (arXiv
            2509.02479, `mask_void_turns` of its code) and cut-off rollouts (arXiv 2510.13786).
        scale: what the centred rewards are divided by, see `scale_advantages`.
        aggregation: what the loss is a mean over, see `aggregation_factors`.
        drop_zero_variance: groups with equal rewards leave numerator and denominator (arXiv 2510.13786), instead of
            adding their tokens to the denominator only.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    kept = has_variance(rewards)
    trained = ~masked & (tokens > 0)
    if drop_zero_variance:
        trained &= kept[:, None]
    counted = torch.where(trained, tokens, 0)
    advantages = scale_advantages(centred, kept, scale) * aggregation_factors(counted, aggregation)
    return Update(torch.where(trained, advantages, 0), trained, int(counted.sum()))


def has_variance(rewards: Tensor) -> Tensor:
    """Say of each group whether its rewards differ: (P, G) -> (P,) bool. Equal ones have nothing to teach."""
    return rewards.amax(1) > rewards.amin(1)


def scale_advantages(centred: Tensor, kept: Tensor, scale: str) -> Tensor:
    """Divide centred rewards by their deviation. Population deviations, without an epsilon (both are our choice).

    "batch": A / sqrt(mean of A^2 over all rollouts of the kept groups) (arXiv 2510.13786, A_i / std_batch(A)). TRL's
             own divides by the deviation of the rewards, which the differences between prompts dominate.
    "group": A / sqrt(mean of A^2 over the group)                       (arXiv 2402.03300)
    "none":  A                                                          (arXiv 2503.20783)

    Args:
        centred: (P, G).
        kept: (P,) bool, groups with variance; the others' advantages are 0.
        scale: "batch", "group" or "none".
    """
    if scale == "none" or not kept.any():
        return centred
    deviation = centred[kept].square().mean().sqrt()
    if scale == "group":
        deviation = torch.where(kept, centred.square().mean(1).sqrt(), 1)[:, None]
    return centred / deviation


def aggregation_factors(tokens: Tensor, aggregation: str) -> Tensor:
    """Factor of each rollout that turns a mean over all trained tokens into the wanted mean.

    "prompt": N / (P_eff T_p), the mean over prompts of the mean over the prompt's tokens (arXiv 2510.13786).
    "token":  1, the mean over all tokens (arXiv 2503.14476).

    N: trained tokens of the batch; T_p: of the prompt; P_eff: prompts that have any.

    Args:
        tokens: (P, G), trained tokens.
        aggregation: "prompt" or "token".

    Returns:
        (P, 1), or (1, 1) for "token".
    """
    if aggregation == "token":
        return torch.ones(1, 1, device=tokens.device)
    of_prompt = tokens.sum(1, keepdim=True)
    prompts = (of_prompt > 0).sum().clamp(min=1)
    return of_prompt.sum() / (prompts * of_prompt.clamp(min=1))


def call_penalties(calls: np.ndarray, failed: np.ndarray, answers: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """How badly a right rollout went, p_err + p_format of GRPO-RoC (arXiv 2508.20722).

    p_err = 0.5 without a call, else failed calls / calls.
    p_format = 1 without an answer, else min(1, (answers - 1) / turns).

    Args:
        calls: (n,) tool calls of each rollout.
        failed: (n,) calls of them that failed.
        answers: (n,) times that it gave a final answer.
        turns: (n,) assistant turns.
    """
    p_err = np.where(calls == 0, 0.5, failed / np.maximum(calls, 1))
    p_format = np.where(answers == 0, 1.0, np.minimum(1.0, np.maximum(answers - 1, 0) / np.maximum(turns, 1)))
    return p_err + p_format


def resample_on_correct(
    correct: np.ndarray, penalties: np.ndarray, keep: int, generator: np.random.Generator
) -> list[int]:
    """Choose `keep` of a prompt's oversampled rollouts (GRPO-RoC, arXiv 2508.20722): clean ones among the right ones.

    Half of the wrong ones at random, and half of the right ones with a probability inversely proportional to their
    penalty. Our choices where the paper is silent: a penalty of 0 counts as `1e-3`; of an odd number of wrong ones the
    half is rounded up (a failure is what a group rarely has too many of); draws are without replacement.

    Args:
        correct: (n,) bool.
        penalties: (n,), of `call_penalties`; only those of right rollouts count.
        keep: rollouts to keep, at most n and at least half of them.
        generator: of the draws.

    Returns:
        Indices of the chosen ones, ascending.
    """
    right, wrong = np.flatnonzero(correct), np.flatnonzero(~correct)
    of_wrong = max(-(-len(wrong) * keep // len(correct)), keep - len(right))
    of_wrong = min(of_wrong, len(wrong), keep)
    chance = 1 / np.maximum(penalties[right], 1e-3)
    chosen = [*generator.choice(wrong, of_wrong, replace=False)] if of_wrong else []
    if keep > of_wrong:
        chosen += [*generator.choice(right, keep - of_wrong, replace=False, p=chance / chance.sum())]
    return sorted(int(index) for index in chosen)
