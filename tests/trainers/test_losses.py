import math

import pytest
import torch

from afterglow.trainers.losses import drop_penalty_slope, glow_weight, sample_nll, token_factors

# (alpha, beta) -> {gain: weight}: the values of the released form, worked out by hand from its formula and clamp.
GOLDEN = {
    (1, 20): {-0.1: 0.881, -0.05: 0.731, 0.0: 0.5, 0.05: 0.5, 0.1: 0.5},
    (2, 20): {-0.1: 1.762, 0.0: 1.0, 0.02: 0.803, 0.05: 0.538, 0.1: 0.5},
    (1, 5): {-0.1: 0.622, 0.0: 0.5, 0.05: 0.5, 0.1: 0.5},
}


@pytest.mark.parametrize(("alpha", "beta"), GOLDEN)
def test_weights_of_the_released_form(alpha, beta):
    gains, expected = map(list, zip(*GOLDEN[alpha, beta].items(), strict=True))
    current = torch.full((len(gains),), 2.0)
    weights = glow_weight(current + torch.tensor(gains), current, alpha, beta)
    assert weights.tolist() == pytest.approx(expected, abs=5e-4)


def test_unclamped_weights_fall_with_the_gain_between_alpha_and_zero():
    gain = torch.linspace(-0.5, 0.5, 101)
    scaled = glow_weight(gain, torch.zeros(101), 3.0, 10.0, w_min=None, w_max=None)
    assert (scaled.diff() < 0).all() and scaled.min() > 0 and scaled.max() < 3
    plus = glow_weight(gain, torch.zeros(101), 3.0, 10.0, "one_plus", None, None)
    torch.testing.assert_close(plus, scaled + 1)


def test_one_plus_by_hand_and_each_limit_alone():
    previous, current = torch.tensor([1.0, 1.0]), torch.tensor([0.9, 1.5])
    by_hand = [1 + 3 / (1 + math.e), 1 + 3 / (1 + math.exp(-5.0))]
    assert glow_weight(previous, current, 3, 10, "one_plus").tolist() == pytest.approx(by_hand)
    assert glow_weight(previous, current, 3, 10, "one_plus", None, 2.0).tolist() == pytest.approx([by_hand[0], 2.0])
    assert glow_weight(previous, current, 3, 10, "one_plus", 2.0, None).tolist() == pytest.approx([2.0, by_hand[1]])


def test_a_sample_without_a_previous_loss_weighs_one():
    weights = glow_weight(torch.tensor([torch.nan, 1.0]), torch.tensor([3.0, 1.0]))
    assert weights.tolist() == [1.0, 0.5]


def test_weights_carry_no_gradient():
    current = torch.tensor([1.0], requires_grad=True)
    assert not glow_weight(torch.tensor([2.0]), current).requires_grad


# Two rows of three positions; -1, -2 and -4 belong to sample 0, -3 to sample 1, sample 2 is all masked.
LOG_PROBS = torch.tensor([[-1.0, -2.0, 0.0], [-4.0, -3.0, 0.0]])
MASK = torch.tensor([[True, True, False], [True, True, False]])
SEGMENTS = torch.tensor([[0, 0, 0], [0, 1, 2]])


def test_sample_nll_is_the_mean_over_the_tokens_of_the_sample():
    losses, tokens = sample_nll(LOG_PROBS, MASK, SEGMENTS, 3)
    assert losses.tolist() == pytest.approx([7 / 3, 3.0, 0.0])
    assert tokens.tolist() == [3, 1, 0]
    assert losses.dtype == torch.float32


def test_sample_nll_does_not_depend_on_the_order_of_a_long_sample():
    torch.manual_seed(0)
    log_probs = -torch.rand(1, 4096) * 8
    shuffled = log_probs[:, torch.randperm(4096)]
    one = torch.zeros(1, 4096, dtype=torch.long)
    mask = torch.ones(1, 4096, dtype=torch.bool)
    assert torch.equal(sample_nll(log_probs, mask, one, 1)[0], sample_nll(shuffled, mask, one, 1)[0])


def test_token_factors_give_the_weighted_sums():
    losses, tokens = sample_nll(LOG_PROBS, MASK, SEGMENTS, 3)
    weights = torch.tensor([0.5, 2.0, 7.0])
    by_token = -(LOG_PROBS * token_factors(weights, tokens, SEGMENTS, "token")).sum()
    assert by_token.item() == pytest.approx(0.5 * 7 + 2.0 * 3)
    by_sample = -(LOG_PROBS * token_factors(weights, tokens, SEGMENTS, "sample")).sum()
    assert by_sample.item() == pytest.approx(0.5 * 7 / 3 + 2.0 * 3)
    assert by_sample.item() == pytest.approx((weights * losses).sum().item())


def test_factors_of_weight_one_are_exactly_one():
    factors = token_factors(torch.ones(3), torch.tensor([3.0, 1.0, 0.0]), SEGMENTS, "token")
    assert (factors == 1).all()


def test_weights_of_tokens_by_hand():
    """Sample 0 has NLLs 1, 2 and 4 with weights 1, 0 and 3; sample 1 has NLL 3 with weight 0.5."""
    tokens, weights = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([0.5, 2.0, 7.0])
    own = torch.tensor([[1.0, 0.0, 0.0], [3.0, 0.5, 0.0]])
    by_token = -(LOG_PROBS * token_factors(weights, tokens, SEGMENTS, "token", own)).sum()
    assert by_token.item() == pytest.approx(0.5 * (1 + 3 * 4) + 2.0 * 0.5 * 3)
    by_sample = -(LOG_PROBS * token_factors(weights, tokens, SEGMENTS, "sample", own)).sum()
    assert by_sample.item() == pytest.approx(0.5 * (1 + 3 * 4) / 4 + 2.0 * 3), "0.5 is all that sample 1 has"


def test_drop_penalty_slope_is_the_derivative_of_the_penalty():
    past = torch.tensor([2.0, 2.0, 1.0, torch.nan])
    current = torch.tensor([1.0, 1.9, 1.5, 1.0], requires_grad=True)
    penalty = 0.3 * torch.relu(past - current - 0.2).nansum()  # the first fell by 1, the second by less than 0.2
    (slope,) = torch.autograd.grad(penalty, current)
    found = drop_penalty_slope(past, current, 0.3, 0.2)
    assert found.tolist() == pytest.approx([-0.3, 0.0, 0.0, 0.0]) and not found.requires_grad
    assert found[:3].tolist() == slope[:3].tolist()
