"""kl, undial and rmu's `hidden` without a LoRA adapter to switch off: against two models, side by side."""

import copy
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import tiny_model
from tiny_sft import logged, parameters
from transformers import GraniteConfig, GraniteForCausalLM, TrainerCallback
from unlearning_setup import lora, unlearn

from afterglow.core.errors import ModelError, RunFolderError
from afterglow.trainers.paired_rows import pair_rows
from afterglow.trainers.start_model import REFERENCE_FILE

KL = {"forget_loss": "ga", "retain_loss": "kl", "learning_rate": 0.05}
TEN = {"per_device_train_batch_size": 10}  # all pairs in a batch: a step is an epoch


def answers_of(model, row: dict, layer: int = -1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities over the vocabulary, answer tokens, and hidden states of the answer tokens: (tokens, ...)."""
    labels = torch.tensor(row["labels"])[1:]
    at = labels != -100
    out = model(torch.tensor([row["input_ids"]]), output_hidden_states=True)
    return out.logits[0, :-1][at].log_softmax(-1), labels[at], out.hidden_states[layer][0, 1:][at]


def kl_by_hand(model, start, row: dict) -> torch.Tensor:
    """Mean over the answer's tokens of KL(start model || model), from both models' full distributions."""
    now, then = answers_of(model, row)[0], answers_of(start, row)[0].detach()
    return (then.exp() * (then - now)).sum(-1).mean()


def two_model_training(trainer, model, epochs: int) -> list[float]:
    """Plain SGD with a frozen copy of the model beside it; returns the retain loss of each step."""
    start, tables, found = copy.deepcopy(model), trainer.pairs._tables, []
    for epoch in range(epochs):
        total, kept = torch.zeros(()), torch.zeros(())
        for row, partner in enumerate(pair_rows(trainer.args.seed, epoch, 10, 13)):
            log_probs, labels, _ = answers_of(model, tables["forget"][row])
            total = total + log_probs.gather(1, labels[:, None]).mean() / 10
            kept = kept + kl_by_hand(model, start, tables["retain"][int(partner)]) / 10
        (total + kept).backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= trainer.args.learning_rate * p.grad
                    p.grad = None
        found.append(kept.item())
    return found


def test_kl_of_full_fine_tuning_is_that_of_two_models_under_accumulation_too(tmp_path):
    trainer = unlearn(tmp_path, **KL, per_device_train_batch_size=2, gradient_accumulation_steps=5)
    trainer.train()
    plain = tiny_model()
    expected = two_model_training(trainer, plain, 3)
    assert logged(trainer, "retain_loss") == pytest.approx(expected, rel=1e-3, abs=1e-6) and expected[-1] > 1e-4
    change = (parameters(plain) - parameters(tiny_model())).norm()
    assert (parameters(trainer.model) - parameters(plain)).norm() < 1e-4 * change


def test_a_used_adapter_belongs_to_the_start_model(tmp_path):
    used = get_peft_model(tiny_model(), lora())
    with torch.no_grad():
        for name, p in used.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(0))
    plain = copy.deepcopy(used)
    trainer = unlearn(tmp_path, **KL, **TEN, model=used, num_train_epochs=2)
    trainer.train()
    assert logged(trainer, "retain_loss") == pytest.approx(two_model_training(trainer, plain, 2), rel=1e-3, abs=1e-6)


class KeepParameters(TrainerCallback):
    """Keeps the parameters after each step."""

    def __init__(self):
        self.seen: list[torch.Tensor] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(parameters(model))


def test_undial_and_hidden_of_full_fine_tuning(tmp_path):
    trainer = unlearn(tmp_path, forget_loss="undial", beta=3.0, max_steps=1, **TEN)
    trainer.train()
    model, expected = tiny_model(), []
    with torch.no_grad():
        for row in range(10):
            log_probs, labels, _ = answers_of(model, trainer.pairs[row]["forget"])
            target = (log_probs - 3.0 * torch.nn.functional.one_hot(labels, log_probs.size(1))).softmax(-1)
            expected.append(-(target * log_probs).sum(-1).mean())
    assert logged(trainer, "forget_loss")[0] == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)

    rmu = {"forget_loss": "rmu", "retain_loss": "hidden", "rmu_layer": 0, "learning_rate": 1.0}
    trainer = unlearn(tmp_path / "rmu", max_steps=2, **rmu, **TEN)
    keep = KeepParameters()
    trainer.add_callback(keep)
    trainer.train()
    first, second = logged(trainer, "retain_loss")
    start, tables = tiny_model(), trainer.pairs._tables["retain"]
    now = tiny_model()
    torch.nn.utils.vector_to_parameters(keep.seen[0], now.parameters())
    with torch.no_grad():
        distances = [
            (answers_of(now, tables[int(row)], 1)[2] - answers_of(start, tables[int(row)], 1)[2]).square().mean()
            for row in pair_rows(trainer.args.seed, 1, 10, 13)
        ]
    assert first == pytest.approx(0, abs=1e-12)
    assert second == pytest.approx(torch.stack(distances).mean().item(), rel=1e-4)


def test_the_neighbourhood_is_held_too(tmp_path):
    trainer = unlearn(tmp_path, **KL, **TEN, perturbation="gpn", inner_step=0.0)
    trainer.train()
    first, *later = logged(trainer, "retain_loss")
    assert first == pytest.approx(0, abs=1e-6) and later[-1] > 1e-4


SAVED = {**KL, "optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = unlearn(tmp_path_factory.mktemp("whole"), **SAVED)
    trainer.train()
    return trainer


def test_resume_is_exact_and_knows_whose_states_these_are(whole, tmp_path):
    checkpoint = Path(whole.args.output_dir) / "checkpoint-4"
    resumed = unlearn(tmp_path, **SAVED)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert torch.equal(parameters(resumed.model), parameters(whole.model))
    assert logged(resumed, "retain_loss") == logged(whole, "retain_loss")
    with pytest.raises(RunFolderError, match="another start model"):
        unlearn(tmp_path, **SAVED, model=tiny_model(seed=1)).train(resume_from_checkpoint=checkpoint)


def test_only_rows_that_are_drawn_are_kept(whole, tmp_path):
    short = unlearn(tmp_path, **SAVED | {"num_train_epochs": 1})
    short.train()
    checkpoint = tmp_path / "checkpoint-2"
    stored = load_file(checkpoint / REFERENCE_FILE)
    retain = short.pairs._tables["retain"]
    rows = sorted(pair_rows(short.args.seed, 0, 10, 13).tolist())
    assert stored["retain.rows"].tolist() == rows
    model = tiny_model()
    with torch.no_grad():
        by_hand = torch.cat([answers_of(model, retain[row])[0] for row in rows])
        head = stored["retain.states"] @ stored["retain.head_weight"].T
    torch.testing.assert_close(head.log_softmax(-1), by_hand, rtol=1e-5, atol=1e-5)
    assert torch.equal(stored["retain.head_weight"], model.lm_head.weight)
    with pytest.raises(RunFolderError, match="has not the retain rows of 3 epochs"):
        unlearn(tmp_path / "longer", **SAVED).train(resume_from_checkpoint=checkpoint)


def test_logits_that_are_not_the_heads_are_refused(tmp_path):
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, logits_scaling=8.0, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"scaled or soft-capped.*Use LoRA"):
        unlearn(tmp_path, **KL, model=GraniteForCausalLM(config)).train()
