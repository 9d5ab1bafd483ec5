"""Draw n samples of every problem, with or without a Python tool, grade each one as it arrives, and write it at once.

`samples.jsonl` is append-only while samples are drawn: a killed run keeps every row that was written, and the same
command draws only the others. Each sample has its own seed, made from the run's seed and the sample's name, so what is
drawn later does not depend on what was drawn before. When all are there, the rows are put in the order of the problems:
a disturbed run ends with the bytes of an undisturbed one.
"""

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..core.code_grading import CodeGrader
from ..core.errors import GenerationError, RunFolderError
from ..core.generation import Engine
from ..core.grading import Grader
from ..core.progress import Bar, progress
from ..core.rollout import Rollout, RolloutConfig, RolloutState
from ..core.rollout_runner import run_streaming
from ..core.run_folder import JsonlLog
from ..core.trajectory import content_hash, final_text, trajectory_id
from .tasks import Problem, Task

if TYPE_CHECKING:
    from ..core.sandbox import Sandbox
    from ..core.tool_protocol import ToolProtocol

SAMPLES_FILE = "samples.jsonl"
TOOL_COLUMNS = ("n_calls", "n_failed", "n_malformed", "first_call_position", "void_turn")

Mode = Literal["none", "python"]
Key = tuple[str, str, int]  # label, problem_id, sample_index
Prompts = dict[tuple[str, str], tuple[int, ...]]  # (label, problem_id) -> token ids


class Job(NamedTuple):
    """One sample to draw."""

    task: Task
    problem: Problem
    sample_index: int
    mode: Mode = "none"

    @property
    def label(self) -> str:
        """What its scores are called."""
        return label_of(self.task.name, self.mode)

    @property
    def key(self) -> Key:
        """What names the sample."""
        return self.label, self.problem.problem_id, self.sample_index


def label_of(task: str, mode: Mode) -> str:
    """Return what the scores of a task in a mode are called: `gsm8k`, and with the tool `gsm8k+python`."""
    return task if mode == "none" else f"{task}+{mode}"


def sample_seed(seed: int, task: str, problem_id: str, index: int) -> int:
    """Return the seed of one sample, from 0 to 2^63 - 1: a hash, so that it needs no order of samples."""
    return int(content_hash(seed, task, problem_id, index), 16) >> 1


def plan(tasks: Sequence[Task], problems: dict[str, list[Problem]], modes: Sequence[Mode] = ("none",)) -> list[Job]:
    """List every sample of every problem of every task in every mode, in the order of the finished file."""
    return [
        Job(task, problem, index, mode)
        for task in tasks
        for mode in modes
        for problem in problems[task.name]
        for index in range(task.n)
    ]


def encode_prompts(protocols: Mapping[Mode, "ToolProtocol"], problems: dict[str, list[Problem]]) -> Prompts:
    """Turn every problem into the token ids of its prompt, in every mode.

    Raises:
        ModelError: the model folder has no chat template.
        DataError: the template refuses the messages.
    """
    return {
        (label_of(task, mode), problem.problem_id): tuple(protocol.encode(problem.prompt))
        for mode, protocol in protocols.items()
        for task, of_task in problems.items()
        for problem in of_task
    }


def rows_done(log: JsonlLog, jobs: Sequence[Job]) -> set[Key]:
    """Return the keys of the samples that the file already has.

    Raises:
        RunFolderError: the file has a sample that this run does not draw: the benchmark has changed since.
    """
    wanted = {job.key for job in jobs}
    done = {row_key(row) for row in log.rows()}
    if foreign := done - wanted:
        task, problem, index = min(foreign)
        raise RunFolderError(
            f"{log.path}: has sample {index} of problem {problem!r} of task {task}, which this run does not draw: the "
            "benchmark has changed since. Pass --overwrite to start again, or choose another `output_dir`."
        )
    return done


def row_key(row: dict[str, Any]) -> Key:
    """Return the key of a row of samples.jsonl."""
    return row["task"], row["problem_id"], row["sample_index"]


@dataclass
class Sampler:
    """Turns rollouts into rows of samples.jsonl, in threads, while the engine goes on.

    Attributes:
        log: where rows go.
        source: name of the model, the `source` of each row.
        seed: the run's.
        logprobs: whether rows carry `mean_logprob`.
        graders: task -> its grader; with none at all, rows are not graded.
        protocols: mode -> how the tool is called.
        rollouts: budgets of thinking and of the tool.
        in_flight: rollouts on their way at once where a tool is called: each may hold a session.
    """

    log: JsonlLog
    source: str
    seed: int
    logprobs: bool
    graders: Mapping[str, Grader | CodeGrader]
    protocols: Mapping[Mode, "ToolProtocol"]
    rollouts: RolloutConfig
    in_flight: int

    def __post_init__(self):
        self._lock = threading.Lock()
        self._tokens, self._right, self._graded, self._start = 0, 0, 0, 0.0

    def draw(self, engine: Engine, jobs: Sequence[Job], prompts: Prompts, sandbox: "Sandbox | None" = None) -> None:
        """Draw all samples of `jobs`; when this returns, each has its row.

        Raises:
            GenerationError: the engine failed, or a prompt leaves no room in the context.
            SandboxError: the sandbox failed.
        """
        _check_room(prompts, engine.max_context)
        by_key = {json.dumps(job.key): job for job in jobs}
        rollouts = (
            (name, self._state(job, prompts[job.key[:2]], engine.max_context), job.task.sampling())
            for name, job in by_key.items()
        )
        in_flight = self.in_flight if sandbox else len(jobs)
        self._start = time.monotonic()
        with ExitStack() as stack:
            bar = stack.enter_context(progress("sample", len(jobs)))
            workers = max((grader.workers for grader in self.graders.values()), default=1)
            threads = ThreadPoolExecutor(workers, thread_name_prefix="grading")
            stack.callback(threads.shutdown, cancel_futures=True)
            grading: deque[Future[None]] = deque()
            for name, rollout in run_streaming(engine, rollouts, sandbox, self.logprobs, in_flight):
                grading.append(threads.submit(self._finish, by_key[name], rollout, bar))
                while grading and grading[0].done():
                    grading.popleft().result()
            for future in grading:
                future.result()

    def _state(self, job: Job, prompt_ids: tuple[int, ...], max_context: int) -> RolloutState:
        task = job.task
        return RolloutState(
            self.rollouts, self.protocols[job.mode], prompt_ids, sample_seed(self.seed, *job.key), task.max_tokens,
            max_context, task.stop, task.extract,
        )  # fmt: skip

    def _finish(self, job: Job, rollout: Rollout, bar: Bar) -> None:
        row = make_row(job, rollout, self.source, self.seed, self.protocols[job.mode])
        if self.graders:
            grade = self.graders[job.task.name].grade(final_text(row["completion"]), job.problem.gold)
            row["correct"] = grade.correct
            row |= {"verdict": grade.verdict, "reason": grade.reason, "extracted": grade.extracted}
        with self._lock:
            self.log.append(row)
            self._tokens += row["n_tokens"]
            self._right += row["correct"] is True
            self._graded += 1
            speed = self._tokens / max(time.monotonic() - self._start, 1e-9)
            note = f"{speed:,.0f} tokens/s" + (f", {self._right / self._graded:.0%} right" if self.graders else "")
            bar.advance(note=note)


def make_row(job: Job, rollout: Rollout, source: str, seed: int, protocol: "ToolProtocol") -> dict[str, Any]:
    """Build the trajectory of one sample, not graded yet.

    A chat template that opens the think block inside the prompt leaves only its end in what the model wrote: the
    opening is put back, so that a chain that was cut off is seen as one, and the row can be trained on. `n_tokens`
    counts what the model wrote, not what its tool answered. Wall-clock times stay out: a resumed run has the same rows.
    """
    with_tool = job.mode != "none"
    row: dict[str, Any] = {
        "id": None,
        "problem_id": job.problem.problem_id,
        "prompt": protocol.prompt(job.problem.prompt),
        "completion": rollout.messages,
        "answer": job.problem.answer,
        "source": label_of(source, job.mode),  # a model with its tool is another teacher than without
        "sample_index": job.sample_index,
        "correct": None,
        "finish_reason": rollout.finish_reason,
        "task": job.label,
        "n_tokens": rollout.n_model_tokens,
        "seed": sample_seed(seed, *job.key),
    }
    if rollout.logprobs is not None:
        row["mean_logprob"] = sum(rollout.logprobs) / max(rollout.n_model_tokens, 1)
    if with_tool:
        row["tools"] = protocol.tools
        row |= {name: getattr(rollout, name) for name in TOOL_COLUMNS}
    if with_tool or rollout.interrupted:
        row["interrupted"] = rollout.interrupted
    row["id"] = trajectory_id(row)
    return row


def _check_room(prompts: Prompts, max_context: int) -> None:
    """Refuse, before anything is generated, prompts that leave no room for an answer."""
    long = [(problem, len(ids)) for (_, problem), ids in prompts.items() if len(ids) >= max_context]
    if long:
        names = ", ".join(f"{problem!r} ({length} tokens)" for problem, length in long[:3])
        more = f" and {len(long) - 3} more" if len(long) > 3 else ""
        raise GenerationError(
            f"{len(long)} of {len(prompts)} prompts leave no room in the context of {max_context} tokens: problems "
            f"{names}{more}. List them under `exclude` of a task file, or raise `max_model_len` if the model allows it."
        )


def put_in_order(path: Path, order: Mapping[Any, int], key: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a JSONL file with its rows in the given order, whole or not at all, one row in memory at a time.

    Args:
        path: the file.
        order: key of a row -> its place.
        key: row -> key.
    """
    with open(path, "rb") as rows:
        places: list[tuple[int, int]] = []
        start = rows.tell()
        while line := rows.readline():
            places.append((order[key(json.loads(line))], start))
            start = rows.tell()
        if places == sorted(places):
            return
        partial = path.with_name(f".{path.name}.partial")
        with open(partial, "wb") as out:
            for _, start in sorted(places):
                rows.seek(start)
                out.write(rows.readline())
    os.replace(partial, path)


def read_rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a finished samples.jsonl."""
    with open(path, encoding="utf-8") as lines:
        yield from map(json.loads, lines)
