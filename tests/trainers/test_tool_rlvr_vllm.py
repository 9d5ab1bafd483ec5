"""RLVR with colocated vLLM: it must sample from the very weights that are trained, on a CPU too."""

import pytest
from tiny import save_tiny
from tiny_sft import logged
from tiny_tools import products, settings

from afterglow.trainers.tool_rlvr import ToolRLVRTrainer
from afterglow.trainers.tool_rlvr_config import ToolRLVRConfig

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_the_engine_follows_the_weights(tmp_path):
    """At a rate that moves the policy far each step, stale weights would show as a divergence of nats."""
    model = save_tiny(tmp_path / "model")
    changes = {"use_vllm": True, "tools": "none", "max_completion_length": 12, "learning_rate": 0.5, "max_steps": 4}
    masks = {"mask_truncated_completions": False, "mask_void_turns": False, "drop_zero_variance": False}
    args = ToolRLVRConfig(**settings(tmp_path / "run", **changes, **masks, vllm_max_model_length=256))
    trainer = ToolRLVRTrainer(str(model), args, products(8))
    right = iter(range(10**6))

    class Verdict:
        correct, verdict, extracted = True, "correct", None

    def grade(response, gold):
        verdict = Verdict()
        verdict.verdict = "correct" if next(right) % 3 == 0 else "wrong"
        return verdict

    trainer.grader.grade = grade
    trainer.train()
    assert max(logged(trainer, "sampling/kl")) < 1e-6
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-3
    assert logged(trainer, "rollouts/calls") == [0.0] * 4
