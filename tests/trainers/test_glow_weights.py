"""Weights from the data and penalties on the ledger: every loss against one that is computed by hand."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_glow import glow, nll_by_hand
from tiny import tiny_model
from tiny_sft import TOKENIZER, chats, logged, parameters
from transformers import TrainerCallback

from afterglow.core.errors import DataError, RecipeError

ONE_STEP = {"max_steps": 1, "weighting": "none", "max_grad_norm": 1e9}


def turns(count: int) -> Dataset:
    """Conversations with two answers each, whose messages and rows have weights."""
    rows = []
    for number, row in enumerate(chats(count)):
        answers = [
            {"role": "assistant", "content": text, "weight": w} for text, w in (("abc" * number, 0.25), ("de", 2.0))
        ]
        completion = [answers[0], {"role": "user", "content": "and?", "weight": None}, answers[1]]
        rows.append(row | {"completion": completion, "sample_weight": 0.5 * number, "correct": number % 2 == 0})
    return Dataset.from_list(rows)


def by_hand(model, rows, reduction: str) -> torch.Tensor:
    """The loss of one batch from full logits."""
    total = tokens = 0
    for row in rows:
        labels, weights = torch.tensor(row["labels"])[1:], torch.tensor(row["token_weights"])[1:]
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
        own = (weights * nll).sum() / (weights.sum() if reduction == "sample" else 1)
        total, tokens = total + row["sample_weight"] * own, tokens + (labels != -100).sum()
    return total / (len(rows) if reduction == "sample" else tokens)


@pytest.mark.parametrize("reduction", ["sample", "token"])
def test_weights_of_samples_and_messages_by_hand(reduction, tmp_path):
    keys = {"assistant_only_loss": True, "loss_reduction": reduction, **ONE_STEP}
    padded = glow(tmp_path, turns(4), **keys)
    rows = list(padded.train_dataset)
    for row in rows:
        said = {
            weight: TOKENIZER.decode(
                [t for t, w in zip(row["input_ids"], row["token_weights"], strict=True) if w == weight]
            )
            for weight in (0.25, 2.0)
        }
        first, second = (message["content"] for message in row["completion"] if message["role"] == "assistant")
        assert first in said[0.25] and second in said[2.0] and "and?" not in "".join(said.values())
    model = tiny_model()
    loss = by_hand(model, rows, reduction)
    loss.backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).norm().item()
    packed = glow(tmp_path, turns(4), packing=True, max_length=512, per_device_train_batch_size=4, **keys_without(keys))
    flat = glow(tmp_path, turns(4), padding_free=True, pad_to_multiple_of=8, **keys | {"max_length": None})
    for trainer in (padded, packed, flat):
        trainer.train()
        assert logged(trainer, "loss") == pytest.approx([loss.item()], rel=1e-5)
        assert logged(trainer, "grad_norm") == pytest.approx([gradient], rel=1e-4)
    assert len(packed.train_dataset) < 4
    torch.testing.assert_close(packed.ledger.table(), padded.ledger.table(), rtol=1e-5, atol=0)


def keys_without(keys: dict) -> dict:
    return {name: value for name, value in keys.items() if name not in ("max_length",)}


def test_equal_weights_on_every_message_change_nothing(tmp_path):
    plain = glow(tmp_path, chats(6), num_train_epochs=2)
    same = Dataset.from_list(
        [row | {"completion": [row["completion"][0] | {"weight": 3.0}], "sample_weight": 1.0} for row in chats(6)]
    )
    weighed = glow(tmp_path, same, num_train_epochs=2)
    plain.train()
    weighed.train()
    torch.testing.assert_close(parameters(weighed.model), parameters(plain.model), rtol=1e-5, atol=1e-7)


def test_negative_weight_and_batch_mean_by_hand(tmp_path):
    labels = [True, False, None, False]
    data = chats(4).add_column("correct", labels).add_column("sample_weight", [1.0, 2.0, 1.0, 1.0])
    weights = torch.tensor([1.0, 0.2, 1.0, 0.1])
    trainer = glow(tmp_path, data, negative_weight=0.1, glow_normalize="batch_mean", **ONE_STEP)
    rows = list(trainer.train_dataset)
    trainer.train()
    model = tiny_model()
    losses = torch.stack([nll_by_hand(model, row) for row in rows])
    ((weights * losses).sum() / weights.sum()).backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).norm().item()
    assert logged(trainer, "loss") == pytest.approx([(weights * losses).mean().item()], rel=1e-5)
    assert logged(trainer, "grad_norm") == pytest.approx([gradient], rel=1e-4)
    assert logged(trainer, "unweighted_loss") == pytest.approx([losses.mean().item()], rel=1e-5)


def test_drop_penalty_has_the_gradient_of_the_penalty(tmp_path):
    """Three epochs of one batch: in the third, the losses are compared with those of the first."""
    keys = {"num_train_epochs": 3, "weighting": "none", "drop_epochs": 2, "drop_margin": 0.65, "drop_penalty": 0.5}
    trainer = glow(tmp_path, chats(4), max_grad_norm=1e9, **keys)
    rows, model = list(trainer.train_dataset), tiny_model()
    trainer.train()
    history, gradients = [], []
    for epoch in range(3):
        losses = torch.stack([nll_by_hand(model, row) for row in rows])
        history.append(losses.detach())
        loss = losses.mean()
        if epoch == 2:
            fallen = history[0] - losses - 0.65
            assert 0 < (fallen > 0).sum() < 4, "some samples are penalised and some are not"
            loss = loss + 0.5 * torch.relu(fallen).mean()
        model.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]).norm().item())
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad
    assert logged(trainer, "grad_norm") == pytest.approx(gradients, rel=1e-4)


def test_lora_and_gradient_checkpointing_reach_every_adapter_matrix(tmp_path):
    norms = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:  # the second step: in the first, A has no gradient since B is 0
                norms.update({name: p.grad.norm().item() for name, p in model.named_parameters() if p.requires_grad})

    from test_glow import GLOWConfig, GLOWTrainer, settings

    args = GLOWConfig(**settings(tmp_path, gradient_checkpointing=True, max_steps=2))
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = GLOWTrainer(
        tiny_model(), args, chats(8), processing_class=TOKENIZER, peft_config=lora, callbacks=[Watch()]
    )
    trainer.train()
    layers = tiny_model().config.num_hidden_layers
    assert len(norms) == 2 * 7 * layers, "A and B of seven matrices a layer"
    assert min(norms.values()) > 0, [name for name, norm in norms.items() if not norm]


@pytest.mark.parametrize(
    ("data", "changes", "error", "message"),
    [
        (chats(2).add_column("sample_weight", [1.0, -1.0]), {}, DataError, "row 1: `sample_weight` is -1.0"),
        (chats(2).add_column("sample_weight", [1.0, None]), {}, DataError, "row 1: `sample_weight` is None"),
        (chats(2), {"negative_weight": 0.5}, DataError, "`negative_weight: 0.5` needs to know which chains are wrong"),
        (chats(2), {"negative_weight": -1.0}, RecipeError, "`negative_weight` must be a number from 0 on"),
        (chats(2), {"drop_penalty": float("nan")}, RecipeError, "`drop_penalty` must be a number from 0 on"),
        (chats(2), {"drop_epochs": 0}, RecipeError, "`drop_epochs` must be at least 1"),
        (chats(2), {"drop_penalty": 0.3, "loss_reduction": "token"}, RecipeError, "needs `loss_reduction: sample`"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(data, changes, error, message, tmp_path):
    with pytest.raises(error, match=message):
        glow(tmp_path, data, **changes)
