import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from tiny_sft import chats, logged, parameters, settings
from unlearning_setup import lora, unlearn

from afterglow.core.errors import DataError, RecipeError, RunFolderError
from afterglow.trainers.paired_rows import pair_rows
from afterglow.trainers.start_model import REFERENCE_FILE
from afterglow.trainers.unlearning import UnlearnConfig

# ---------------------------------------------------------------------------------------------------------------------
# against the full logits, by hand


def log_probs_by_hand(model, row: dict) -> torch.Tensor:
    """Log-probabilities of the answer tokens of a row, from the full logits."""
    labels = torch.tensor(row["labels"])[1:]
    logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
    return logits.log_softmax(-1)[labels != -100, labels[labels != -100]]


def gradient_by_hand(trainer, forget, retain) -> torch.Tensor:
    """Gradient of the mean over all pairs of a forget and a retain value of the answers' log-probabilities."""
    model, pairs = tiny_model(), trainer.pairs
    total = torch.zeros(())
    for row in range(len(pairs)):
        total = total + forget(log_probs_by_hand(model, pairs[row]["forget"]), row)
        total = total + retain(log_probs_by_hand(model, pairs[row]["retain"]))
    (total / len(pairs)).backward()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def first_step(folder, **changes) -> tuple:
    """Train one step with all ten pairs by SGD of rate 1; returns the trainer and the gradient that it followed."""
    trainer = unlearn(
        folder, per_device_train_batch_size=10, max_steps=1, learning_rate=1.0, max_grad_norm=1e9, **changes
    )
    trainer.train()
    return trainer, parameters(tiny_model()) - parameters(trainer.model.cpu())


def simnpo_by_hand(lp: torch.Tensor) -> torch.Tensor:
    return -2 / 2.5 * torch.nn.functional.logsigmoid(-2.5 * (lp.mean() + 0.2))


def satimp_by_hand(lp: torch.Tensor) -> torch.Tensor:
    p = lp.detach().exp()
    return (p**0.5 * (1 - p) ** 2 * lp).mean()


BY_HAND = {
    "ga": (lambda lp: lp.mean(), {}),
    "ga, sum": (lambda lp: lp.sum(), {"length_norm": "sum"}),
    "npo": (lambda lp: lp.sum(), {}),  # at its start: the gradient of ascent on the sum
    "simnpo": (simnpo_by_hand, {"beta": 2.5, "margin": 0.2}),
    # The first token has a label that nothing predicts: it is no part of the length either.
    "simnpo, whole texts": (simnpo_by_hand, {"beta": 2.5, "margin": 0.2, "completion_only_loss": False}),
    "wga": (lambda lp: (lp.detach().exp() ** 0.5 * lp).mean(), {"beta": 0.5}),
    "satimp": (satimp_by_hand, {"beta": 0.5, "beta2": 2.0}),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_first_gradient_by_hand(name, tmp_path):
    value, changes = BY_HAND[name]
    trainer, found = first_step(
        tmp_path, forget_loss=name.split(",")[0], forget_weight=0.5, retain_weight=2.0, **changes
    )
    expected = gradient_by_hand(trainer, lambda lp, _: 0.5 * value(lp), lambda lp: -2.0 * lp.mean())
    assert (found - expected).norm() < 2e-4 * expected.norm()
    (entry,) = [entry for entry in trainer.state.log_history if "forget_nll" in entry]
    model, pairs = tiny_model(), trainer.pairs
    with torch.no_grad():
        for key in ("forget", "retain"):
            nll = [-log_probs_by_hand(model, pairs[row][key]).mean() for row in range(10)]
            assert entry[f"{key}_nll"] == pytest.approx(torch.stack(nll).mean().item(), rel=1e-5)
    assert entry["loss"] == pytest.approx(0.5 * entry["forget_loss"] + 2.0 * entry["retain_loss"], rel=1e-5)


def test_gradient_difference_with_retain_weight_zero_is_ascent(tmp_path):
    _, weighted = first_step(tmp_path, forget_loss="ga", retain_weight=0.0)
    _, ascent = first_step(tmp_path, forget_loss="ga", retain_loss="none")
    assert (weighted - ascent).norm() < 1e-5 * ascent.norm()


@pytest.mark.parametrize("name", ["npo", "dpo"])
def test_the_first_loss_is_two_over_beta_log_two_whatever_the_answers(name, tmp_path):
    forget = chats(10).add_column("alternative", ["I do not know."] * 10) if name == "dpo" else None
    trainer, _ = first_step(tmp_path, forget_loss=name, beta=0.25, forget=forget)
    assert logged(trainer, "forget_loss") == [pytest.approx(2 / 0.25 * math.log(2), rel=1e-5)]


def test_dpo_raises_the_alternative_and_lowers_the_answer(tmp_path):
    file = tmp_path / "idk.txt"
    file.write_text("I do not know.\n\nNo idea.\n")
    trainer, found = first_step(tmp_path, forget_loss="dpo", retain_loss="none", alternatives=str(file))
    answers = {row["completion"][0]["content"] for row in trainer.start._scored[1]}
    assert answers == {"I do not know.", "No idea."}
    model, total = tiny_model(), torch.zeros(())
    for row in range(10):
        pair = trainer.pairs[row]
        total = (
            total + log_probs_by_hand(model, pair["forget"]).sum() - log_probs_by_hand(model, pair["alternative"]).sum()
        )
    (total / 10).backward()
    expected = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert (found - expected).norm() < 2e-4 * expected.norm()


# ---------------------------------------------------------------------------------------------------------------------
# losses that need logits or hidden states


def first_loss(folder, **changes) -> tuple:
    trainer = unlearn(folder, per_device_train_batch_size=10, max_steps=1, **changes)
    trainer.train()
    return trainer, {key: logged(trainer, key)[0] for key in ("forget_loss", "retain_loss")}


def rows_by_hand(trainer, part: str):
    """Logits at the answer positions, answer tokens, and hidden states of the answer tokens after layer 0, by row."""
    model = tiny_model()
    with torch.no_grad():
        for row in range(10):
            example = trainer.pairs[row][part]
            labels = torch.tensor(example["labels"])[1:]
            out = model(torch.tensor([example["input_ids"]]), output_hidden_states=True)
            at = labels != -100
            yield out.logits[0, :-1][at], labels[at], out.hidden_states[1][0, 1:][at]


def test_ceu_leaves_the_first_answer_tokens_alone(tmp_path):
    trainer, found = first_loss(tmp_path, forget_loss="ceu", ceu_skip_tokens=3)
    expected = []
    for logits, labels, _ in rows_by_hand(trainer, "forget"):
        target = logits.scatter(1, labels[:, None], -torch.inf).softmax(-1)
        expected.append(-(target * logits.log_softmax(-1)).sum(-1)[3:].mean())
    assert found["forget_loss"] == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_undial_sees_answer_positions_only(tmp_path):
    trainer, found = first_loss(tmp_path, forget_loss="undial", beta=3.0, peft_config=lora())
    expected = []
    for logits, labels, _ in rows_by_hand(trainer, "forget"):
        target = (logits - 3.0 * torch.nn.functional.one_hot(labels, logits.size(1))).softmax(-1)
        expected.append(-(target * logits.log_softmax(-1)).sum(-1).mean())
    assert found["forget_loss"] == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_rmu_weighs_rows_alike_and_holds_hidden_states(tmp_path):
    trainer, found = first_loss(tmp_path, forget_loss="rmu", retain_loss="hidden", rmu_layer=0, peft_config=lora())
    expected = [(hidden - trainer._control).square().mean() for *_, hidden in rows_by_hand(trainer, "forget")]
    assert found["forget_loss"] == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    assert found["retain_loss"] == pytest.approx(0.0, abs=1e-10)


def test_kl_starts_at_nothing_and_grows(tmp_path):
    trainer = unlearn(tmp_path, forget_loss="ga", retain_loss="kl", peft_config=lora(), learning_rate=0.1)
    trainer.train()
    values = logged(trainer, "retain_loss")
    assert values[0] == pytest.approx(0.0, abs=1e-6) and values[-1] > 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# one batch, one denominator


def run(folder, rows, accumulation=1, **changes):
    trainer = unlearn(folder, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation, **changes)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "changes", [{}, {"forget_loss": "ceu"}, {"perturbation": "mix", "perturbation_points": 2}], ids=str
)
def test_accumulation_changes_nothing(changes, tmp_path):
    """Ten pairs in steps of four: the last step of each epoch is short."""
    one, other = run(tmp_path, 4, **changes), run(tmp_path, 1, 4, **changes)
    for key in ("loss", "forget_loss", "retain_loss", "grad_norm", "retain_nll"):
        assert logged(one, key) == pytest.approx(logged(other, key), rel=1e-4), key
    change = (parameters(one.model) - parameters(tiny_model())).norm()
    assert (parameters(one.model) - parameters(other.model)).norm() < 1e-4 * change


def test_padding_changes_nothing(tmp_path):
    plain = run(tmp_path, 4)
    padded = run(tmp_path, 4, pad_to_multiple_of=64)
    assert logged(padded, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    trainer = unlearn(tmp_path)
    examples = [trainer.pairs[row] for row in range(4)]
    batch = trainer.data_collator(examples)
    left = {name: batch[name].clone() for name in ("input_ids", "attention_mask", "labels")}
    for row, mask in enumerate(batch["attention_mask"]):
        shift = int((mask == 0).sum())
        for tensor in left.values():
            tensor[row] = tensor[row].roll(shift)
    with torch.no_grad():
        right = trainer.score(trainer.model, batch).log_prob("sum")
        torch.testing.assert_close(trainer.score(trainer.model, left).log_prob("sum"), right, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("forget_loss, reference", [("npo", [8, 8]), ("wga", [])])
def test_forget_and_retain_go_through_the_model_together(forget_loss, reference, tmp_path):
    trainer = unlearn(tmp_path, max_steps=2, forget_loss=forget_loss)
    sizes = []
    forward = trainer.model.forward
    trainer.model.forward = lambda *args, **kwargs: (sizes.append(len(kwargs["input_ids"])), forward(*args, **kwargs))[
        1
    ]
    trainer.train()
    assert sizes[-2:] == [8, 8], "four pairs"
    assert sizes[:-2] == reference, "ten reference rows, in batches of a training batch's size, the last one filled up"


def test_the_control_without_a_retain_loss_is_measured_but_not_held(tmp_path):
    held, free = (run(tmp_path, 4, forget_loss="ga", retain_loss=name, learning_rate=0.05) for name in ("nll", "none"))
    assert logged(free, "retain_nll")[0] == pytest.approx(logged(held, "retain_nll")[0], rel=1e-5)
    assert logged(free, "retain_nll")[-1] > logged(held, "retain_nll")[-1]
    assert logged(free, "loss") == pytest.approx(logged(free, "forget_loss"), rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_with_and_without_checkpointing(checkpointing, tmp_path):
    trainer = unlearn(tmp_path, peft_config=lora(), gradient_checkpointing=checkpointing, max_steps=2)
    trainer.train()
    moved = [p.abs().max() for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert len(moved) == 4 and min(moved) > 0
    assert min(logged(trainer, "grad_norm")) > 0


def test_training_never_builds_the_full_logits(tmp_path, monkeypatch):
    trainer = unlearn(tmp_path, max_steps=1)
    monkeypatch.setattr(trainer.model.lm_head, "forward", lambda *_: pytest.fail("the LM head was called"))
    trainer.train()
    assert trainer.state.global_step == 1


def test_logits_are_built_where_answers_are(tmp_path):
    trainer = unlearn(tmp_path, forget_loss="ceu", max_steps=1)
    seen = []
    trainer.model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    batch = trainer.data_collator([trainer.pairs[row] for row in range(4)])
    with torch.no_grad():
        trainer.score(trainer.model, batch)
    assert seen == [int((batch["labels"] != -100).any(0).sum())] and seen[0] < batch["labels"].shape[1] - 1


# ---------------------------------------------------------------------------------------------------------------------
# pairs, resume, budgets


class Draws(list):
    """Notes which rows every batch had."""

    def watch(self, trainer):
        collator = trainer.data_collator
        rows = {tuple(row["input_ids"]): number for number, row in enumerate(trainer.pairs._tables["retain"])}
        call = type(collator).torch_call

        def noting(collator, examples):
            if "retain" in examples[0]:
                self.extend((pair["row"], rows[tuple(pair["retain"]["input_ids"])]) for pair in examples)
            return call(collator, examples)

        trainer.data_collator.__class__ = type("Noting", (type(collator),), {"torch_call": noting})
        return trainer


def test_each_epoch_pairs_as_the_function_of_seed_and_epoch_says(tmp_path):
    draws = Draws()
    draws.watch(unlearn(tmp_path, num_train_epochs=3, seed=5)).train()
    for epoch in range(3):
        pairs = pair_rows(5, epoch, 10, 13)
        assert sorted(draws[10 * epoch : 10 * epoch + 10]) == [(row, pairs[row]) for row in range(10)]


RESUMABLE = {"optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module", params=[{}, {"perturbation": "mix"}], ids=["npo", "stable"])
def whole_run(request, tmp_path_factory):
    trainer = unlearn(tmp_path_factory.mktemp("whole"), **RESUMABLE, **request.param)
    trainer.train()
    return trainer, request.param


@pytest.mark.parametrize("step", [2, 3, 7])
def test_resume_anywhere_is_exact(step, whole_run, tmp_path):
    """Three steps an epoch: in the middle of the first and the third, and between two."""
    whole, changes = whole_run
    resumed = unlearn(tmp_path, **RESUMABLE, **changes)
    resumed.train(resume_from_checkpoint=Path(whole.args.output_dir) / f"checkpoint-{step}")
    assert torch.equal(parameters(resumed.model), parameters(whole.model))
    for key in ("loss", "forget_nll", "retain_nll"):
        assert logged(resumed, key) == logged(whole, key)


def test_checkpoints_carry_the_reference_and_know_whose_it_is(whole_run, tmp_path):
    whole, changes = whole_run
    checkpoint = Path(whole.args.output_dir) / "checkpoint-2"
    stored = load_file(checkpoint / REFERENCE_FILE)["log_probs"]
    model = tiny_model()
    with torch.no_grad():
        by_hand = [log_probs_by_hand(model, whole.pairs[row]["forget"]).sum() for row in range(10)]
    torch.testing.assert_close(stored, torch.stack(by_hand)[None], rtol=1e-5, atol=1e-4)
    for other in ({"forget": chats(10, start=50)}, {"model": tiny_model(seed=1)}, {"length_norm": "mean"}):
        with pytest.raises(RunFolderError, match="another start model"):
            unlearn(tmp_path, **RESUMABLE, **changes, **other).train(resume_from_checkpoint=checkpoint)
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(RunFolderError, match=f"has no {REFERENCE_FILE}"):
        unlearn(tmp_path, **RESUMABLE, **changes).train(resume_from_checkpoint=tmp_path / "checkpoint-2")


def test_a_forget_target_ends_the_training_and_a_resume_adds_nothing(tmp_path):
    strong = {"forget_loss": "ga", "retain_loss": "none", "learning_rate": 0.05, "num_train_epochs": 10}
    free = run(tmp_path / "free", 10, **strong)
    target = (logged(free, "forget_nll")[2] + logged(free, "forget_nll")[3]) / 2
    saved = strong | {"save_strategy": "steps", "save_steps": 1, "forget_nll_target": target}
    stopped = run(tmp_path, 10, **saved)
    assert stopped.state.global_step == 4 and logged(stopped, "stopped") == [1.0]
    again = unlearn(tmp_path, per_device_train_batch_size=10, **saved)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert torch.equal(parameters(again.model), parameters(stopped.model))


def test_a_retain_budget_ends_the_training(tmp_path):
    strong = {"forget_loss": "ga", "retain_loss": "none", "learning_rate": 0.05, "num_train_epochs": 10}
    trainer = run(tmp_path, 10, retain_nll_budget=5.8, **strong)
    values = logged(trainer, "retain_nll")
    assert len(values) < 10 and values[-1] > 5.8 >= max(values[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# what a user gets wrong


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"forget_loss": "GradDiff"}, "'GradDiff' is written `forget_loss: ga, retain_loss: nll` here"),
        ({"forget_loss": "npoo"}, "'npoo' is none of ga, npo"),
        ({"retain_loss": "mse"}, "`retain_loss`: 'mse' is none of"),
        ({"forget_loss": "ga", "beta": 0.1}, "`beta` does nothing in ga"),
        ({"margin": 1.0}, "`margin` does nothing in npo; it is a key of simnpo"),
        ({"beta": 0.0}, "`beta` must be above 0"),
        ({"forget_weight": -1.0}, "`forget_weight` must not be negative"),
        ({"length_norm": "median"}, "`length_norm`"),
        ({"forget_loss": "rmu", "length_norm": "sum"}, "rmu is a mean"),
        ({"retain_loss": "hidden"}, "goes with rmu only"),
        ({"packing": True}, "`packing` and `padding_free`"),
        ({"average_tokens_across_devices": False}, "its own denominator"),
        ({"train_sampling_strategy": "group_by_length"}, "use `random`"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "first epoch's pairs"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        UnlearnConfig(**settings(tmp_path, **changes))


def test_the_papers_constants_are_filled_in_and_recorded(tmp_path):
    for name, beta, norm in [("npo", 0.1, "sum"), ("simnpo", 4.5, "mean"), ("ga", None, "mean")]:
        args = UnlearnConfig(**settings(tmp_path, forget_loss=name))
        assert (args.beta, args.length_norm) == (beta, norm)


def test_data_that_cannot_be_paired_are_refused(tmp_path):
    with pytest.raises(DataError, match="`retain_data` is missing"):
        unlearn(tmp_path, retain=chats(3).select([]))
    with pytest.raises(DataError, match="a stream has none"):
        unlearn(tmp_path, forget=chats(3).to_iterable_dataset())
    with pytest.raises(DataError, match="dpo needs a preferred answer"):
        unlearn(tmp_path, forget_loss="dpo")
    with pytest.raises(DataError, match="no such file"):
        unlearn(tmp_path, forget_loss="dpo", alternatives=str(tmp_path / "none.txt"))
    with pytest.raises(DataError, match="cuts off every answer of the"):
        unlearn(tmp_path, max_length=5)
    with pytest.raises(RecipeError, match="the model has 2 layers"):
        unlearn(tmp_path, forget_loss="rmu")
