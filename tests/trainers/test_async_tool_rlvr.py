"""The streamed trainer on a CPU: a scripted engine for the server, no weight transfer, TRL's attention written out."""

import json

import numpy as np
import pytest
import torch
from tiny import save_tiny
from tiny_tools import TOKENIZER, ScriptedTurns, products
from trl.experimental.async_grpo import async_grpo_trainer, packing

from afterglow.core.errors import CollapseError, GenerationError, RecipeError
from afterglow.core.generation import BatchStream, Engine
from afterglow.core.grading import Grade
from afterglow.core.rollout import Rollout
from afterglow.trainers import async_tool_rlvr
from afterglow.trainers.async_tool_rlvr import AsyncToolRLVRConfig, AsyncToolRLVRTrainer
from afterglow.trainers.rollouts import GradedRollout
from afterglow.trainers.streamed_rollouts import FILE, group_samples


class ScriptedServer(Engine):
    """A server whose policy follows the script of `tiny_tools`."""

    tokenizer, max_context = TOKENIZER, 1024

    def __init__(self, **script):
        self._turns = ScriptedTurns(**script)
        self.failure: Exception | None = None
        self._seen: set[str] = set()
        self.dealt: list[str] = []  # prompts, as their first rollouts came

    def generate(self, requests):
        if self.failure:
            raise self.failure
        for request in requests:
            if request.key.endswith("/0") and request.key not in self._seen:
                self._seen.add(request.key)
                self.dealt.append(TOKENIZER.decode(list(request.prompt_ids)))
        return iter(self._turns(requests))

    def open_stream(self):
        return BatchStream(self)

    def load_weights(self, model):
        raise NotImplementedError

    def close(self):
        pass


class NoTransfer:
    """Counts what a weight transfer would do."""

    def __init__(self):
        self.sent = 0

    def init_weight_transfer(self):
        pass

    pause = resume = destroy = init_weight_transfer

    def send_weights(self, iterator):
        self.sent += sum(1 for _ in iterator) > 0


class PlainAttention:
    """What TRL takes from FlashAttention 3, one segment after the other: a segment's queries end its own path."""

    @staticmethod
    def flash_attn_varlen_func(query, key, value, ends_q, ends_k, longest_q, longest_k, softmax_scale, causal, **_):
        groups, outputs = query.shape[1] // key.shape[1], []
        for i in range(len(ends_q) - 1):
            q = query[ends_q[i] : ends_q[i + 1]]
            k, v = (x[ends_k[i] : ends_k[i + 1]].repeat_interleave(groups, 1) for x in (key, value))
            scores = torch.einsum("qhd,khd->hqk", q, k) * softmax_scale
            hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
            outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
        return torch.cat(outputs)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture
def make(model, tmp_path, monkeypatch):
    """Make a trainer whose server is the script."""
    monkeypatch.setattr(packing, "_flash_attn", PlainAttention)
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)  # asks for a GPU's name
    monkeypatch.setattr(async_tool_rlvr, "check_gpu", lambda: None)

    def build(script=None, **changes):
        server = ScriptedServer(**(script or {}))
        monkeypatch.setattr(async_tool_rlvr, "open_engine", lambda config: server)
        settings = {
            "output_dir": str(tmp_path / "run"), "max_steps": 2, "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2, "num_generations": 4, "max_completion_length": 400, "answer_tokens": 32,
            "tool_result_tokens": 64, "tool_protocol": "code_block", "learning_rate": 0.05, "optim": "sgd",
            "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False,
            "gradient_checkpointing": False, "dataloader_pin_memory": False, "guard": "off", "token_budget": 0,
            "max_staleness": 100, "max_inflight_tasks": 16, "queue_maxsize": 16, "retire_pass_rate": None,
        }  # fmt: skip
        trainer = AsyncToolRLVRTrainer(
            model, AsyncToolRLVRConfig(**settings | changes), products(), weight_transfer=NoTransfer()
        )
        return trainer, server

    return build


def graded(prompt, completion, mask, right, reason="stop", void=False):
    rollout = Rollout(
        prompt, completion, mask, [-0.5 * m for m in mask], [], reason, 0, 0, 0, None, 0.0, False, void
    )  # fmt: skip
    return GradedRollout(rollout, Grade("correct" if right else "wrong", "", "1" if right else "2"))


def test_samples_of_a_group_by_hand():
    group = [
        graded([7, 8], [1, 2, 3], [1, 0, 1], True),
        graded([7, 8], [4, 5], [1, 1], False),
        graded([7, 8], [4, 6], [1, 1], False, void=True),  # in the mean, not in the update
        graded([7, 8], [4, 9], [1, 1], False, reason="length"),
    ]
    samples, shown = group_samples(group, [3, 4, 4, 4], 11, "group", mask_truncated=True, mask_void=True)
    deviation = (0.75**2 + 3 * 0.25**2) ** 0.5 / 2
    assert [sample.advantage for sample in samples] == pytest.approx([0.75 / deviation, -0.25 / deviation])
    assert [sample.model_version for sample in samples] == [3, 4] and {s.group_id for s in samples} == {11}
    first = samples[0]
    assert first.input_ids.tolist() == [7, 8, 1, 2, 3] and first.completion_mask.tolist() == [0, 0, 1, 0, 1]
    assert first.old_log_probs.dtype == np.float32 and first.old_log_probs.tolist() == [0, 0, -0.5, 0, -0.5]
    assert shown["reward"] == 0.25 and shown["rollouts/trained"] == 0.5 and shown["rollouts/truncated"] == 0.25


def test_a_group_of_equal_rewards_has_no_sample_and_counts_in_the_metrics():
    samples, shown = group_samples([graded([7], [1], [1], True)] * 2, [0, 0], 0, "none", True, True)
    assert samples == [] and shown["reward"] == 1 and shown["groups/all_correct"] == 1


def test_training_streams_and_divides_by_the_tokens_of_the_step(make, monkeypatch):
    trainer, _ = make()
    steps = [[]]
    plain = async_tool_rlvr.AsyncGRPOTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = plain(self, model, inputs, *args, **kwargs)
        tokens = float(inputs["global_n_tokens"][0])
        steps[-1].append((loss.item() * tokens * self.current_gradient_accumulation_steps, tokens))
        if len(steps[-1]) == 2:
            steps.append([])
        return loss

    monkeypatch.setattr(async_tool_rlvr.AsyncGRPOTrainer, "compute_loss", compute_loss)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert any((p != q).any() for p, q in zip(trainer.model.parameters(), before, strict=True))
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    by_hand = [sum(total for total, _ in step) / sum(tokens for _, tokens in step) for step in steps[:2]]
    assert losses == pytest.approx(by_hand, rel=1e-4)
    assert len({tokens for _, tokens in steps[0]}) == 2  # else any denominator would do
    logged = trainer.state.log_history[0]
    assert 0 < logged["reward"] < 1 and logged["rollouts/calls"] > 0 and logged["rollouts/truncated"] == 0
    assert trainer.weight_transfer.sent == 3  # before the first step, and after each
    assert not trainer.rollout_worker._thread.is_alive()


def test_what_ends_the_thread_reaches_the_training(make):
    trainer, server = make()
    server.failure = GenerationError("the server is gone")
    worker = trainer.rollout_worker
    worker.start()
    worker._thread.join()
    with pytest.raises(GenerationError, match="the server is gone"):
        worker.check_health(300)


def test_a_silent_server_is_an_error(make):
    worker = make()[0].rollout_worker
    worker.check_health(300)
    with pytest.raises(GenerationError, match="no rollout has finished for"):
        worker.check_health(-1)


def test_the_guard_looks_at_what_the_rollouts_showed(make):
    trainer, _ = make(guard="stop", guard_span=1, guard_limits={"truncated": [None, -1]})
    with pytest.raises(CollapseError, match="step 1: truncated: rollouts/truncated is 0, above -1"):
        trainer.train()


def test_a_resumed_run_deals_first_what_was_under_way(make, tmp_path):
    trainer, _ = make(save_strategy="steps", save_steps=1, max_steps=1)
    trainer.train()
    pending = json.loads((tmp_path / "run" / "checkpoint-1" / FILE).read_text())["pending"]
    resumed, server = make(save_strategy="no")
    resumed.train(True)
    of_prompt = {TOKENIZER.decode(resumed.rollout_worker._protocols[True].encode(row["prompt"])): row["id"]
                 for row in resumed.train_dataset}  # fmt: skip
    assert resumed.state.global_step == 2 and pending
    assert [of_prompt[prompt] for prompt in server.dealt[: len(pending)]] == pending


def test_a_machine_without_a_gpu_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = AsyncToolRLVRConfig(str(tmp_path), max_steps=1, use_cpu=True, bf16=False)
    with pytest.raises(RecipeError, match="need a GPU"):
        AsyncToolRLVRTrainer(model, args, products())


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("max_steps", -1, "max_steps is missing"),
        ("scale_rewards", "batch", "use group or none"),
        ("probe_every", 5, "probe_every"),
        ("tools", "perl", "use one of python, none"),
    ],
)
def test_what_streaming_cannot_do_is_refused(tmp_path, key, value, says):
    with pytest.raises(RecipeError, match=says):
        AsyncToolRLVRConfig(**{"output_dir": str(tmp_path), "max_steps": 1, "use_cpu": True, "bf16": False, key: value})
