"""Rollouts that never wait for the training: the worker behind `AsyncToolRLVRTrainer`.

A thread of the first process keeps a vLLM server busy with `core.rollout_runner.run_streaming`, grades each group of
rollouts when its last one is in, and queues what trains. The trainer takes it from there while the next ones are made
(PipelineRL, arXiv 2509.19128). It implements TRL's `RolloutWorkerProtocol` (trl.experimental.async_grpo).
"""

import itertools
import json
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from ..core.errors import GenerationError
from ..core.generation import Engine, SamplingConfig
from ..core.grading import Grader
from ..core.rollout import Rollout, RolloutState
from ..core.rollout_runner import run_streaming
from ..core.run_folder import write_atomic
from ..core.tool_protocol import ToolProtocol
from .prompt_curriculum import PromptCurriculum
from .rl_losses import plan_update
from .rollouts import GradedRollout, grade_rollouts, has_tools, seed_of, summarise

FILE = "streamed_rollouts.json"
LOOK_EVERY = 0.2  # seconds between two looks whether the training has ended, while the queue is full


@dataclass
class _Group:
    """The rollouts of one prompt: those that are in, with the version of the policy that each began with."""

    row: int
    began: dict[int, int] = field(default_factory=dict)
    done: dict[int, Rollout] = field(default_factory=dict)


def group_samples(
    group: list[GradedRollout], versions: list[int], number: int, scale: str, mask_truncated: bool, mask_void: bool
) -> tuple[list[RolloutSample], dict[str, float]]:
    """Turn the rollouts of a prompt into what TRL trains on, and what they showed into metrics.

    Advantages are those of `rl_losses.plan_update` within the group. What it takes out of the update (groups of equal
    rewards, void turns, cut-off rollouts) is no sample, so that it is in no denominator either.

    Args:
        group: all rollouts of the prompt.
        versions: of the policy, one per rollout.
        number: of the group.
        scale: "group" or "none", see `rl_losses.scale_advantages`.
        mask_truncated: whether cut-off rollouts leave the update.
        mask_void: whether rollouts with a void turn do.
    """
    measures = torch.tensor([graded.measures(mask_truncated, mask_void) for graded in group], dtype=torch.float64)
    correct, masked, tokens = measures[:, 0], measures[:, 3], measures[:, 4]
    update = plan_update(correct[None].float(), tokens[None].long(), masked[None].bool(), scale, "token")
    samples = []
    for slot, (graded, version) in enumerate(zip(group, versions, strict=True)):
        if not update.trained[0, slot]:
            continue
        rollout, before = graded.rollout, [0] * len(graded.rollout.prompt_ids)
        if rollout.logprobs is None:
            raise GenerationError("the server returned no log-probabilities: the policy's ratio needs them.")
        samples.append(
            RolloutSample(
                prompt=[],
                completion=rollout.messages,
                input_ids=np.array(rollout.prompt_ids + rollout.completion_ids),
                completion_mask=np.array(before + rollout.mask),
                old_log_probs=np.array(before + rollout.logprobs, dtype=np.float32),
                advantage=float(update.advantages[0, slot]),
                model_version=version,
                group_id=number,
                metrics={},
                enqueued_at=time.time(),
            )
        )
    reward = correct.mean().item()
    shown = {"reward": reward, "rollouts/trained": len(samples) / len(group), **summarise(measures, len(group))}
    return samples, shown


class StreamedRollouts:
    """Makes rollouts in a thread for as long as the training runs.

    Args:
        args: an `AsyncToolRLVRConfig`.
        table: `id`, `prompt`, `answer`, and optionally `tools`.
        engine: a vLLM server's client; its log-probabilities are those of the policy that sampled.
        protocols: by whether a rollout may call.
        sandbox: opens the sessions; None where no row has tools.
        grader: of the answers.
    """

    def __init__(
        self,
        args: Any,
        table: Dataset,
        engine: Engine,
        protocols: dict[bool, ToolProtocol],
        sandbox: Any,
        grader: Grader,
    ):
        self.rollout_buffer: queue.Queue[RolloutSample] = queue.Queue(args.queue_maxsize)
        self.metrics_queue: queue.Queue[dict[str, float]] = queue.Queue()
        self.curriculum = PromptCurriculum(table["id"], 1, args.seed, True, args.retire_pass_rate)
        self._args, self._table, self._engine = args, table, engine
        self._protocols, self._sandbox, self._grader = protocols, sandbox, grader
        self._version = 0
        self._lock = threading.Lock()  # around the curriculum and the groups
        self._groups: dict[int, _Group] = {}
        self._numbers = itertools.count()
        self._untrained: dict[int, int] = {}  # group -> row, of what is under way or in the queue
        self._again: list[int] = []  # rows that were under way when the checkpoint was written
        self._stopping = threading.Event()
        self._alive_at = time.monotonic()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    # -----------------------------------------------------------------------------------------------------------------
    # what TRL calls

    def start(self) -> None:
        """Begin; once the server has the weights."""
        self._alive_at = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="afterglow-rollouts", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End; rollouts on their way are given up."""
        self._stopping.set()
        if self._thread:
            self._thread.join(timeout=30)

    def update_model_version(self, model_version: int) -> None:
        """Note the policy that the server has now."""
        self._version = model_version

    def check_health(self, stale_after_s: float) -> None:
        """Raise what ended the thread.

        Raises:
            GenerationError: or that no rollout has finished for so long.
        """
        if self._failure is not None:
            raise self._failure
        if (silent := time.monotonic() - self._alive_at) > stale_after_s:
            raise GenerationError(
                f"no rollout has finished for {silent:.0f} s (`heartbeat_stale_after_s`: {stale_after_s:g}). The "
                "server's log says whether it works; long rollouts need a larger value."
            )

    # -----------------------------------------------------------------------------------------------------------------
    # the thread

    def _work(self) -> None:
        rollouts = run_streaming(
            self._engine, self._backlog(), self._sandbox, logprobs=True, in_flight=self._args.max_inflight_tasks
        )
        try:
            for key, rollout in rollouts:
                self._alive_at = time.monotonic()
                number, slot = map(int, key.split("/"))
                group = self._groups[number]
                group.done[slot] = rollout
                if len(group.done) == self._args.num_generations:
                    self._finish(number, group)
                if self._stopping.is_set():
                    return
        except BaseException as error:
            self._failure = error
        finally:
            rollouts.close()  # pyright: ignore[reportAttributeAccessIssue]  a generator: closes stream and sessions

    def _backlog(self) -> Iterator[tuple[str, RolloutState, SamplingConfig]]:
        """Deal prompts without end, each `num_generations` times."""
        args = self._args
        sampling = SamplingConfig(args.temperature, args.top_p, args.top_k or -1, args.min_p or 0.0)
        while not self._stopping.is_set():
            with self._lock:
                row = self._again.pop(0) if self._again else self.curriculum.next_batch()[0]
                number = next(self._numbers)
                group = self._groups[number] = _Group(row)
                self._untrained[number] = row
                dealt = self.curriculum.dealt
            example: dict[str, Any] = self._table[row]
            protocol = self._protocols[has_tools(example, args.tools)]
            prompt_ids = protocol.encode(example["prompt"])
            for slot in range(args.num_generations):
                group.began[slot] = self._version
                state = RolloutState(
                    args, protocol, prompt_ids, seed_of(args.seed, dealt, example["id"], slot),
                    args.max_completion_length, self._engine.max_context, extract=args.extract,
                )  # fmt: skip
                yield f"{number}/{slot}", state, sampling

    def _finish(self, number: int, group: _Group) -> None:
        """Grade a whole group and queue it."""
        args, order = self._args, range(self._args.num_generations)
        gold = str(self._table[group.row]["answer"])
        graded = grade_rollouts([group.done[slot] for slot in order], [gold] * len(order), self._grader)
        samples, shown = group_samples(
            graded, [group.began[slot] for slot in order], number, args.scale_rewards,
            args.mask_truncated_completions, args.mask_void_turns,
        )  # fmt: skip
        with self._lock:
            del self._groups[number]
            self.curriculum.record([group.row], [shown["reward"]])
            if not samples:
                del self._untrained[number]
        self.metrics_queue.put(shown | {"prompts/retired": float(self.curriculum.retired.sum())})
        for sample in samples:
            while not self._stopping.is_set():
                try:
                    self.rollout_buffer.put(sample, timeout=LOOK_EVERY)
                    break
                except queue.Full:
                    self._alive_at = time.monotonic()  # it is the training that is waited for

    # -----------------------------------------------------------------------------------------------------------------
    # checkpoints

    def save(self, folder: Path, trained: set[int]) -> None:
        """Write the curriculum, and the prompts that were dealt and have not trained.

        Args:
            folder: of the checkpoint.
            trained: groups of which the training has had a sample.
        """
        with self._lock:
            for number in trained & self._untrained.keys():
                del self._untrained[number]
            pending = [self._table[row]["id"] for _, row in sorted(self._untrained.items())]
            self.curriculum.save(folder)
        write_atomic(folder / FILE, json.dumps({"pending": pending}))

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint: what was under way is dealt first.

        Raises:
            RunFolderError: the checkpoint is none of this method, or of other prompts.
        """
        self.curriculum.load(folder)
        rows = {name: row for row, name in enumerate(self._table["id"])}
        pending = json.loads((folder / FILE).read_text(encoding="utf-8"))["pending"]
        self._again = [rows[name] for name in pending if name in rows]
