import numpy as np
import pytest
import torch

from afterglow.trainers.rl_losses import (
    aggregation_factors,
    call_penalties,
    has_variance,
    plan_update,
    resample_on_correct,
    scale_advantages,
)

NOTHING = torch.zeros(3, 2, dtype=torch.bool)
REWARDS = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
TOKENS = torch.tensor([[2, 6], [5, 5], [1, 1]])


def test_scalerl_by_hand():
    update = plan_update(REWARDS, TOKENS, NOTHING)
    # Kept: prompts 0 and 2; centred +-0.5, deviation 0.5. N = 10, T = (8, 2): factors 10 / (2 * 8), 10 / (2 * 2).
    assert update.tokens == 10
    assert update.trained.tolist() == [[True, True], [False, False], [True, True]]
    assert torch.allclose(update.advantages, torch.tensor([[0.625, -0.625], [0, 0], [-2.5, 2.5]]))


def test_prompts_weigh_the_same_whatever_their_length():
    update = plan_update(REWARDS, TOKENS, NOTHING)
    weight = (update.advantages.abs() * TOKENS).sum(1) / update.tokens
    assert weight.tolist() == pytest.approx([0.5, 0, 0.5])


def test_groups_without_variance_change_neither_advantages_nor_denominator():
    with_them = plan_update(REWARDS, TOKENS, NOTHING)
    without = plan_update(REWARDS[[0, 2]], TOKENS[[0, 2]], NOTHING[:2])
    assert torch.equal(with_them.advantages[[0, 2]], without.advantages)
    assert with_them.tokens == without.tokens
    assert plan_update(REWARDS, TOKENS, NOTHING, drop_zero_variance=False).tokens == 20


def test_masked_rollouts_stay_in_the_statistics_and_leave_the_update():
    masked = torch.tensor([[False, True], [False, False], [False, False]])
    update = plan_update(REWARDS, TOKENS, masked, scale="none", aggregation="token")
    assert update.advantages.tolist() == [[0.5, 0], [0, 0], [-0.5, 0.5]]  # 0.5: the mean still counts the masked one
    assert update.tokens == 4
    everything = plan_update(REWARDS, TOKENS, ~NOTHING)
    assert everything.tokens == 0
    assert not everything.advantages.any()


def test_a_batch_without_any_variance_is_no_update_and_no_nan():
    update = plan_update(torch.ones(3, 2), TOKENS, NOTHING)
    assert (update.tokens, update.advantages.abs().sum()) == (0, 0)


def test_scales():
    centred = torch.tensor([[0.5, -0.5], [0.0, 0.0], [0.1, -0.1]])
    kept = torch.tensor([True, False, True])
    deviation = ((0.25 + 0.25 + 0.01 + 0.01) / 4) ** 0.5
    assert torch.allclose(scale_advantages(centred, kept, "batch"), centred / deviation)
    assert torch.allclose(scale_advantages(centred, kept, "group"), torch.tensor([[1.0, -1], [0, 0], [1, -1]]))
    assert torch.equal(scale_advantages(centred, kept, "none"), centred)


def test_batch_scale_does_not_depend_on_how_hard_the_prompts_are():
    """TRL divides by the deviation of the rewards: shifting one prompt's rewards changes every advantage."""
    shifted = REWARDS + torch.tensor([[0.0], [0.0], [7.0]])
    assert torch.allclose(
        plan_update(REWARDS, TOKENS, NOTHING).advantages, plan_update(shifted, TOKENS, NOTHING).advantages
    )


def test_variance_and_factors():
    assert has_variance(REWARDS).tolist() == [True, False, True]
    assert aggregation_factors(TOKENS, "token").tolist() == [[1.0]]
    # 20 tokens, of 8, 10 and 2: a prompt without trained tokens counts in no mean
    assert aggregation_factors(TOKENS, "prompt").flatten().tolist() == pytest.approx([20 / 24, 20 / 30, 20 / 6])
    assert aggregation_factors(torch.tensor([[3, 0], [0, 0]]), "prompt")[0].item() == 1


def test_penalties_of_rstar2():
    calls, failed, answers, turns = np.array([0, 4, 2, 2]), np.array([0, 1, 0, 2]), np.array([1, 1, 0, 4]), np.array([
        1, 5, 3, 4
    ])  # fmt: skip
    assert call_penalties(calls, failed, answers, turns).tolist() == [0.5, 0.25, 1.0, 1.75]


def test_resample_keeps_half_of_each_kind():
    correct = np.array([True, True, True, True, False, False, False, False])
    chosen = resample_on_correct(correct, np.ones(8), 4, np.random.default_rng(0))
    assert len(chosen) == len(set(chosen)) == 4
    assert correct[chosen].sum() == 2


@pytest.mark.parametrize("right", range(9))
def test_resample_always_keeps_exactly_g(right):
    correct = np.arange(8) < right
    for seed in range(20):
        chosen = resample_on_correct(correct, np.zeros(8), 4, np.random.default_rng(seed))
        assert len(set(chosen)) == 4
        assert correct[chosen].sum() == right // 2


def test_resample_frequencies_follow_the_inverse_penalty():
    correct = np.array([True, True, False, False])
    penalties = np.array([0.25, 0.75, 9.0, 9.0])
    generator = np.random.default_rng(0)
    draws = np.zeros(4)
    for _ in range(2000):
        draws[resample_on_correct(correct, penalties, 2, generator)] += 1
    assert draws[0] / 2000 == pytest.approx(0.75, abs=0.03)  # 1/0.25 against 1/0.75
    assert draws[2] / 2000 == pytest.approx(0.5, abs=0.03)  # wrong ones uniformly
    assert draws.sum() == 2 * 2000
