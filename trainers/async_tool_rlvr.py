"""RLVR with a Python tool whose rollouts stream from a vLLM server while the policy trains, on TRL's AsyncGRPOTrainer.

Environment, rewards, masks and guard are those of `tool_rlvr`; what differs is when rollouts are made. TRL packs the
samples, computes PPO's clipped loss, pauses the server and sends it the weights. Ours are the rollouts
(`streamed_rollouts`, through TRL's `RolloutWorkerProtocol`) and the denominator: TRL divides each micro-batch by its
own tokens, and this trainer a step by the tokens of the whole step, in all processes.

What streaming rules out, and `tool_rlvr` has: advantages by the deviation of the batch and the mean over prompts (a
group is scored before it is known with which others it trains), CISPO, resampling, the probe without tools, and a
resumed run that equals an undisturbed one.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import TrainerCallback
from trl.experimental.async_grpo.async_grpo_config import AsyncGRPOConfig
from trl.experimental.async_grpo.async_grpo_trainer import AsyncGRPOTrainer

from ..core.checkpoint import read_checkpoint
from ..core.errors import RecipeError
from ..core.generation import EngineConfig, open_engine
from ..core.grading import Grader
from ..core.rollout import RolloutConfig
from ..core.sandbox import SandboxConfig, open_sandbox
from ..core.tool_protocol import open_protocol
from .checkpoints import MarkComplete, checkpoint_folder, checkpoint_to_resume
from .collapse_guard import CollapseGuard, CollapseGuardConfig, heed
from .rollouts import any_has_tools, gradable_rows
from .streamed_rollouts import StreamedRollouts
from .tool_rlvr_config import ToolRewardConfig


@dataclass
class AsyncToolRLVRConfig(ToolRewardConfig, CollapseGuardConfig, RolloutConfig, SandboxConfig, AsyncGRPOConfig):
    """Configuration of `AsyncToolRLVRTrainer`: TRL's `AsyncGRPOConfig`, the rollouts, the sandbox and the guard."""

    scale_rewards: Literal["group", "none"] = field(
        default="group",
        metadata={"help": "Centred rewards are divided by their deviation in the `group`, or by nothing (`none`)."},
    )
    num_generations: int = field(default=16, metadata={"help": "Rollouts of a prompt."})
    max_completion_length: int = field(
        default=16_384, metadata={"help": "Longest rollout in tokens, results of the tool included."}
    )
    epsilon_high: float | None = field(
        default=0.28, metadata={"help": "Upper clip of the ratio; null: the same as `epsilon`."}
    )

    def __post_init__(self):
        """Refuse what cannot work; then what TRL checks."""
        ToolRewardConfig.__post_init__(self)
        CollapseGuardConfig.__post_init__(self)
        RolloutConfig.__post_init__(self)
        SandboxConfig.__post_init__(self)
        problems = []
        if self.scale_rewards not in ("group", "none"):
            problems.append(f"scale_rewards is {self.scale_rewards!r}: use group or none")
        if self.max_steps < 1:
            problems.append("max_steps is missing: prompts are dealt without end, so that only steps end a run")
        if self.probe_every:
            problems.append("probe_every: this trainer has no engine for a probe; evaluate the checkpoints instead")
        if self.max_tool_calling_iterations is not None:
            problems.append("max_tool_calling_iterations has no effect here: use max_tool_calls")
        if self.repetition_penalty != 1.0:
            problems.append("repetition_penalty: the policy that samples would not be the one that is trained")
        if problems:
            raise RecipeError("; ".join(problems))
        AsyncGRPOConfig.__post_init__(self)


def check_gpu() -> None:
    """Refuse a machine without a GPU: there TRL's trainer would fail while it is built.

    Raises:
        RecipeError: there is none.
    """
    if not torch.cuda.is_available():
        raise RecipeError(
            "async_tool_rlvr: weights travel to the server by NCCL and rows are packed for FlashAttention 3, both of "
            "which need a GPU. Use `method: tool_rlvr`, which works without one."
        )


class _Follow(TrainerCallback):
    """Lets the guard look at each log, and writes what a resumed run needs beside each checkpoint."""

    def __init__(self, trainer: "AsyncToolRLVRTrainer"):
        self.trainer = trainer

    def on_log(self, args: Any, state, control, logs=None, **kwargs):
        if logs and "loss" in logs and args.guard != "off":
            seen = [dict(logs)]
            if args.world_size > 1:
                broadcast_object_list(seen)  # only the first process sees the rollouts
            heed(self.trainer, self.trainer.collapse_guard.look(seen[0]), logs)

    def on_save(self, args: Any, state, control, **kwargs):
        trainer, folder = self.trainer, checkpoint_folder(args, state)
        if trainer.rollout_worker is not None:
            trainer.rollout_worker.save(folder, set(trainer._trained_groups))
            trainer.collapse_guard.save(folder)
        if trainer.collapse_guard.good:
            trainer.last_good = str(folder)

    def on_train_end(self, args: Any, state, control, **kwargs):
        if self.trainer.rollout_worker is not None:
            self.trainer.rollout_worker.stop()


class AsyncToolRLVRTrainer(AsyncGRPOTrainer):
    """RLVR whose rollouts may call Python and never wait for the training.

    Args:
        model: folder or hub id of the model, which a vLLM server at `vllm_server_base_url` serves.
        args: the configuration.
        train_dataset: `id` (unique, stable), `prompt` (chat messages), `answer` (gold), and optionally `tools`: rows
            in which it is empty are text only.
        quantization_config: must be None.
        kwargs: what `AsyncGRPOTrainer` takes, but for rewards, tools and rollouts, which are ours.

    Raises:
        DataError: a column is missing, or no gold answer can be graded.
        GenerationError: no server answers, or it serves another model.
        ModelError: the chat template cannot render tools.
        RecipeError: a key that this trainer cannot follow, or no GPU.
        SandboxError: this machine cannot isolate model-written code.
    """

    _tag_names = ["trl", "async_tool_rlvr"]  # noqa: RUF012  TRL's class attributes
    _name = "AsyncToolRLVR"
    args: AsyncToolRLVRConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    rollout_worker: StreamedRollouts | None

    def __init__(
        self, model: str, args: AsyncToolRLVRConfig, train_dataset: Dataset, quantization_config=None, **kwargs: Any
    ):
        check_gpu()
        given: Any = args.model_init_kwargs
        init: dict[str, Any] = dict(given or {})
        args.model_init_kwargs = init
        if quantization_config is not None or init.pop("attn_implementation", None) is not None:
            raise RecipeError(
                "async_tool_rlvr: the weights go to the server as they are, and TRL brings its own attention. Delete "
                "the keys of quantisation and `attn_implementation`."
            )
        self.grader = Grader(extract=args.extract)
        train_dataset = gradable_rows(train_dataset, self.grader, args.distributed_state)
        self._sandbox: Any = None
        self.collapse_guard, self.last_good = CollapseGuard(args), None
        if args.max_inflight_tasks < 0:  # as TRL would: more would be stale before they train
            step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
            args.max_inflight_tasks = max(args.max_staleness, 1) * step
        worker: Any = self._open_worker(model, args, train_dataset) if args.process_index == 0 else None
        super().__init__(model, args=args, train_dataset=train_dataset, rollout_worker=worker, **kwargs)
        self.add_callback(_Follow(self))
        self.add_callback(MarkComplete())

    def _open_worker(self, model: str, args: AsyncToolRLVRConfig, table: Dataset) -> StreamedRollouts:
        tooled = any_has_tools(table, args.tools)
        self._sandbox = open_sandbox(args) if tooled else None
        engine = open_engine(
            EngineConfig(
                model=model, engine="server", server_url=args.vllm_server_base_url,
                server_timeout=args.request_timeout, max_num_seqs=args.max_inflight_tasks,
            )
        )  # fmt: skip
        end_ids, template = read_checkpoint(model).stop_ids, args.chat_template_kwargs
        names = {False: None, True: args.tool_protocol} if tooled else {False: None}
        protocols = {key: open_protocol(name, engine.tokenizer, end_ids, template) for key, name in names.items()}  # pyright: ignore
        return StreamedRollouts(args, table, engine, protocols, self._sandbox, self.grader)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any):
        """Train, from the start or from a checkpoint; True is the last whole one in `output_dir`.

        Raises:
            RunFolderError: there is no such checkpoint, or it has no prompt table.
            CollapseError: the guard stopped the run.
        """
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, str(self.args.output_dir))
        if checkpoint:
            self.collapse_guard.load(checkpoint)
            self.last_good = str(checkpoint) if self.collapse_guard.good else None
            if self.rollout_worker is not None:
                self.rollout_worker.load(checkpoint)
        with ExitStack() as stack:
            stack.callback(self.grader.close)
            if self._sandbox:
                stack.callback(self._sandbox.close)
            if self.rollout_worker is not None:
                stack.callback(self.rollout_worker.stop)  # first of these: it uses the other two
            return super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)

    # -----------------------------------------------------------------------------------------------------------------
    # the denominator: the trained tokens of the step, in all processes

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any):
        """Take the micro-batches of a step, and count their trained tokens."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_tokens = sum(float(batch["global_n_tokens"][0]) for batch in batches)
        return batches, items

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
        """TRL's loss, a mean over the tokens of the micro-batch, turned into its part of the mean over the step."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        share = float(inputs["global_n_tokens"][0]) / max(self._step_tokens, 1.0)
        return loss * (share * self.current_gradient_accumulation_steps)
