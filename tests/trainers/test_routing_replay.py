import pytest
import torch
from tiny import tiny_model
from tiny_tools import scripted_trainer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from afterglow.core.errors import ModelError
from afterglow.trainers.routing_replay import NO_RECORD, RoutingReplay, lay_out, replayed


def moe(vocab_size: int = 50) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
        norm_topk_prob=True, max_position_embeddings=1024,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).float()


IDS = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(1))


def chosen(model) -> torch.Tensor:
    """The model's own experts, (rows, seq, layers, k)."""
    seen = []
    hooks = [layer.mlp.gate.register_forward_hook(lambda m, a, o: seen.append(o[2])) for layer in model.model.layers]
    model(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    return torch.stack([experts.view(2, 5, 2) for experts in seen], 2)


def test_weights_are_a_softmax_over_the_recorded_experts():
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.0], [1.0, 2.0, 3.0, 0.0]])
    own = torch.tensor([[0.7, 0.3]] * 2), torch.tensor([[2, 1]] * 2)
    recorded = torch.tensor([[0, 3], [NO_RECORD, NO_RECORD]])
    weights, experts = replayed(logits, *own, recorded, normalised=True)
    assert experts.tolist() == [[0, 3], [2, 1]]
    assert weights[0].tolist() == pytest.approx(torch.tensor([1.0, 0.0]).softmax(0).tolist())
    assert torch.equal(weights[1], own[0][1])
    plain, _ = replayed(logits, *own, recorded, normalised=False)
    assert torch.allclose(plain[0], logits[0].softmax(0)[[0, 3]])


def test_replaying_its_own_choice_changes_nothing_and_another_one_does():
    model = moe()
    own = chosen(model)
    before = model(input_ids=IDS).logits
    replay = RoutingReplay(model)
    assert replay.layers == 2
    with replay.of(own):
        assert torch.allclose(model(input_ids=IDS).logits, before, atol=1e-6)
    other = (own + 1) % 4
    with replay.of(other):
        assert not torch.allclose(model(input_ids=IDS).logits, before, atol=1e-3)
    assert torch.equal(model(input_ids=IDS).logits, before)  # outside, the model chooses for itself
    with replay.of(torch.full_like(own, NO_RECORD)):
        assert torch.allclose(model(input_ids=IDS).logits, before, atol=1e-6)


def test_chunks_take_their_rows_and_the_gradient_reaches_the_router():
    model = moe()
    other = (chosen(model) + 1) % 4
    replay = RoutingReplay(model)
    with replay.of(other):
        whole = model(input_ids=IDS).logits
    with replay.of(other):
        parts = torch.cat([model(input_ids=IDS[:1]).logits, model(input_ids=IDS[1:]).logits])
    assert torch.allclose(parts, whole, atol=1e-5)
    whole.sum().backward()
    assert all(layer.mlp.gate.weight.grad.abs().sum() > 0 for layer in model.model.layers)


def test_gradient_checkpointing_replays_the_same_experts_backwards():
    gradients = []
    for checkpointing in (False, True):
        model = moe().train()
        other = (chosen(model) + 1) % 4
        replay = RoutingReplay(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        with replay.of(other):
            loss = model(input_ids=IDS, use_cache=False).logits.square().mean()
        loss.backward()
        gradients.append(torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, atol=1e-7)


def test_records_are_laid_out_like_the_padded_batch():
    record = torch.arange(4).view(4, 1, 1)
    laid = lay_out([record, None], [1, 0], 6, 1, 1)
    assert laid[..., 0, 0].tolist() == [[NO_RECORD, 0, 1, 2, 3, NO_RECORD], [NO_RECORD] * 6]


def test_a_dense_model_is_refused():
    with pytest.raises(ModelError, match="has no router"):
        RoutingReplay(tiny_model())


def test_a_trainer_finds_the_record_of_each_row_by_its_tokens(tmp_path):
    trainer = scripted_trainer(tmp_path, model=moe(320), tools="none", script={"rounds": lambda seed: 0})
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    batch = trainer._generate_and_score_completions([{}] * 16)
    part = {key: value[:8] if torch.is_tensor(value) and value.dim() else value for key, value in batch.items()}
    plain = trainer._compute_loss(trainer.model, part).item()
    trainer._replay = RoutingReplay(trainer.model)
    assert trainer._compute_loss(trainer.model, part).item() == pytest.approx(plain, rel=1e-6)  # no records
    for graded in trainer._graded:
        ids = (*graded.rollout.prompt_ids, *graded.rollout.completion_ids)
        trainer._routes[ids] = torch.zeros(len(ids) - 1, 2, 2, dtype=torch.int16) + torch.tensor([0, 3])
    assert trainer._compute_loss(trainer.model, part).item() != pytest.approx(plain, rel=1e-6)
