import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig
from tiny import tiny_model
from tiny_sft import TOKENIZER, chats, logged, parameters, settings
from trl import SFTConfig, SFTTrainer

from afterglow.core.errors import DataError, RecipeError, RunFolderError
from afterglow.core.recipe import Section, build
from afterglow.trainers.checkpoints import last_complete_checkpoint
from afterglow.trainers.glow import GLOWConfig, GLOWTrainer
from afterglow.trainers.loss_ledger import LEDGER_FILE

# Weights that differ from sample to sample and are not clamped, so that a wrong one shows.
SENSITIVE = {"glow_alpha": 2.0, "glow_beta": 5.0, "glow_min_weight": None}


def glow(folder, dataset=None, model=None, callbacks=None, eval_dataset=None, **changes) -> GLOWTrainer:
    return GLOWTrainer(
        model or tiny_model(),
        GLOWConfig(**settings(folder, **changes)),
        chats(10) if dataset is None else dataset,
        processing_class=TOKENIZER,
        callbacks=callbacks,
        eval_dataset=eval_dataset,
    )


# ---------------------------------------------------------------------------------------------------------------------
# equal to TRL


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
SETUPS = {
    "padded": {},
    "packed": {"packing": True, "max_length": 128, "per_device_train_batch_size": 2},
    # Prompts that fill the whole length leave samples without a trained token.
    "packed, cut short": {"packing": True, "max_length": 26, "per_device_train_batch_size": 2},
    "padding-free": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 8},
    "LoRA": {"gradient_checkpointing": True},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "shuffle_dataset": True},
}


@pytest.mark.parametrize("setup", SETUPS)
def test_uniform_weights_equal_the_sft_trainer_bit_for_bit(setup, tmp_path):
    changes = SETUPS[setup] | {"optim": "adamw_torch", "learning_rate": 1e-2}
    peft_config = LORA if setup == "LoRA" else None
    plain = SFTTrainer(
        tiny_model(),
        SFTConfig(**settings(tmp_path, **changes)),
        train_dataset=chats(10),
        processing_class=TOKENIZER,
        peft_config=peft_config,
    )
    args = GLOWConfig(**settings(tmp_path, weighting="none", loss_reduction="token", **changes))
    ours = GLOWTrainer(tiny_model(), args, chats(10), processing_class=TOKENIZER, peft_config=peft_config)
    plain.train()
    ours.train()
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy"):
        assert logged(ours, key) == logged(plain, key), key
    assert max(logged(ours, "grad_norm")) > 0
    assert torch.equal(parameters(ours.model), parameters(plain.model))
    assert ours.ledger.table().shape == (10, 3)
    assert ours.ledger.table().isnan().any() == (setup == "packed, cut short")


# ---------------------------------------------------------------------------------------------------------------------
# the method


def nll_by_hand(model, row: dict) -> torch.Tensor:
    """Mean NLL of the trained tokens from the full logits."""
    labels = torch.tensor(row["labels"])[1:]
    logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100)


def test_second_epoch_by_hand(tmp_path):
    rate, clip_off = 0.05, 1e9
    trainer = glow(tmp_path, chats(4), learning_rate=rate, max_grad_norm=clip_off, num_train_epochs=2, **SENSITIVE)
    rows = list(trainer.train_dataset)
    trainer.train()

    model, losses, expected = tiny_model(), [], []
    for epoch in range(2):
        losses.append(torch.stack([nll_by_hand(model, row) for row in rows]))
        weights = torch.ones(4)
        if epoch == 1:
            gain = (losses[0] - losses[1]).detach()
            weights = 2.0 * (1 - torch.sigmoid(5.0 * gain))
            assert weights.std() > 0.01
        loss = (weights * losses[epoch]).mean()
        expected.append(loss.item())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= rate * p.grad

    assert logged(trainer, "loss") == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(trainer.ledger.table(), torch.stack(losses, 1).detach(), rtol=1e-5, atol=0)
    change = (parameters(model) - parameters(tiny_model())).norm()
    assert (parameters(trainer.model) - parameters(model)).norm() < 1e-4 * change
    last = {key: values[-1] for key in WEIGHT_METRICS if (values := logged(trainer, key))}
    assert last["glow/weight_mean"] == pytest.approx(weights.mean().item(), rel=1e-4)
    assert last["glow/weight_std"] == pytest.approx(weights.std(correction=0).item(), rel=1e-3)
    assert last["glow/weight_min"] == pytest.approx(weights.min().item(), rel=1e-4)
    assert last["glow/weight_max"] == pytest.approx(weights.max().item(), rel=1e-4)
    assert last["glow/gain_mean"] == pytest.approx(gain.mean().item(), rel=1e-3)
    assert last["glow/gain_std"] == pytest.approx(gain.std(correction=0).item(), rel=1e-2)
    assert last["glow/regressed"] == (gain < 0).float().mean().item()
    assert last["unweighted_loss"] == pytest.approx(losses[1].mean().item(), rel=1e-5)


WEIGHT_METRICS = [
    "unweighted_loss", "glow/weight_mean", "glow/weight_std", "glow/weight_min", "glow/weight_max", "glow/gain_mean",
    "glow/gain_std", "glow/regressed",
]  # fmt: skip


@pytest.mark.parametrize("reduction", ["sample", "token"])
def test_constant_weight_scales_the_gradient_after_the_first_epoch(reduction, tmp_path):
    same = {"learning_rate": 0.0, "num_train_epochs": 2, "loss_reduction": reduction}
    plain, constant = glow(tmp_path, weighting="none", **same), glow(tmp_path, weighting="constant", **same)
    plain.train()
    constant.train()
    one, half = np.array(logged(plain, "grad_norm")), np.array(logged(constant, "grad_norm"))
    steps = len(one) // 2
    assert (half[:steps] == one[:steps]).all()
    np.testing.assert_allclose(half[steps:], one[steps:] / 2, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["sample", "token"])
def test_batch_mean_takes_a_constant_weight_out(reduction, tmp_path):
    same = {
        "num_train_epochs": 2,
        "loss_reduction": reduction,
        "gradient_accumulation_steps": 2,
        "optim": "adamw_torch",
    }
    plain = glow(tmp_path, weighting="none", **same)
    constant = glow(tmp_path, weighting="constant", glow_normalize="batch_mean", **same)
    plain.train()
    constant.train()
    assert logged(constant, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-5)
    torch.testing.assert_close(parameters(constant.model), parameters(plain.model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", ["none", "batch_mean"])
def test_a_batch_without_a_trained_token_changes_nothing(normalize, tmp_path):
    """Some prompts fill the whole length; when it packs, TRL keeps their rows."""
    trainer = glow(
        tmp_path, packing=True, max_length=26, per_device_train_batch_size=1, glow_normalize=normalize, **SENSITIVE
    )
    trainer.train()
    assert 0.0 in logged(trainer, "grad_norm")
    assert parameters(trainer.model).isfinite().all()
    unseen = trainer.ledger.table().isnan()
    assert unseen.any() and torch.equal(unseen.any(1), unseen.all(1))


def test_packed_segments_have_the_losses_of_padded_rows(tmp_path):
    still = {"learning_rate": 0.0, "num_train_epochs": 2}
    padded = glow(tmp_path, **still)
    packed = glow(tmp_path, packing=True, per_device_train_batch_size=2, **still)
    flat = glow(tmp_path, padding_free=True, **still | {"max_length": None})
    for trainer in (padded, packed, flat):
        trainer.train()
    assert len(packed.train_dataset) < 10
    assert not padded.ledger.table().isnan().any()
    torch.testing.assert_close(packed.ledger.table(), padded.ledger.table(), rtol=1e-6, atol=0)
    torch.testing.assert_close(flat.ledger.table(), padded.ledger.table(), rtol=1e-6, atol=0)


def test_training_never_builds_the_full_logits(tmp_path, monkeypatch):
    trainer = glow(tmp_path)
    monkeypatch.setattr(trainer.model.lm_head, "forward", lambda *_: pytest.fail("the LM head was called"))
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps


def test_evaluation_while_training_touches_nothing(tmp_path):
    dataset = chats(10)
    plain = glow(tmp_path / "plain", dataset, **SENSITIVE)
    watched = glow(
        tmp_path / "watched", dataset, eval_dataset=dataset, eval_strategy="steps", eval_steps=1, eval_on_start=True,
        **SENSITIVE,
    )  # fmt: skip
    plain.train()
    watched.train()
    assert len(logged(watched, "eval_loss")) == 10
    assert torch.equal(parameters(watched.model), parameters(plain.model))
    assert torch.equal(watched.ledger.table(), plain.ledger.table())
    assert logged(watched, "glow/weight_mean") == logged(plain, "glow/weight_mean")
    watched.evaluate(watched.train_dataset)  # which has the rows' numbers
    assert torch.equal(watched.ledger.table(), plain.ledger.table())


def test_training_twice_starts_with_an_empty_ledger(tmp_path):
    trainer = glow(tmp_path, num_train_epochs=2)
    trainer.train()
    trainer.train()
    assert trainer.ledger.table().shape == (10, 2)


# ---------------------------------------------------------------------------------------------------------------------
# resume


def undisturbed(folder, dataset=None) -> GLOWTrainer:
    trainer = glow(folder, dataset, save_strategy="steps", save_steps=1, **RESUMABLE)
    trainer.train()
    return trainer


RESUMABLE = {"optim": "adamw_torch", "learning_rate": 1e-2, "packing": True, "max_length": 128} | SENSITIVE


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("whole"), chats(20))


@pytest.mark.parametrize("step", [2, 3, 4, 5, 8])
def test_resume_anywhere_is_exact(step, whole_run, tmp_path):
    """Three steps an epoch: in the middle of epochs 1, 2 (twice), 3, and between two epochs."""
    assert whole_run.state.max_steps == 9
    resumed = glow(tmp_path, chats(20), **RESUMABLE)
    resumed.train(resume_from_checkpoint=Path(whole_run.args.output_dir) / f"checkpoint-{step}")
    assert torch.equal(parameters(resumed.model), parameters(whole_run.model))
    assert torch.equal(resumed.ledger.table(), whole_run.ledger.table())
    assert logged(resumed, "loss") == logged(whole_run, "loss")


def test_ledger_stands_beside_each_checkpoint_and_at_the_end(whole_run):
    output_dir = Path(whole_run.args.output_dir)
    unfinished = pd.read_parquet(output_dir / "checkpoint-5" / LEDGER_FILE)
    assert list(unfinished.columns) == ["id", "epoch_1", "epoch_2", "weight"]
    assert (unfinished["weight"].isna() == unfinished["epoch_2"].isna()).all()
    assert 0 < unfinished["epoch_2"].isna().sum() < 20
    final = pd.read_parquet(output_dir / LEDGER_FILE)
    np.testing.assert_array_equal(final.filter(like="epoch_").to_numpy(), whole_run.ledger.table().numpy())
    assert last_complete_checkpoint(output_dir) == output_dir / "checkpoint-9"


def test_a_reordered_and_larger_training_set_finds_its_losses_by_id(whole_run, tmp_path):
    mixed = chats(24).shuffle(seed=3)
    resumed = glow(tmp_path, mixed, **RESUMABLE)
    resumed.train(resume_from_checkpoint=Path(whole_run.args.output_dir) / "checkpoint-3")
    table = pd.DataFrame(resumed.ledger.table().numpy(), index=mixed["id"])
    before = pd.read_parquet(Path(whole_run.args.output_dir) / "checkpoint-3" / LEDGER_FILE).set_index("id")
    assert (table.loc[before.index, 0] == before["epoch_1"]).all()
    assert table.loc[[f"sample-{n}" for n in range(20, 24)], 0].isna().all()


def test_kill_while_a_checkpoint_is_written(whole_run, tmp_path):
    worker = Path(__file__).with_name("glow_kill_worker.py")
    killed = subprocess.run([sys.executable, worker, tmp_path], capture_output=True, text=True, timeout=280)
    assert killed.returncode == -9, killed.stderr[-3000:]
    assert (tmp_path / "checkpoint-4" / "model.safetensors").exists()  # looks whole, but is not
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    resumed = glow(tmp_path, chats(20), save_strategy="steps", save_steps=1, **RESUMABLE)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(resumed.model), parameters(whole_run.model))
    assert torch.equal(resumed.ledger.table(), whole_run.ledger.table())


def test_resume_needs_a_checkpoint_with_a_ledger(tmp_path):
    trainer = glow(tmp_path, num_train_epochs=2)
    with pytest.raises(RunFolderError, match="no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(RunFolderError, match=f"has no {LEDGER_FILE}"):
        trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-3")


# ---------------------------------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weighting": "glo"}, "`weighting`: 'glo' is none of glow, constant, none"),
        ({"glow_form": "plus"}, "`glow_form`"),
        ({"loss_reduction": "sum"}, "`loss_reduction`: 'sum' is none of sample, token"),
        ({"glow_normalize": "yes"}, "`glow_normalize`"),
        ({"glow_alpha": 0.0}, "`glow_alpha` must be above 0"),
        ({"glow_beta": -1.0}, "`glow_beta` must be above 0"),
        ({"constant_weight": 0.0}, "`constant_weight` must be above 0"),
        ({"glow_min_weight": -0.1}, "`glow_min_weight` must not be negative"),
        ({"glow_max_weight": 0.5}, "`glow_max_weight` must be above `glow_min_weight`"),
        ({"glow_warmup_epochs": 0}, "`glow_warmup_epochs` must be at least 1"),
        ({"num_train_epochs": 1}, "every weight would be 1"),
        ({"num_train_epochs": 1, "weighting": "constant"}, "every weight would be 1"),
        ({"loss_type": "dft"}, "`loss_type: dft`"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor`"),
        ({"packing": True, "packing_strategy": "bfd_split"}, "cuts samples in pieces"),
        ({"average_tokens_across_devices": False}, "`average_tokens_across_devices: false`"),
        ({"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance"),
        ({"glow_normalize": "batch_mean", "max_grad_norm": 0.0}, "set `max_grad_norm`"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        GLOWConfig(**settings(tmp_path, **changes))


def test_released_behaviour_is_the_default_and_recipes_fill_the_config(tmp_path):
    args = GLOWConfig(**settings(tmp_path))
    released = ("glow", 1.0, 20.0, "scaled", 0.5, 5.0, 1, "none", "sample")
    names = ("weighting", "glow_alpha", "glow_beta", "glow_form", "glow_min_weight", "glow_max_weight",
             "glow_warmup_epochs", "glow_normalize", "loss_reduction")  # fmt: skip
    assert tuple(getattr(args, name) for name in names) == released
    (built,) = build(Section(settings(tmp_path) | {"glow_max_weight": None, "glow_beta": 5}), GLOWConfig)
    assert built.glow_max_weight is None and built.glow_beta == 5.0
    with pytest.raises(RecipeError, match=r"glow_form.*did you mean scaled"):
        build(Section(settings(tmp_path) | {"glow_form": "scale"}), GLOWConfig)


def test_max_steps_within_the_first_epoch_warn(tmp_path):
    with pytest.warns(UserWarning, match=r"`max_steps: 2` ends within .* `weighting: glow` does nothing"):
        glow(tmp_path, max_steps=2).train()


def test_training_sets_that_cannot_be_followed_are_refused(tmp_path):
    with pytest.raises(DataError, match="the column `id` is missing"):
        glow(tmp_path, chats(3).remove_columns("id"))
    with pytest.raises(DataError, match="both have the id"):
        glow(tmp_path, chats(3).map(lambda _: {"id": "same"}))
    with pytest.raises(DataError, match="a stream cannot be followed"):
        glow(tmp_path, chats(3).to_iterable_dataset())


def test_a_loss_of_the_users_own_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="bypass the weights"):
        GLOWTrainer(tiny_model(), GLOWConfig(**settings(tmp_path)), chats(3), compute_loss_func=print)
