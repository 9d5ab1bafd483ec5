import json
import math

import pytest
import torch
from datasets import Dataset
from tiny import tiny_model
from tiny_sft import logged, parameters
from tiny_tools import TOKENIZER, ScriptedTurns, products, scripted_trainer, settings
from transformers import AutoModelForCausalLM

from afterglow.core.errors import CollapseError, DataError, RecipeError, RunFolderError
from afterglow.trainers.tool_rlvr import ToolRLVRTrainer
from afterglow.trainers.tool_rlvr_config import ToolRLVRConfig


def scored(trainer, count: int = 16) -> dict:
    """One scored generation batch, as the loss sees it."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return trainer._generate_and_score_completions([{}] * count)


def losses(trainer, batch: dict) -> torch.Tensor:
    """The loss of an optimizer step over the whole batch: the sum of its micro-batches."""
    size = len(batch["completion_ids"])
    total = torch.tensor(0.0)
    for start in range(0, size, 8):
        part = {k: v[start : start + 8] if torch.is_tensor(v) and v.dim() else v for k, v in batch.items()}
        total = total + trainer._compute_loss(trainer.model, part)
    return total


def token_log_probs(model, batch: dict) -> torch.Tensor:
    """Log-probabilities of the completion's tokens, from full logits."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1].float()
    log_probs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return log_probs[:, -batch["completion_ids"].shape[1] :]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    trainer = scripted_trainer(tmp_path_factory.mktemp("shared"))
    yield trainer
    trainer._sandbox.close()


@pytest.fixture(scope="module")
def batch(trainer):
    return scored(trainer)


def test_prompt_level_cispo_is_the_formula_by_hand(trainer, batch):
    rewards = torch.tensor([float(graded.correct) for graded in trainer._graded]).view(4, 4)
    own = torch.tensor([graded.rollout.n_model_tokens for graded in trainer._graded]).view(4, 4)
    kept = [p for p in range(4) if 0 < rewards[p].sum() < 4]
    assert len(kept) >= 2 and own.float().std() > 0
    centred = rewards - rewards.mean(1, keepdim=True)
    deviation = (sum((centred[p] ** 2).sum() for p in kept) / (4 * len(kept))).sqrt()
    log_probs = token_log_probs(trainer.model, batch)
    objective = torch.tensor(0.0)
    for p in kept:
        total = torch.tensor(0.0)
        for g in range(4):
            rollout = trainer._graded[4 * p + g].rollout
            mask = torch.tensor(rollout.mask, dtype=torch.float)
            # On policy the ratio is 1, which min(ratio, 5) leaves as it is.
            total = total + centred[p, g] / deviation * (mask * log_probs[4 * p + g, : len(mask)]).sum()
        objective = objective + total / own[p].sum() / len(kept)
    trainer.model.zero_grad()
    (-objective).backward()
    by_hand = torch.cat([p.grad.reshape(-1) for p in trainer.model.parameters()])
    trainer.model.zero_grad()
    loss = losses(trainer, batch)
    loss.backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in trainer.model.parameters()])
    assert loss.item() == pytest.approx(-objective.item(), rel=1e-5)
    assert (gradient - by_hand).norm() < 1e-5 * by_hand.norm()


def gradient_of_log_probs(trainer, batch) -> torch.Tensor:
    kept = []

    def model(**kwargs):
        outputs = trainer.model(**kwargs)
        outputs.log_probs.retain_grad()
        kept.append(outputs.log_probs)
        return outputs

    model_in_place, trainer.model.zero_grad = model, trainer.model.zero_grad
    trainer._compute_loss(model_in_place, batch).backward()
    trainer.model.zero_grad()
    return kept[0].grad[:, -batch["completion_ids"].shape[1] :]


def test_what_the_tool_wrote_has_exactly_no_gradient(trainer, batch):
    gradient = gradient_of_log_probs(trainer, batch)
    advantages = batch["advantages"]
    tool_tokens = 0
    for row, graded in enumerate(trainer._graded):
        mask = torch.tensor(graded.rollout.mask, dtype=torch.bool)
        of_row = gradient[row, : len(mask)]
        tool_tokens += int((~mask).sum())
        assert (of_row[~mask] == 0).all()
        assert ((of_row[mask] != 0) == (advantages[row] != 0)).all()
    assert tool_tokens > 100


def test_an_interruption_has_no_gradient_and_the_thoughts_have(tmp_path):
    trainer = scripted_trainer(
        tmp_path, script={"thinks": True, "rounds": lambda seed: 0}, think_tokens=40, tools="none"
    )
    assert trainer._sandbox is None
    batch = scored(trainer)
    gradient = gradient_of_log_probs(trainer, batch)
    for row, graded in enumerate(trainer._graded):
        rollout = graded.rollout
        assert rollout.interrupted and rollout.finish_reason == "stop"
        foreign = [token for token, own in zip(rollout.completion_ids, rollout.mask, strict=True) if not own]
        assert "time is up" in TOKENIZER.decode(foreign)
        mask = torch.tensor(rollout.mask, dtype=torch.bool)
        assert mask[:40].all() and not mask[40 : 40 + len(foreign)].any()
        assert (gradient[row, : len(mask)][~mask] == 0).all()
    assert gradient.abs().sum() > 0
    assert trainer._metrics["train"]["rollouts/interrupted"] == [1.0]


def test_groups_without_variance_change_neither_loss_nor_denominator(tmp_path):
    """The same rollouts with and without two prompts that are always right: same loss, same denominator."""
    with_them = scripted_trainer(tmp_path, script={"right": lambda seed: seed % 10 < 8})
    batch = scored(with_them)
    with_them._sandbox.close()
    flat = [p for p in range(4) if len({g.correct for g in with_them._graded[4 * p : 4 * p + 4]}) == 1]
    kept = torch.tensor([p not in flat for p in range(4) for _ in range(4)])
    assert flat, "the script has such a group"
    assert batch["num_items_in_batch"] == sum(
        g.rollout.n_model_tokens for g, keep in zip(with_them._graded, kept, strict=True) if keep
    )
    assert not batch["advantages"][~kept].any() and not batch["tool_mask"][~kept].any()
    without = {k: v[kept] if torch.is_tensor(v) and v.dim() else v for k, v in batch.items()}
    assert losses(with_them, batch).item() == pytest.approx(losses(with_them, without).item(), rel=1e-6)


def test_cut_off_and_void_rollouts_leave_the_update_and_stay_in_the_statistics(tmp_path):
    trainer = scripted_trainer(
        tmp_path, script={"rounds": lambda seed: 9 * (seed % 2), "right": lambda seed: seed % 4 < 2}, max_tool_calls=2
    )
    batch = scored(trainer)
    trainer._sandbox.close()
    cut = torch.tensor([graded.truncated for graded in trainer._graded])
    assert 0 < cut.sum() < 16
    assert {graded.rollout.finish_reason for graded in trainer._graded} == {"stop", "tool_limit", "length"}
    assert not batch["tool_mask"][cut].any() and batch["completion_mask"][cut].any()  # the attention is left alone
    metrics = trainer._metrics["train"]
    share = cut.float().mean().item()
    assert metrics["rollouts/truncated"] == metrics["completions/clipped_ratio"] == [share]
    assert metrics["reward"][0] == pytest.approx(sum(g.correct for g in trainer._graded) / 16)


def test_the_reward_is_the_last_turn_and_never_what_a_tool_printed(trainer, batch):
    for graded in trainer._graded:
        tool_turns = [m["content"] for m in graded.rollout.messages if m["role"] == "user"]
        assert all("boxed" not in text for text in tool_turns)
        last = graded.rollout.messages[-1]
        assert last["role"] == "assistant" and graded.grade.extracted in last["content"]


def test_resample_on_correct_samples_twice_and_keeps_g(tmp_path):
    trainer = scripted_trainer(tmp_path, resample_on_correct=True)
    batch = scored(trainer)
    trainer._sandbox.close()
    assert trainer._turns.batches[0] == 32 and len(batch["completion_ids"]) == 16


def test_unparsable_answers_are_left_out_and_counted(tmp_path):
    rows = [*products(8).to_list(), {"id": "bad", "prompt": [{"role": "user", "content": "?"}], "answer": r"\frac{"}]
    args = ToolRLVRConfig(**settings(tmp_path, tools="none"))
    with pytest.warns(UserWarning, match="1 of 9 prompts are left out.*'bad'"):
        trainer = ToolRLVRTrainer(tiny_model(), args, Dataset.from_list(rows), processing_class=TOKENIZER)
    assert len(trainer.train_dataset) == 8


def test_rows_without_tools_are_text_only(tmp_path):
    table = products(8).add_column("tools", [["python"], None] * 4)  # pyright: ignore
    args = ToolRLVRConfig(**settings(tmp_path))
    trainer = ToolRLVRTrainer(tiny_model(), args, table, processing_class=TOKENIZER)
    trainer._turns = ScriptedTurns(rounds=lambda seed: 0)
    scored(trainer)
    trainer._sandbox.close()
    asked = [TOKENIZER.decode(graded.rollout.prompt_ids) for graded in trainer._graded]
    for row, prompt in zip(trainer._rows, asked, strict=True):
        assert ("You can run Python" in prompt) == bool(row["tools"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "grpo"}, "loss_type is grpo: its denominator"),
        ({"scale_rewards": "global"}, "scale_rewards is 'global'"),
        ({"retire_pass_rate": 0.0}, "retire_pass_rate is 0.0"),
        ({"guard": "roll_bck"}, "guard is 'roll_bck'"),
        ({"guard_limits": {"truncatd": [1, 2]}}, "no alarm is called 'truncatd'"),
        ({"guard_limits": {"truncated": 0.1}}, "use \\[warn, stop\\]"),
        ({"max_tool_calling_iterations": 3}, "use max_tool_calls"),
        ({"routing_replay": True}, "routing_replay needs the engine"),
        ({"steps_per_generation": 4, "save_strategy": "steps", "save_steps": 1}, "save_steps is 1"),
        ({"max_tool_calls": 0}, "max_tool_calls is 0"),
        ({"sandbox_timeout": -1.0}, "sandbox_timeout"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(tmp_path, changes, message):
    with pytest.raises((RecipeError, ValueError), match=message):
        ToolRLVRConfig(**settings(tmp_path, **changes))


def test_data_that_cannot_work_are_refused(tmp_path):
    args = ToolRLVRConfig(**settings(tmp_path, tools="none"))
    with pytest.raises(DataError, match="column `answer` is missing"):
        ToolRLVRTrainer(tiny_model(), args, products(8).remove_columns("answer"), processing_class=TOKENIZER)
    with pytest.raises(DataError, match="3 prompts, and one generation batch takes 4"):
        ToolRLVRTrainer(tiny_model(), args, products(3), processing_class=TOKENIZER)


# ---------------------------------------------------------------------------------------------------------------------
# resume


def run(folder, resume=None, **changes):
    wanted = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    script = {"right": lambda seed: seed % 8 < 5}
    trainer = scripted_trainer(folder, rows=14, script=script, **(wanted | changes))
    trainer.dealt = []
    deal = trainer._deal
    trainer._deal = lambda count: [trainer.dealt.append(trainer.curriculum.dealt), deal(count)][1]
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_resumed_run_equals_an_undisturbed_one(tmp_path):
    whole = run(tmp_path / "whole", retire_pass_rate=0.75)
    resumed = run(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-2", retire_pass_rate=0.75)
    assert resumed.dealt == [2, 3] and whole.dealt == [0, 1, 2, 3]
    assert torch.equal(parameters(resumed.model), parameters(whole.model))
    assert not torch.equal(parameters(whole.model), parameters(tiny_model()))
    for key in ("loss", "grad_norm", "reward", "prompts/retired", "rollouts/calls"):
        assert logged(resumed, key)[-2:] == logged(whole, key)[-2:], key
    tables = [json.loads((tmp_path / name / "checkpoint-4" / "prompt_curriculum.json").read_text())
              for name in ("whole", "resumed")]  # fmt: skip
    assert tables[0] == tables[1] and tables[0]["dealt"] == 4
    moments = [torch.load(tmp_path / name / "checkpoint-4" / "optimizer.pt")["state"] for name in ("whole", "resumed")]
    assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[0])
    whole.args.output_dir = str(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match="no whole checkpoint"):
        whole.train(resume_from_checkpoint=True)


def test_a_run_ends_when_nothing_is_left_to_learn(tmp_path):
    trainer = scripted_trainer(tmp_path, script={"right": lambda seed: True, "rounds": lambda seed: 0}, max_steps=9)
    with pytest.warns(UserWarning, match="mastered"):
        trainer.train()
    assert trainer.state.global_step == 2 and trainer.curriculum.retired.all()
    assert logged(trainer, "loss") == [0.0, 0.0]


# ---------------------------------------------------------------------------------------------------------------------
# the guard


def collapsing(folder, **changes):
    """A trainer whose policy is right now and then for four steps, and never again."""
    right = [True]
    script = {"right": lambda seed: right[0] and seed % 5 < 2, "rounds": lambda seed: 0}
    trainer = scripted_trainer(
        folder, script=script, max_steps=12, guard_span=2, save_strategy="steps", save_steps=1, retire_pass_rate=None,
        **changes,
    )  # fmt: skip
    step = trainer.training_step
    trainer.training_step = lambda *a: [right.__setitem__(0, trainer.state.global_step < 4), step(*a)][1]
    return trainer


def test_a_collapse_is_stopped_and_names_the_last_good_checkpoint(tmp_path):
    trainer = collapsing(tmp_path, guard="stop")
    with pytest.raises(CollapseError, match=r"reward is .* below .* of its best.*checkpoint-\d"):
        trainer.train()
    assert 4 < trainer.state.global_step < 9
    assert trainer.last_good == str(tmp_path / f"checkpoint-{trainer.state.global_step - 1}")


def test_a_rollback_ends_with_the_weights_of_the_last_good_checkpoint(tmp_path):
    trainer = collapsing(tmp_path, guard="roll_back", save_total_limit=1, drop_zero_variance=False)
    with pytest.warns(UserWarning, match="The run ends with the weights of"):
        trainer.train()
    assert trainer.last_good is not None and 4 < trainer.state.global_step < 9
    good = AutoModelForCausalLM.from_pretrained(trainer.last_good)
    assert torch.equal(parameters(trainer.model), parameters(good))
    assert logged(trainer, "guard/stops")[-1] == 1.0


def test_too_high_a_learning_rate_is_stopped(tmp_path):
    """The real thing: the model's own samples, a learning rate that breaks it, the entropy or the gradient says so."""
    args = ToolRLVRConfig(
        **settings(
            tmp_path, tools="none", max_completion_length=12, learning_rate=300.0, max_steps=20, guard="stop",
            guard_span=1, mask_truncated_completions=False, mask_void_turns=False, max_grad_norm=0.0,
        )
    )  # fmt: skip
    trainer = ToolRLVRTrainer(tiny_model(), args, products(8), processing_class=TOKENIZER)
    rng = iter(range(10**6))
    import afterglow.trainers.rollouts as rollouts

    trainer.grader.grade = lambda response, gold: rollouts.Grade("correct" if next(rng) % 3 == 0 else "wrong", "", None)
    with pytest.raises(CollapseError, match="collapsed at step"):
        trainer.train()
    assert trainer.state.global_step < 20 and math.isfinite(args.learning_rate)
