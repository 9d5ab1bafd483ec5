"""Configuration of `ToolRLVRTrainer`: TRL's `GRPOConfig`, the rollouts, the sandbox, the guard, and what TRL lacks."""

from dataclasses import dataclass, field
from typing import Literal

from trl.trainer.grpo_config import GRPOConfig

from ..core.answer_extraction import Extract
from ..core.errors import RecipeError
from ..core.rollout import RolloutConfig
from ..core.sandbox import SandboxConfig
from .collapse_guard import CollapseGuardConfig

TOKEN_SUMS = ("cispo", "dapo", "vespo")  # TRL's losses that are a sum over tokens divided by the trained tokens


@dataclass
class ToolRewardConfig:
    """Which rollouts may call, what is right, and which of them train: the same however they are scheduled."""

    tools: Literal["python", "none"] = field(
        default="python",
        metadata={"help": "`python`: the model may call it, except in rows whose column `tools` is empty; `none`: text "
                          "only."},
    )  # fmt: skip
    extract: Extract = field(
        default="boxed",
        metadata={"help": "Where a final answer is looked for, in the last turn only: `boxed`, `marked` or `last`."},
    )
    mask_void_turns: bool = field(
        default=True,
        metadata={"help": "Rollouts with a turn that neither calls nor answers leave the update and stay in their "
                          "group's mean."},
    )  # fmt: skip
    mask_truncated_completions: bool = field(
        default=True,
        metadata={"help": "Rollouts that did not end by themselves (length, tool limit, sandbox error) leave the "
                          "update and stay in their group's mean. TRL's own sees only a missing end token."},
    )  # fmt: skip
    retire_pass_rate: float | None = field(
        default=0.9, metadata={"help": "A prompt whose pass rate reaches this is never shown again; null: none is."}
    )

    def __post_init__(self):
        problems = []
        for name, known in (("tools", ("python", "none")), ("extract", ("boxed", "marked", "last"))):
            if getattr(self, name) not in known:
                problems.append(f"{name} is {getattr(self, name)!r}: use one of {', '.join(known)}")
        if self.retire_pass_rate is not None and not 0 < self.retire_pass_rate <= 1:
            problems.append(f"retire_pass_rate is {self.retire_pass_rate}: above 0, at most 1; null retires none")
        if problems:
            raise RecipeError("; ".join(problems))


@dataclass
class ToolRLVRConfig(ToolRewardConfig, CollapseGuardConfig, RolloutConfig, SandboxConfig, GRPOConfig):
    """Configuration of `ToolRLVRTrainer`.

    Where a default differs from TRL's, it is that of ScaleRL (arXiv 2510.13786) or of the tool recipes that followed
    ReTool; the header of each recipe names what differs from its paper.
    """

    loss_aggregation: Literal["prompt", "token"] = field(
        default="prompt",
        metadata={"help": "What the loss is a mean over, in the whole generation batch: `prompt` (the mean over "
                          "prompts of the mean over their tokens) or `token`."},
    )  # fmt: skip
    drop_zero_variance: bool = field(
        default=True,
        metadata={"help": "Groups with equal rewards leave the loss and its denominator; false: only the loss."},
    )
    resample_on_correct: bool = field(
        default=False,
        metadata={"help": "Sample twice `num_generations` rollouts and train on half: wrong ones at random, right ones "
                          "rather with few failed calls (GRPO-RoC, arXiv 2508.20722)."},
    )  # fmt: skip
    routing_replay: bool = field(
        default=False,
        metadata={"help": "Mixture of experts with colocated vLLM: train with the experts that the engine chose (R3, "
                          "arXiv 2510.11370)."},
    )  # fmt: skip

    # Other defaults than TRL's.
    loss_type: str = field(
        default="cispo",
        metadata={"help": "Loss of TRL's GRPOTrainer; prompt aggregation needs one of " + ", ".join(TOKEN_SUMS) + "."},
    )
    epsilon_high: float | None = field(
        default=5.0,
        metadata={"help": "`cispo`: largest ratio; `dapo`: upper clip, 0.28 is usual. null: the same as `epsilon`."},
    )
    scale_rewards: str = field(
        default="batch",
        metadata={
            "help": "Centred rewards are divided by their deviation in the kept groups of the batch (`batch`; TRL's "
            "own divides by that of the raw rewards), in the `group`, or by nothing (`none`).",
            "choices": ["batch", "group", "none"],
        },
    )
    num_generations: int | None = field(default=16, metadata={"help": "Rollouts of a prompt."})
    max_completion_length: int | None = field(
        default=16_384, metadata={"help": "Longest rollout in tokens, results of the tool included."}
    )
    vllm_importance_sampling_mode: str = field(
        default="token_truncate",
        metadata={"help": "Correction of the difference between engine and trainer. TRL's default multiplies the "
                          "ratios of a whole rollout, which drops most long ones."},
    )  # fmt: skip
    cast_lm_head_to_fp32: bool = field(
        default=True, metadata={"help": "Logits in float32, in the trainer and in colocated vLLM."}
    )
    adam_epsilon: float = field(default=1e-15, metadata={"help": "Epsilon of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    lr_scheduler_type: str = field(
        default="constant_with_warmup", metadata={"help": "The learning rate's schedule, by its name in transformers."}
    )
    warmup_steps: float = field(default=100, metadata={"help": "Steps in which the learning rate rises from 0."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between two logs; the guard looks at each."})

    def __post_init__(self):
        """Refuse what cannot work or would be something else than it says; then what TRL checks."""
        ToolRewardConfig.__post_init__(self)
        CollapseGuardConfig.__post_init__(self)
        RolloutConfig.__post_init__(self)
        SandboxConfig.__post_init__(self)
        self.scale_rewards = {True: "group", False: "none"}.get(self.scale_rewards, self.scale_rewards)  # pyright: ignore[reportArgumentType, reportCallIssue]
        problems = []
        for name, known in (
            ("loss_aggregation", ("prompt", "token")),
            ("scale_rewards", ("batch", "group", "none")),
        ):
            if getattr(self, name) not in known:
                problems.append(f"{name} is {getattr(self, name)!r}: use one of {', '.join(known)}")
        if self.loss_type not in TOKEN_SUMS:
            problems.append(
                f"loss_type is {self.loss_type}: its denominator is not the trained tokens of the global batch, so "
                f"what is masked would still count. Use one of {', '.join(TOKEN_SUMS)}"
            )
        if self.routing_replay and not (self.use_vllm and self.vllm_mode == "colocate"):
            problems.append("routing_replay needs the engine in the trainer: use_vllm: true, vllm_mode: colocate")
        if self.use_transformers_continuous_batching:
            problems.append("use_transformers_continuous_batching: rollouts have their own batching; delete the key")
        if self.max_tool_calling_iterations is not None:
            problems.append("max_tool_calling_iterations has no effect here: use max_tool_calls")
        if problems:
            raise RecipeError("; ".join(problems))
        GRPOConfig.__post_init__(self)
        per_generation, group = int(self.steps_per_generation or 1), int(self.num_generations or 1)
        window = per_generation * self.num_iterations
        saves = self.save_steps * self.gradient_accumulation_steps
        if self.save_strategy == "steps" and window > self.gradient_accumulation_steps and saves % window:
            problems.append(
                f"save_steps is {self.save_steps:g}, but rollouts are used for {window} micro-batches "
                f"(steps_per_generation x num_iterations), {window / self.gradient_accumulation_steps:g} steps: a "
                "checkpoint in between would lose them. Save every so many steps, or a multiple"
            )
        local = self.per_device_train_batch_size * per_generation
        if self.resample_on_correct and local % group:
            problems.append(
                f"resample_on_correct chooses within one process: per_device_train_batch_size x steps_per_generation "
                f"is {local}, which must be a multiple of num_generations ({group})"
            )
        if problems:
            raise RecipeError("; ".join(problems))
