import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_glow import glow
from tiny_sft import chats, parameters
from transformers import TrainerControl, TrainerState

from afterglow.core.errors import DataError, RecipeError
from afterglow.core.generation import Completion
from afterglow.trainers import heldout
from afterglow.trainers.heldout import HELDOUT_FILE, HeldoutEvaluation, select, should_stop, summarise


def row(step, score, tokens=100.0, truncated=0.0, error=0.02) -> dict:
    return {"step": step, "pass@k": score, "standard_error": error, "mean_tokens": tokens, "truncated": truncated}


def test_summary_by_hand():
    found = summarise({"a": 1, "b": 4}, tokens=80, truncated=2, samples=4, k=2)
    assert found["pass@k"] == 0.75 and found["pass@1"] == 5 / 8
    assert found["standard_error"] == pytest.approx(0.25)
    assert (found["mean_tokens"], found["truncated"]) == (10, 0.25)


def test_the_row_of_the_selected_checkpoint():
    rows = [row(1, 0.69, 100), row(2, 0.70, 120), row(3, 0.9, truncated=0.2)]
    assert select(rows) == rows[0], "as good within the error, and shorter"
    assert select(rows[2:]) is None, "cut"
    assert select([]) is None


def test_training_stops_after_so_many_checkpoints_without_a_new_best():
    scores = [row(1, 0.5), row(2, 0.6), row(3, 0.6), row(4, 0.55)]
    assert not should_stop(scores[:3], 2) and should_stop(scores, 2)
    assert not should_stop(scores, None) and not should_stop(scores, 4)
    assert not should_stop([*scores, row(5, 0.7)], 2)


@pytest.fixture
def problems(tmp_path):
    rows = [{"problem_id": f"p{i}", "prompt": f"{i}+1?", "answer": str(i + 1)} for i in range(6)]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"heldout_problems": str(path), "heldout_samples": 2, "heldout_k": 2, "heldout_max_tokens": 8}


class Scripted:
    """An engine whose answers are right for as many problems as the script says for the checkpoint's step."""

    RIGHT = {1: 2, 2: 5, 3: 3, 4: 3, 5: 6}  # noqa: RUF012

    def __init__(self, config):
        self.load_weights(config.model)
        self.closed = False

    def load_weights(self, model):
        from afterglow.core.checkpoint import read_checkpoint

        self.tokenizer, self.step = read_checkpoint(model).tokenizer, int(model.rsplit("-", 1)[1])

    def generate(self, requests):
        for request in requests:
            number = int(request.key.split("/")[0][1:])
            answer = number + 1 if number < self.RIGHT[self.step] else -1
            yield Completion(request.key, [1] * 5, rf"\boxed{{{answer}}}", "stop")

    def close(self):
        self.closed = True


RUN = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-2, "num_train_epochs": 2}


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / HELDOUT_FILE).read_text().splitlines()]


def test_training_ends_with_the_best_checkpoint_and_stops_when_nothing_improves(problems, tmp_path, monkeypatch):
    monkeypatch.setattr(heldout, "open_engine", Scripted)
    trainer = glow(tmp_path / "run", chats(10), **RUN, **problems, heldout_patience=2)
    trainer.train()
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4], "of six"
    assert [row["pass@k"] for row in rows] == pytest.approx([2 / 6, 5 / 6, 3 / 6, 3 / 6])
    best = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    now = {name: p for name, p in trainer.model.named_parameters() if name in best}
    assert now and all(torch.equal(p, best[name]) for name, p in now.items())
    # Killed after checkpoint 3 and started again: the same rows, the same model.
    resumed = glow(tmp_path / "run", chats(10), **RUN, **problems, heldout_patience=2)
    resumed.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-3")
    assert rows_of(tmp_path / "run") == rows
    assert torch.equal(parameters(resumed.model), parameters(trainer.model))


def test_a_tiny_model_is_really_sampled(problems, tmp_path):
    keys = RUN | problems | {"save_steps": 3}
    trainer = glow(tmp_path / "run", chats(10), **keys)
    trainer.train()
    plain = glow(tmp_path / "plain", chats(10), **RUN | {"save_strategy": "no"})
    plain.train()
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [3, 6]
    assert all(0 < row["mean_tokens"] <= 8 and row["problems"] == 6 and row["samples"] == 2 for row in rows)
    assert trainer.state.log_history[-2]["loss"] == plain.state.log_history[-2]["loss"], "sampling does not disturb"


def test_a_stop_is_remembered(problems, tmp_path, monkeypatch):
    args = SimpleNamespace(output_dir=str(tmp_path), heldout_patience=1, **problems, heldout_columns={})
    (tmp_path / HELDOUT_FILE).write_text("".join(json.dumps(row(step, 0.5)) + "\n" for step in (2, 4, 6)))
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    evaluation, state, control = HeldoutEvaluation(args, 0), TrainerState(global_step=4), TrainerControl()
    evaluation.on_train_begin(args, state, control)
    assert control.should_training_stop and len(rows_of(tmp_path)) == 2, "the row of step 6 will be made again"
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2").rmdir()
    evaluation.on_train_begin(args, state, control)
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-4"), "one that is still there"


def test_a_training_whose_samples_are_all_cut_says_so(problems, tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path), heldout_patience=None, **problems, heldout_columns={})
    (tmp_path / HELDOUT_FILE).write_text(json.dumps(row(2, 0.5, truncated=0.06)) + "\n")
    (tmp_path / "checkpoint-2").mkdir()
    evaluation, state, control = HeldoutEvaluation(args, 0), TrainerState(global_step=2), TrainerControl()
    evaluation.on_train_begin(args, state, control)
    assert state.best_model_checkpoint is None
    with pytest.warns(UserWarning, match="none was selected and the last weights remain"):
        evaluation.on_train_end(args, state, control)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"heldout_k": 3}, RecipeError, "`heldout_k: 3` must be from 1 to `heldout_samples: 2`"),
        ({"heldout_patience": 0}, RecipeError, "`heldout_patience` must be at least 1"),
        ({"heldout_temperature": 0.0}, RecipeError, "draws the same sample"),
        ({"save_strategy": "no"}, RecipeError, "set `save_strategy`"),
        ({"heldout_problems": None, "heldout_patience": 1}, RecipeError, "does nothing without `heldout_problems`"),
        ({"heldout_engine": "server"}, RecipeError, "`heldout_engine`: 'server' is none of"),
        ({"heldout_problems": "nowhere.jsonl"}, DataError, "no such file"),
    ],
)
def test_bad_keys_are_refused(changes, error, message, problems, tmp_path):
    with pytest.raises(error, match=message):
        glow(tmp_path / "run", chats(4), **RUN | problems | changes)
