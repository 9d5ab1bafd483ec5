import pytest
import torch
from tiny import tiny_model

from afterglow.eval.quantisation import NF4, quantise_model, round_to_nearest, round_to_nf4


def test_round_to_nearest_by_hand():
    weight = torch.tensor([[7.0, -3.4, 0.6, 0.0], [-0.14, 0.075, 0.045, 0.021]])
    expected = torch.tensor([[7.0, -3.0, 1.0, 0.0], [-0.14, 0.08, 0.04, 0.02]])  # scales 1 and 0.02
    torch.testing.assert_close(round_to_nearest(weight, 7), expected)
    assert round_to_nearest(torch.zeros(1, 3), 7).tolist() == [[0, 0, 0]]
    assert round_to_nearest(weight.bfloat16(), 127).dtype == torch.bfloat16


def test_nf4_by_hand():
    weight = torch.zeros(2, 64)
    weight[0, :5] = torch.tensor([2.0, -2.0, 0.3, -1.22, 0.07])  # over 2: 1, -1, 0.15, -0.61, 0.035
    weight[1, 0] = -0.5
    found = round_to_nf4(weight)
    expected = 2 * torch.tensor([1.0, -1.0, 0.16093020141124725, -0.5250730514526367, 0.0])
    torch.testing.assert_close(found[0, :5], expected)
    assert found[0, 5:].eq(0).all() and found[1, 0] == -0.5 and found[1, 1:].eq(0).all()


def test_nf4_keeps_its_own_levels_and_a_short_last_block():
    weight = torch.tensor(NF4 * 5).reshape(8, 10) * 3.0  # a block of 64 and one of 16
    torch.testing.assert_close(round_to_nf4(weight), weight)
    random = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    found = round_to_nf4(random)
    assert found.shape == random.shape and torch.equal(round_to_nf4(found), found)
    assert len((found.reshape(-1)[:64] / random.reshape(-1)[:64].abs().max()).unique()) <= 16


def test_nf4_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4", blocksize=64))
    assert torch.equal(round_to_nf4(weight), theirs)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_linear_layers_are_rounded_and_nothing_else(kind):
    model, before = tiny_model(tie_word_embeddings=False), tiny_model(tie_word_embeddings=False)
    assert quantise_model(model, kind) == 2 * 7
    old = dict(before.named_parameters())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
    assert changed == {name for name in old if name.endswith("_proj.weight")}
    largest = max((p - old[name]).abs().max() / old[name].abs().max() for name, p in model.named_parameters())
    assert 0 < largest < {"int8": 0.005, "int4": 0.08, "nf4": 0.16}[kind]
