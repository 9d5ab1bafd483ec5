import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import tiny_model
from transformers import BertConfig, BertLMHeadModel, Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from afterglow.core.errors import DataError, ModelError
from afterglow.core.fast_forward import can_compile
from afterglow.core.token_stats import ScoredSequence, plan_batches, score_tokens
from afterglow.core.vocabulary_pass import VocabularyHead, token_statistics

VOCABULARY = 9000  # several slices, the last one short


def sequences(n=10, vocabulary=VOCABULARY, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for key in range(n):
        ids = rng.integers(0, vocabulary, rng.integers(5, 60))
        scored = rng.random(len(ids)) < 0.6
        scored[0] = False
        made.append(ScoredSequence(key, ids, scored))
    return made


@torch.no_grad()
def plain(model, sequence):
    """Full logits of one sequence: what everything here must equal."""
    logits = model(input_ids=torch.tensor(sequence.input_ids)[None]).logits[0].float()
    positions = torch.tensor(np.flatnonzero(sequence.scored))
    logits, target = logits[positions - 1], torch.tensor(sequence.input_ids)[positions, None]
    log_p = logits.log_softmax(-1)
    rank = 1 + (logits > logits.gather(1, target)).sum(1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    varentropy = (log_p.exp() * (log_p + entropy[:, None]) ** 2).sum(-1)
    return -log_p.gather(1, target)[:, 0], rank, entropy, varentropy, log_p.exp().amax(1)


def sharpen(model):
    """Spread the logits as in a trained model: random ones are nearly uniform."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model.eval()


def assert_plain(model, given, asked, atol):
    assert given.keys() == {sequence.key for sequence in asked}
    for sequence in asked:
        nll, rank, entropy, varentropy, confidence = plain(model, sequence)
        stats = given[sequence.key]
        torch.testing.assert_close(stats.nll, nll, atol=atol, rtol=1e-5)
        torch.testing.assert_close(stats.entropy, entropy, atol=10 * atol, rtol=1e-5)
        torch.testing.assert_close(stats.varentropy, varentropy, atol=100 * atol, rtol=1e-4)
        torch.testing.assert_close(stats.confidence, confidence, atol=10 * atol, rtol=1e-4)
        assert (stats.rank - rank).abs().max() <= (1 if atol < 1e-3 else 0.05 * rank.max())


# ---------------------------------------------------------------------------------------------------------------------
# the pass over the vocabulary


def toy(logits, targets, **kwargs):
    """Statistics of a head whose logits are given: hidden states pick the rows."""
    logits = torch.as_tensor(logits)
    head = VocabularyHead(logits.T.contiguous(), **kwargs)
    return token_statistics(torch.eye(len(logits), dtype=logits.dtype), torch.tensor(targets), head, entropy=True)


def test_hand_computed():
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]])
    nll, rank, entropy, varentropy, confidence = toy(p.log(), [2, 3])
    assert confidence.tolist() == pytest.approx([0.5, 0.4])
    assert rank.tolist() == [3, 1]  # a tie with the target does not count
    assert nll.tolist() == pytest.approx([math.log(8), -math.log(0.4)])
    assert entropy.tolist() == pytest.approx([1.75 * math.log(2), -(p[1] * p[1].log()).sum().item()])
    # of 1, 2, 3, 3 bits around 1.75 with probabilities 1/2, 1/4, 1/8, 1/8
    assert varentropy[0].item() == pytest.approx(0.6875 * math.log(2) ** 2)


def test_bias_scale_and_softcap():
    logits, bias = torch.tensor([[1.0, -2.0, 6.0]]), torch.tensor([0.5, 3.0, -9.0])
    nll, rank, *_ = toy(logits, [0], bias=bias, scale=0.5, softcap=2.0)
    expected = 2 * torch.tanh(0.5 * (logits + bias) / 2)
    assert nll.item() == pytest.approx(-expected.log_softmax(-1)[0, 0].item())
    assert rank.item() == 1


@pytest.mark.parametrize("vocabulary", [300, VOCABULARY])
def test_improbable_targets_do_not_overflow(vocabulary):
    logits = torch.zeros(2, vocabulary, dtype=torch.bfloat16)
    logits[:, 7], logits[0, 1] = 400.0, -(2.0**99)
    nll, rank, entropy, varentropy, confidence = toy(logits, [1, 2])
    assert confidence.tolist() == pytest.approx([1, 1])
    assert nll.tolist() == [2.0**99, 400.0]
    assert rank.tolist() == [vocabulary, 2]
    assert entropy.tolist() == varentropy.tolist() == pytest.approx([0, 0], abs=1e-6)


def test_rank_is_exact_when_low_precision_is_all_ties():
    """In bf16 the target's logit must be the very one in the product, or its own ties would outrank it."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32).bfloat16(), torch.randn(VOCABULARY, 32).bfloat16()
    targets = torch.randint(VOCABULARY, (64,))
    logits = torch.cat([hidden @ part.T for part in weight.split(1024)], 1)
    rank = 1 + (logits > logits.gather(1, targets[:, None])).sum(1)
    given = token_statistics(hidden, targets, VocabularyHead(weight))[1]
    assert torch.equal(given, rank.int())


def test_a_wrongly_rounded_target_is_done_again(monkeypatch):
    torch.manual_seed(0)
    hidden, weight = torch.randn(16, 32).bfloat16(), torch.randn(VOCABULARY, 32).bfloat16()
    targets = torch.randint(VOCABULARY, (16,))
    right = token_statistics(hidden, targets, VocabularyHead(weight))
    true_sum = torch.Tensor.sum
    # Only the target's own logit is a product in fp32 that is summed with `keepdim`.
    monkeypatch.setattr(torch.Tensor, "sum", lambda x, *a, **k: true_sum(x, *a, **k) * (1.1 if k.get("keepdim") else 1))
    wrong_first = token_statistics(hidden, targets, VocabularyHead(weight))
    torch.testing.assert_close(wrong_first[0], right[0], atol=1e-5, rtol=0)
    assert torch.equal(wrong_first[1], right[1])


# ---------------------------------------------------------------------------------------------------------------------
# models


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 2e-5), (torch.bfloat16, 0.1)])
def test_equals_full_logits(tied, dtype, atol):
    model = sharpen(tiny_model(vocab_size=VOCABULARY, tie_word_embeddings=tied)).to(dtype)
    asked = sequences()
    assert_plain(model, dict(score_tokens(model, asked, token_budget=150, entropy=True)), asked, atol)


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="torch.compile needs a C++ compiler")
def test_compiled_equals_full_logits_and_leaves_the_model_as_it_was():
    model = sharpen(tiny_model(vocab_size=VOCABULARY))
    asked = sequences()
    forwards = [layer.forward for layer in model.model.layers]
    given = dict(score_tokens(model, asked, token_budget=150, entropy=True, compiled=True))
    assert_plain(model, given, asked, 2e-5)
    assert [layer.forward for layer in model.model.layers] == forwards


@pytest.mark.parametrize("budget, chunk", [(1, 3), (64, 7), (10_000, 10_000)])
def test_batches_and_chunks_do_not_matter(budget, chunk):
    model = sharpen(tiny_model())
    asked = sequences(vocabulary=320)
    alone = {s.key: next(iter(score_tokens(model, [s])))[1] for s in asked}
    for key, stats in score_tokens(model, asked, token_budget=budget, chunk=chunk):
        torch.testing.assert_close(stats.nll, alone[key].nll, atol=1e-5, rtol=1e-5)
        assert torch.equal(stats.rank, alone[key].rank)


def test_nothing_after_the_last_scored_token_matters():
    model = sharpen(tiny_model())
    short, long = [5, 6, 7, 8], [5, 6, 7, 8, 9, 10]
    asked = [ScoredSequence(len(ids), ids, [False, True, True] + [False] * (len(ids) - 3)) for ids in (short, long)]
    (_, a), (_, b) = score_tokens(model, asked)
    assert torch.equal(a.nll, b.nll)


def test_peft_adapters_count():
    model = sharpen(tiny_model())
    asked = sequences(vocabulary=320)
    base = dict(score_tokens(model, asked))
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval()
    given = dict(score_tokens(model, asked, entropy=True))
    assert_plain(model, given, asked, 2e-5)
    assert max((given[s.key].nll - base[s.key].nll).abs().max() for s in asked if any(s.scored)) > 0.1


@pytest.mark.parametrize("adapter", ["head", "prompt"])
def test_adapters_outside_the_body_are_refused(adapter):
    config = LoraConfig(target_modules=["lm_head"])
    if adapter == "prompt":
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(tiny_model(tie_word_embeddings=False), config)
    with pytest.raises(ModelError, match="head"):
        next(score_tokens(model, sequences(vocabulary=320)))


SMALL = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def test_softcapping_and_logit_scaling_are_honoured():
    torch.manual_seed(0)
    gemma = Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=5.0))
    granite = GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0))
    asked = sequences(vocabulary=320)
    for model in (sharpen(gemma), sharpen(granite)):
        assert_plain(model, dict(score_tokens(model, asked, entropy=True)), asked, 5e-5)


def test_an_unknown_map_from_hidden_states_to_logits_is_refused():
    model = tiny_model()
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 3 * forward(hidden)
    with pytest.raises(ModelError, match="not what its last hidden state"):
        next(score_tokens(model, sequences(vocabulary=320)))


def test_attention_that_is_not_causal_is_refused():
    config = BertConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    with pytest.raises(ModelError):
        next(score_tokens(BertLMHeadModel(config), sequences(vocabulary=320)))


def test_training_mode_and_gradients_are_left_as_they_were():
    model = tiny_model(attention_dropout=0.5).train()
    asked = sequences(vocabulary=320)
    first, again = dict(score_tokens(model, asked)), dict(score_tokens(model, asked))
    assert model.training and torch.is_grad_enabled()
    assert all(torch.equal(first[k].nll, again[k].nll) for k in first)


def test_nan_logits_name_the_sequence():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(ModelError):
        next(score_tokens(model, sequences(vocabulary=320)))


# ---------------------------------------------------------------------------------------------------------------------
# sequences and batches


def test_plan_batches():
    assert plan_batches([3, 10, 4, 4, 50], 12) == [[4], [1], [2, 3, 0]]
    assert plan_batches([], 12) == []


def test_done_sequences_are_skipped_and_the_rest_is_bit_equal():
    model = sharpen(tiny_model()).bfloat16()
    asked = sequences(n=20, vocabulary=320)
    whole = list(score_tokens(model, asked, token_budget=100))
    done = {key for key, _ in whole[:11]}
    rest = dict(score_tokens(model, asked, token_budget=100, done=done))
    assert {s.key for s in asked} - done <= rest.keys()
    assert len(rest) < len(whole)
    assert all(torch.equal(stats.nll, rest[key].nll) for key, stats in whole if key in rest)
    assert not list(score_tokens(model, asked, token_budget=100, done={s.key for s in asked}))


def test_sequences_without_scored_tokens():
    asked = [ScoredSequence("none", [1, 2, 3], [False] * 3), ScoredSequence("empty", [], [])]
    for chosen in (asked, [*asked, ScoredSequence("some", [1, 2], [False, True])]):
        given = dict(score_tokens(tiny_model(), chosen, entropy=True))
        assert [len(given[key].nll) for key in ("none", "empty")] == [0, 0]
        assert len(given) == len(chosen)


def test_malformed_sequences():
    with pytest.raises(DataError, match=r"'a'.*first token"):
        ScoredSequence("a", [1, 2], [True, True])
    with pytest.raises(DataError, match="'b': 2 token ids but 1"):
        ScoredSequence("b", [1, 2], [False])


def test_top_k_hits():
    stats = dict(score_tokens(tiny_model(), sequences(vocabulary=320)))[0]
    assert torch.equal(stats.top_k_hits(5), stats.rank <= 5)
    assert stats.top_k_hits(320).all()
