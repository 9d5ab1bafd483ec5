"""Reinforcement learning from verifiable rewards with a Python tool, on TRL's GRPOTrainer, that does not collapse.

TRL keeps what it does well: the losses, the correction between engine and trainer, the reference model, the buffers and
the metrics. Through its `rollout_func` we put our rollouts (`core.rollout`: token ids in and out, masks by position, an
honest finish reason), and after it has scored a batch we replace its advantages, mask and denominator by those of
`rl_losses.plan_update`. Prompts are dealt by `PromptCurriculum` at the moment they are needed; TRL's data loader only
counts. So a run that is killed and resumed goes on with the same prompts, rollouts, table and optimizer.
"""

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl.trainer.grpo_trainer import GRPOTrainer

from ..core.checkpoint import Checkpoint
from ..core.generation import Request, SamplingConfig
from ..core.grading import Grader
from ..core.rollout import Rollout, RolloutState, TurnRequest
from ..core.rollout_runner import TurnReply, run_lockstep
from ..core.sandbox import open_sandbox
from ..core.tool_protocol import open_protocol
from .checkpoints import MarkComplete, checkpoint_folder, checkpoint_to_resume
from .collapse_guard import CollapseGuard, heed
from .prompt_curriculum import PromptCurriculum
from .rl_losses import plan_update
from .rollouts import (
    MEASURES,
    any_has_tools,
    choose_on_correct,
    gradable_rows,
    grade_rollouts,
    has_tools,
    seed_of,
    summarise,
)
from .routing_replay import RoutingReplay, lay_out
from .tool_rlvr_config import ToolRLVRConfig
from .turn_engines import open_turns, vllm_settings


def correct(correct: list[float], **_: Any) -> Any:
    """Reward 1 for a right final answer, else 0: TRL's metrics `reward` and `rewards/correct` are the pass rate."""
    return correct


class _Follow(TrainerCallback):
    """Writes what a resumed run needs beside each checkpoint, and ends a run that has nothing left to learn."""

    def __init__(self, trainer: "ToolRLVRTrainer"):
        self.trainer = trainer

    def on_step_end(self, args: Any, state, control, **kwargs):
        trainer = self.trainer
        if trainer.curriculum.exhausted:
            warnings.warn("All prompts but less than a batch are mastered: the training ends here.", stacklevel=2)
            control.should_training_stop = True
        if args.probe_every and state.global_step % args.probe_every == 0:
            trainer.probe()

    def on_save(self, args: Any, state, control, **kwargs):
        folder = checkpoint_folder(args, state)
        if args.should_save:
            self.trainer.curriculum.save(folder)
            self.trainer.collapse_guard.save(folder)
        if self.trainer.collapse_guard.good:
            self.trainer.last_good = str(folder)


class ToolRLVRTrainer(GRPOTrainer):
    """RLVR whose rollouts may call Python.

    Args:
        model: model, or the folder of one.
        args: the configuration.
        train_dataset: `id` (unique, stable), `prompt` (chat messages), `answer` (gold), and optionally `tools`: rows
            in which it is empty are text only.
        kwargs: what `GRPOTrainer` takes, but for rewards, tools and rollouts, which are ours.

    Raises:
        DataError: a column is missing, no gold answer can be graded, or the prompts do not fill a batch.
        ModelError: the chat template cannot render tools.
        SandboxError: this machine cannot isolate model-written code.
    """

    _tag_names = ["trl", "tool_rlvr"]  # noqa: RUF012  TRL's class attributes
    _name = "ToolRLVR"
    args: ToolRLVRConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    model: Any
    num_generations: int
    max_completion_length: int
    train_dataset: Dataset
    _metrics: Any

    def __init__(self, model: Any, args: ToolRLVRConfig, train_dataset: Dataset, **kwargs: Any):
        self.grader = Grader(extract=args.extract)
        train_dataset = gradable_rows(train_dataset, self.grader, args.distributed_state)
        tooled = any_has_tools(train_dataset, args.tools)
        self._sandbox: Any = open_sandbox(args) if tooled else None
        with vllm_settings(args):
            super().__init__(model, reward_funcs=correct, args=args, train_dataset=train_dataset, **kwargs)
        # TRL's own flag looks at the last token only, and takes what it masks out of the attention too.
        self.mask_truncated_completions = False
        self.rollout_func: Any = self._roll_out
        name = str(getattr(self.model, "name_or_path", ""))
        checkpoint = Checkpoint(
            name, self.model.config.get_text_config(), self._tokenizer, frozenset(self.eos_token_ids)
        )  # pyright: ignore
        self._turns = open_turns(self, checkpoint)
        self._replay = RoutingReplay(self.model) if args.routing_replay else None
        self._routes: dict[tuple[int, ...], Any] = {}  # experts that the engine chose, by the tokens it saw
        end_ids = checkpoint.stop_ids
        template: Any = self.chat_template_kwargs
        self._protocols = {False: open_protocol(None, self._tokenizer, end_ids, template)}
        if tooled:
            self._protocols[True] = open_protocol(args.tool_protocol, self._tokenizer, end_ids, template)
        self._new_state()
        self.add_callback(_Follow(self))
        self.add_callback(MarkComplete())

    # -----------------------------------------------------------------------------------------------------------------
    # data

    def _new_state(self) -> None:
        args = self.args
        prompts = int(args.generation_batch_size or 0) // self.num_generations
        self.curriculum = PromptCurriculum(
            self.train_dataset["id"],
            prompts,
            args.seed,
            bool(args.shuffle_dataset),
            args.retire_pass_rate,  # pyright: ignore
        )
        self.collapse_guard = CollapseGuard(args)
        self.last_good: str | None = None  # checkpoint that a rollback returns to

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any):
        """Train, from the start or from a checkpoint; True is the last whole one in `output_dir`.

        Raises:
            RunFolderError: there is no such checkpoint, or it has no prompt table.
            CollapseError: the guard stopped the run.
        """
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, str(self.args.output_dir))
        self._new_state()
        if checkpoint:
            self.curriculum.load(checkpoint)
            self.collapse_guard.load(checkpoint)
            self.last_good = str(checkpoint) if self.collapse_guard.good else None
        with ExitStack() as stack:
            stack.callback(self.grader.close)
            if self._sandbox:
                stack.callback(self._sandbox.close)
            return super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)

    # -----------------------------------------------------------------------------------------------------------------
    # a generation batch

    def _generate_and_score_completions(self, inputs):
        training = self.model.training
        if training:
            inputs = self._deal(len(inputs))
            self._routes.clear()
        self._rows, self._graded = inputs, []
        output = super()._generate_and_score_completions(inputs)
        return self._plan(output) if training else output

    def _deal(self, count: int) -> list[dict[str, Any]]:
        """Return this process's rows of the next batch: each prompt `num_generations` times, groups in a row."""
        self._batch = self.curriculum.next_batch()
        first = self.accelerator.process_index * count
        slots = [row for row in self._batch for _ in range(self.num_generations)][first : first + count]
        return [dict(self.train_dataset[row]) for row in slots]  # pyright: ignore[reportArgumentType]

    def _roll_out(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Make one rollout per row, of the twice as many where we choose: TRL's `rollout_func`."""
        args, rows = self.args, self._rows
        first = self.accelerator.process_index * len(rows)
        tries = 2 if args.resample_on_correct and self.model.training else 1
        slots = [(row, (first + slot, attempt)) for slot, row in enumerate(rows) for attempt in range(tries)]
        seeds = [seed_of(args.seed, self.curriculum.dealt, *place) for _, place in slots]
        with_tools = [has_tools(row, args.tools) for row, _ in slots]
        made = self._run(list(zip([row for row, _ in slots], seeds, with_tools, strict=True)))
        self._graded = grade_rollouts(made, [str(row["answer"]) for row, _ in slots], self.grader)
        if tries == 2:
            size = 2 * self.num_generations
            self._graded = [
                chosen
                for start in range(0, len(made), size)
                for chosen in choose_on_correct(
                    self._graded[start : start + size], self.num_generations, seeds[start], args.extract
                )
            ]
        rollouts = [graded.rollout for graded in self._graded]
        with_logprobs = all(rollout.logprobs is not None for rollout in rollouts)
        return {
            "prompt_ids": [rollout.prompt_ids for rollout in rollouts],
            "completion_ids": [rollout.completion_ids or [self._tokenizer.pad_token_id] for rollout in rollouts],
            "env_mask": [rollout.mask or [0] for rollout in rollouts],
            "logprobs": [rollout.logprobs or [0.0] for rollout in rollouts] if with_logprobs else None,
            "correct": [float(graded.correct) for graded in self._graded],
        }

    def _run(self, wanted: Sequence[tuple[dict[str, Any], int, bool]]) -> list[Rollout]:
        """Run rollouts of (row, seed, with tools), in lock-step over all processes."""
        args, states = self.args, []
        for row, seed, with_tools in wanted:
            protocol = self._protocols[with_tools]
            states.append(
                RolloutState(
                    args, protocol, protocol.encode(row["prompt"]), seed, self.max_completion_length,
                    self._turns.max_context, extract=args.extract,
                )
            )  # fmt: skip
        with self._turns.opened():
            return run_lockstep(states, self._generate_turns, self._sandbox, self._any_process)

    def _generate_turns(self, requests: Sequence[TurnRequest]) -> list[TurnReply]:
        asked = []
        for number, (prompt_ids, most, stop, seed) in enumerate(requests):
            sampling = SamplingConfig(
                self.temperature, self.top_p, self.top_k or -1, self.min_p or 0.0, max_tokens=most, stop=list(stop)
            )
            asked.append(Request(str(number), prompt_ids, seed, sampling, logprobs=self.use_vllm))
        replies = self._turns(asked)
        if self._replay:  # the last turn's record covers the whole rollout
            for request, reply in zip(asked, replies, strict=True):
                self._routes[(*request.prompt_ids, *reply.token_ids)] = reply.routed_experts
        return [(reply.token_ids, reply.logprobs, reply.finish_reason) for reply in replies]

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, *args: Any, **kwargs: Any):
        if self._replay is None or model is self.ref_model:
            return super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, *args, **kwargs)
        records = [
            self._routes.get(tuple(ids[own.bool()].tolist()))
            for ids, own in zip(input_ids, attention_mask, strict=True)
        ]
        starts = attention_mask.argmax(1).tolist()
        routes = lay_out(records, starts, input_ids.size(1), self._replay.layers, self._replay.top_k)
        with self._replay.of(routes.to(input_ids.device)):
            return super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, *args, **kwargs)

    def _any_process(self, flag: bool) -> bool:
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)).item())  # pyright: ignore

    def _plan(self, output: dict[str, Any]) -> dict[str, Any]:
        """Replace advantages, mask and denominator of a scored batch, and note what it showed."""
        args, group = self.args, self.num_generations
        local = [graded.measures(args.mask_truncated_completions, args.mask_void_turns) for graded in self._graded]
        device = self.accelerator.device
        measures = self.accelerator.gather(torch.tensor(local, dtype=torch.float64, device=device))
        of = dict(zip(MEASURES, measures.unbind(1), strict=True))  # pyright: ignore[reportAttributeAccessIssue]
        rewards, tokens, masked = (of[name].view(-1, group) for name in ("correct", "tokens", "masked"))
        update = plan_update(
            rewards.float(), tokens.long(), masked.bool(), args.scale_rewards, args.loss_aggregation,
            args.drop_zero_variance,
        )  # fmt: skip
        first = self.accelerator.process_index * len(local)
        mine = slice(first, first + len(local))
        metrics = self._metrics["train"]
        if "old_per_token_logps" in output and "sampling_per_token_logps" in output:
            metrics["sampling/kl"].append(self._engine_kl(output))
        output["advantages"] = update.advantages.reshape(-1)[mine].to(output["advantages"])
        output["tool_mask"] = output["tool_mask"] * update.trained.reshape(-1)[mine, None]
        output["num_items_in_batch"] = torch.tensor(update.tokens, device=device)
        self.curriculum.record(self._batch, rewards.mean(1).tolist())
        for name, value in summarise(measures, group).items():  # pyright: ignore[reportArgumentType]
            metrics[name].append(value)
        metrics["rollouts/trained"].append(update.trained.float().mean().item())
        metrics["prompts/retired"].append(float(self.curriculum.retired.sum()))
        metrics["completions/clipped_ratio"][-1] = of["truncated"].mean().item()  # TRL's counts missing end tokens
        return output

    def _engine_kl(self, output: dict[str, Any]) -> float:
        """KL of the engine's policy from the trainer's, estimated by exp(d) - d - 1 (k3), mean over all own tokens."""
        mask = (output["completion_mask"] * output["tool_mask"]).bool()
        difference = (output["old_per_token_logps"] - output["sampling_per_token_logps"])[mask]
        difference = difference[~difference.isnan()].double()
        sums = torch.stack(
            [(difference.exp() - difference - 1).sum(), torch.tensor(float(difference.numel())).to(difference)]
        )
        total, count = self.accelerator.reduce(sums).tolist()  # pyright: ignore[reportAttributeAccessIssue]
        return total / max(count, 1)

    # -----------------------------------------------------------------------------------------------------------------
    # the guard

    @torch.no_grad()
    def probe(self) -> None:
        """Measure the accuracy without tools on a fixed sample of the prompts, one rollout each, always the same."""
        count = min(self.args.probe_prompts, len(self.train_dataset))
        chosen = torch.randperm(len(self.train_dataset), generator=torch.Generator().manual_seed(self.args.seed))[
            :count
        ]
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = chosen.tolist()[rank::world]
        rows = [dict(self.train_dataset[row]) for row in mine or chosen.tolist()[:1]]  # pyright: ignore  every process generates
        rollouts = self._run([(row, seed_of(self.args.seed, "probe", row["id"]), False) for row in rows])
        graded = grade_rollouts(rollouts, [row["answer"] for row in rows], self.grader)
        right = torch.tensor(float(sum(one.correct for one in graded[: len(mine)])), device=self.accelerator.device)
        right = self.accelerator.reduce(right).item()  # pyright: ignore[reportAttributeAccessIssue]
        self._metrics["train"]["probe/no_tool_accuracy"].append(right / count)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, after the guard has looked."""
        if self.model.training and "loss" in logs and self.args.guard != "off":
            self._guard(logs)
        super().log(logs, start_time)

    def _guard(self, logs: dict[str, float]) -> None:
        metrics = {name: sum(values) / len(values) for name, values in self._metrics["train"].items() if values}
        heed(self, self.collapse_guard.look(metrics | logs), logs)
