import math

import pytest
import torch

from afterglow.trainers import unlearning_losses as losses


def gradient(loss, at: torch.Tensor) -> torch.Tensor:
    at = at.clone().requires_grad_()
    loss(at).sum().backward()
    return at.grad


LOG_PROB = torch.tensor([-3.0, -12.5, -40.0])


def test_npo_starts_at_two_over_beta_log_two_with_the_gradient_of_ascent():
    for beta in (0.1, 1.0):
        torch.testing.assert_close(losses.npo_loss(LOG_PROB, LOG_PROB, beta), torch.full((3,), 2 / beta * math.log(2)))
        assert gradient(lambda x, b=beta: losses.npo_loss(x, LOG_PROB, b), LOG_PROB).tolist() == [1.0, 1.0, 1.0]


def test_npo_gradient_is_ascents_times_its_fading_weight():
    reference, beta = torch.tensor([-2.0, -14.0, -30.0]), 0.1
    pi, ref = (beta * LOG_PROB).exp(), (beta * reference).exp()
    torch.testing.assert_close(
        gradient(lambda x: losses.npo_loss(x, reference, beta), LOG_PROB), 2 * pi / (pi + ref), rtol=1e-6, atol=0
    )


def test_npo_falls_as_the_answer_is_forgotten_down_to_nothing():
    values = losses.npo_loss(torch.tensor([-1.0, -2.0, -2000.0]), torch.tensor([-1.0, -1.0, -1.0]), 0.5)
    assert values[0] > values[1] > values[2] >= 0 and values[2] < 1e-6


def test_simnpo_weights_by_hand():
    p = LOG_PROB.exp()
    for beta in (0.5, 4.5):
        weights = 2 * p**beta / (1 + p**beta)
        torch.testing.assert_close(gradient(lambda x, b=beta: losses.simnpo_loss(x, b), LOG_PROB), weights)
    nearly_ascent = gradient(lambda x: losses.simnpo_loss(x, 1e-6), LOG_PROB)
    torch.testing.assert_close(nearly_ascent, torch.ones(3), rtol=1e-4, atol=0)


def test_simnpo_margin_is_that_of_the_code_and_gamma_of_the_paper_is_beta_times_it():
    beta, margin = 2.5, 0.3
    paper = -2 / beta * torch.nn.functional.logsigmoid(-beta * LOG_PROB - beta * margin)
    torch.testing.assert_close(losses.simnpo_loss(LOG_PROB, beta, margin), paper)


def test_dpo_prefers_the_alternative_and_without_one_is_npo():
    zero = torch.zeros(3)
    reference = LOG_PROB - 1
    torch.testing.assert_close(
        losses.dpo_loss(LOG_PROB, reference, zero, zero, 0.1), losses.npo_loss(LOG_PROB, reference, 0.1)
    )
    better = losses.dpo_loss(LOG_PROB, reference, zero + 1, zero, 0.1)
    assert (better < losses.npo_loss(LOG_PROB, reference, 0.1)).all()


TOKENS = torch.tensor([[-0.1, -2.0, -5.0], [-0.7, -1.0, -9.0]])
MASK = torch.tensor([[True, True, False], [False, True, True]])


def test_weighted_ascents_with_exponent_zero_are_ascent_and_by_hand_otherwise():
    torch.testing.assert_close(losses.wga_tokens(TOKENS, 0.0), TOKENS)
    torch.testing.assert_close(losses.satimp_tokens(TOKENS, 0.0, 0.0), TOKENS)
    p = TOKENS.exp()
    torch.testing.assert_close(gradient(lambda x: losses.wga_tokens(x, 2.0), TOKENS), p**2)
    torch.testing.assert_close(gradient(lambda x: losses.satimp_tokens(x, 5.0, 1.0), TOKENS), p**5 * (1 - p))


def test_sums_and_means_read_answer_tokens_only():
    assert losses.reduce_tokens(TOKENS, MASK, "sum").tolist() == pytest.approx([-2.1, -10.0])
    assert losses.reduce_tokens(TOKENS, MASK, "mean").tolist() == pytest.approx([-1.05, -5.0])
    poisoned = TOKENS.masked_fill(~MASK, torch.nan)
    assert losses.reduce_tokens(poisoned, MASK, "mean").tolist() == pytest.approx([-1.05, -5.0])
    assert losses.reduce_tokens(TOKENS, torch.zeros_like(MASK), "mean").tolist() == [0.0, 0.0]


def test_undial_by_hand_lowers_the_true_token_only():
    reference = torch.tensor([[2.0, 1.0, 0.0]])
    logits = torch.tensor([[0.5, 0.5, 0.5]])
    target = torch.tensor([2.0 - 3.0, 1.0, 0.0]).softmax(0)
    value = losses.undial_tokens(logits, reference, torch.tensor([0]), 3.0)
    assert value.item() == pytest.approx(-(target * math.log(1 / 3)).sum().item())
    pushed = gradient(lambda x: losses.undial_tokens(x, reference, torch.tensor([0]), 3.0), logits)
    torch.testing.assert_close(pushed[0], logits[0].softmax(0) - target)
    assert reference.tolist() == [[2.0, 1.0, 0.0]], "the reference is not written to"


def test_ceu_aims_at_the_other_tokens_in_their_own_proportions():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    target = torch.tensor([0.0, 1.0 / (1 + math.exp(-1)), 1 / (1 + math.e)])
    pushed = gradient(lambda x: losses.ceu_tokens(x, torch.tensor([0])), logits)
    torch.testing.assert_close(pushed[0], logits[0].softmax(0) - target)


def test_kl_is_a_divergence_of_distributions():
    torch.manual_seed(0)
    logits, reference = torch.randn(2, 4, 50)
    expected = torch.nn.functional.kl_div(
        logits.log_softmax(-1), reference.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(losses.kl_tokens(logits, reference), expected)
    torch.testing.assert_close(losses.kl_tokens(reference + 3, reference), torch.zeros(4), atol=1e-6, rtol=0)


def test_rmu_weighs_each_row_by_its_own_tokens():
    hidden = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    by_hand = [hidden[0].square().mean().item(), hidden[1, :1].square().mean().item()]
    assert losses.rmu_loss(hidden, torch.zeros(2), mask).tolist() == pytest.approx(by_hand)
    assert losses.rmu_loss(hidden, hidden.clone(), mask).tolist() == [0.0, 0.0]


def test_the_control_vector_is_positive_of_its_length_and_the_same_for_a_seed():
    one, two = losses.control_vector(64, 6.5, 0), losses.control_vector(64, 6.5, 0)
    assert torch.equal(one, two) and (one >= 0).all() and one.norm().item() == pytest.approx(6.5)
    assert not torch.equal(one, losses.control_vector(64, 6.5, 1))
