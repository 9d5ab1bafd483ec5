"""Scoring trajectories under a student: from the cache where they are in it, else by one process or several.

Trajectories that are not in the cache are written to a folder, the longest first, and cut into blocks. Batches are
planned within a block and blocks are dealt to processes, so that neither a kill nor the number of processes changes a
score, and a process holds one block at a time, however many trajectories there are.

    accelerate launch ... -m afterglow.data_filters.scoring FOLDER      one process of several (started by `score`)
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..core.child_process import end_with_parent
from ..core.errors import AfterglowError, DataError, ModelError
from ..core.progress import progress as show_progress
from ..core.run_folder import JsonlLog, write_atomic
from ..core.throughput import Throughput, forward_flops, peak_flops
from ..core.token_stats import ScoredSequence, TokenScorer, TokenStats, body_and_head
from .rank_surprisal import trajectory_rsr
from .result import ShowProgress, bar_of
from .score_cache import ScoreCache, row_key
from .student import Scoring, Student

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel

READ = ("prompt", "completion", "tools")
CHARACTERS_PER_TOKEN = 4  # of a guess how much work there is
_LARGEST_BLOCK = 256


@dataclass(frozen=True)
class Measured:
    """The measurements of all rows of a table under one student.

    Attributes:
        rows: One line of the cache per row.
        new: Trajectories that had to be scored.
        max_length: Tokens after which the student's context, or the recipe's limit, cut a trajectory off.
    """

    rows: list[dict[str, Any]]
    new: int
    max_length: int


def score(
    table: "Dataset",
    scoring: Scoring,
    *,
    cache: Path,
    work: Path,
    token_budget: int,
    processes: int = 1,
    progress: ShowProgress | None = None,
) -> Measured:
    """Return what the student says of every row; score those that the cache does not hold.

    Args:
        table: Trajectories: prompt, completion, and tools where there are any.
        scoring: The student and how to score.
        cache: Folder of scores that runs share.
        work: Folder of this run: what a killed call had planned is found in it and finished as planned.
        token_budget: Tokens of one forward pass, padding included.
        processes: How many processes score, each with a device of its own where there is one.
        progress: Opens a progress bar; None shows none.

    Raises:
        ModelError: The model cannot be loaded or cannot be scored with.
        DataError: The chat template renders none of the trajectories of a block.
    """
    student = Student(scoring)
    shared = ScoreCache(cache, student.key)
    keys = [row_key(row) for row in _rows(_columns(table))]
    plan = work / f"{student.key}.json"
    todo = work / f"{student.key}-todo"
    if todo.exists():
        _finish(todo, shared, student, processes, progress)
    wanted = set(keys)
    known = shared.find(wanted)
    if missing := wanted - known.keys():
        job = {"scoring": asdict(scoring), "cache": str(cache), "token_budget": token_budget}
        work.mkdir(parents=True, exist_ok=True)
        write_atomic(plan, json.dumps({"new": len(missing)}))
        _write_todo(todo, table, keys, missing, job)
        _finish(todo, shared, student, processes, progress)
        known = shared.find(wanted)
    shutil.rmtree(todo, ignore_errors=True)
    new = json.loads(plan.read_text())["new"] if plan.exists() else 0
    return Measured([known[key] for key in keys], new, student.max_length)


def _columns(table: "Dataset") -> "Dataset":
    return table.select_columns([name for name in READ if name in table.column_names])


def _rows(table: "Dataset") -> Iterator[dict[str, Any]]:
    return cast("Iterator[dict[str, Any]]", iter(table))


def _write_todo(todo: Path, table: "Dataset", keys: list[str], missing: set[str], job: dict) -> None:
    """Store the rows to score, the longest first, whole or not at all."""
    table = _columns(table)
    first = {key: i for i, key in reversed(list(enumerate(keys))) if key in missing}
    lengths = {key: len(json.dumps(table[i], ensure_ascii=False)) for key, i in first.items()}
    order = sorted(first, key=lambda key: (-lengths[key], key))
    rows = table.select([first[key] for key in order]).add_column("key", order)  # pyright: ignore[reportCallIssue]
    partial = todo.with_name(f".{todo.name}")
    shutil.rmtree(partial, ignore_errors=True)
    rows.save_to_disk(partial)
    job["expected_tokens"] = sum(lengths.values()) // CHARACTERS_PER_TOKEN
    (partial / "job.json").write_text(json.dumps(job), encoding="utf-8")
    os.replace(partial, todo)


def _finish(todo: Path, cache: ScoreCache, student: Student, processes: int, progress: ShowProgress | None) -> None:
    """Score the rows of a folder that the cache does not hold yet."""
    if processes == 1:
        return _score_share(_Share(todo, _read_job(todo), cache, student), progress)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["--multi_gpu", "-m", "afterglow.data_filters.scoring", str(todo)]
    environment = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // processes, 1))} | dict(os.environ)
    if not _gpus():  # the launcher for GPUs is the one that starts processes on a CPU without MPI
        environment["ACCELERATE_USE_CPU"] = "true"
    code = subprocess.run(command, env=environment, preexec_fn=end_with_parent, check=False).returncode
    if code:
        raise ModelError(
            f"{processes} processes scored and one ended with code {code}; it says why, above. Once that is "
            "mended, the same command goes on where they stopped."
        )
    return None


def _read_job(todo: Path) -> dict[str, Any]:
    return json.loads((todo / "job.json").read_text(encoding="utf-8"))


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


# ---------------------------------------------------------------------------------------------------------------------
# one process


@dataclass
class _Share:
    """The blocks of one process."""

    todo: Path
    job: dict
    cache: ScoreCache
    student: Student
    rank: int = 0
    processes: int = 1
    device: "torch.device | None" = None
    done: set = field(default_factory=set)  # keys of the cache, and of the local passes of its rows


def _score_share(share: _Share, progress: ShowProgress | None) -> None:
    from datasets import load_from_disk

    rows = cast("Dataset", load_from_disk(str(share.todo)))
    keys = [str(key) for key in rows["key"]]
    share.done.update(share.cache.find(set(keys)))
    size = min(_LARGEST_BLOCK, max(8, math.ceil(len(keys) / 64)))
    starts = range(share.rank * size, len(keys), share.processes * size)
    ranges = [range(start, min(start + size, len(keys))) for start in starts]
    own = sum(map(len, ranges))
    ranges = [block for block in ranges if not all(keys[i] in share.done for i in block)]
    if not ranges:
        return
    left = sum(keys[i] not in share.done for block in ranges for i in block)
    name = "RSR: trajectories scored" + (f" by process 0 of {share.processes}" if share.processes > 1 else "")
    with share.cache.writer() as log, _backend(share) as (scorer, speed), bar_of(progress, name, own) as bar:
        bar.advance(own - left)
        for block in ranges:
            for _ in _score_block(share, rows.select(block), scorer, speed, log):
                bar.advance(1, speed.note())


class _Pending:
    """A row some of whose passes are still to come."""

    def __init__(self, key: str, truncated: bool, local: Sequence[ScoredSequence]):
        self.line: dict[str, Any] = {"key": key, "truncated": truncated}
        self.waits = {key, *(sequence.key for sequence in local)}
        self.local_sum, self.local_count = 0.0, 0

    def take(self, key: Any, stats: TokenStats, scoring: Scoring) -> None:
        """Take in the statistics of one pass."""
        self.waits.discard(key)
        if isinstance(key, str):
            self.line |= _measure(stats, scoring)
        else:
            self.local_sum += stats.nll.double().sum().item()
            self.local_count += len(stats.nll)
        if not self.waits and scoring.baselines:
            self.line["local_surprisal"] = self.local_sum / self.local_count if self.local_count else math.nan


def _score_block(share: _Share, rows: "Dataset", scorer: "Scorer", speed: Throughput, log: JsonlLog) -> Iterator[str]:
    """Append a line for each row of a block that the cache does not hold, and yield its key."""
    student = share.student
    pending: dict[str, _Pending] = {}
    sequences: list[ScoredSequence] = []
    faults: list[DataError] = []
    for row in _rows(rows):
        key = row["key"]
        try:
            chat = student.encode(row)
        except DataError as error:
            faults.append(error)
            if key not in share.done:
                log.append({"key": key, "fault": f"not scored: {error}", "truncated": False, "n_tokens": 0})
                yield key
            continue
        local = student.local_sequences(key, chat) if student.scoring.baselines else []
        sequences += [ScoredSequence(key, chat.input_ids, chat.assistant), *local]
        if key in share.done:
            share.done.update(sequence.key for sequence in local)
        else:
            pending[key] = _Pending(key, chat.truncated, local)
    if faults and not sequences:
        raise DataError(f"`model: {student.scoring.model}` reads none of {len(faults)} trajectories: {faults[0]}")
    lengths = {sequence.key: len(sequence.input_ids) for sequence in sequences}
    for key, stats in scorer(sequences, share.done):
        speed.add(lengths[key], len(stats.nll))
        row = pending.get(key if isinstance(key, str) else cast("tuple[str, int]", key)[0])
        if row is None:  # in the cache already: a batch that a kill cut short is repeated
            continue
        row.take(key, stats, student.scoring)
        if not row.waits:
            log.append(_without_nan(row.line))
            yield row.line["key"]


def _measure(stats: TokenStats, scoring: Scoring) -> dict[str, Any]:
    """Return what is stored of a trajectory's token statistics."""
    score = trajectory_rsr(stats, scoring.r_max)
    line = {
        "n_tokens": score.n_tokens,
        "avg_rank_clip": score.avg_rank_clip,
        "avg_surprisal": score.avg_surprisal,
        "mean_rank": stats.rank.double().mean().item(),
    }
    if scoring.baselines and stats.entropy is not None:
        line["entropy"] = stats.entropy.double().mean().item()
    return line


def _without_nan(line: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in line.items()}


# ---------------------------------------------------------------------------------------------------------------------
# backends

Scorer = Callable[[Sequence[ScoredSequence], Container[Hashable]], Iterator[tuple[Hashable, TokenStats]]]


@contextmanager
def _backend(share: _Share) -> "Iterator[tuple[Scorer, Throughput]]":
    """Load the student; return what scores a block, and a meter of its speed."""
    if share.student.scoring.backend == "vllm":
        with _vllm(share) as scorer:
            yield scorer, Throughput()
        return
    model = _load_model(share)
    body, head = body_and_head(model)
    peak = peak_flops(head.weight.device, head.weight.dtype)
    devices = len({parameter.device for parameter in model.parameters()}) * share.processes
    speed = Throughput(forward_flops(body, head.weight), devices * peak if peak else None, share.processes)
    with TokenScorer(
        model,
        token_budget=share.job["token_budget"],
        entropy=share.student.scoring.baselines,
        expected_tokens=share.job["expected_tokens"],
    ) as scorer:
        yield scorer.score, speed


def _load_model(share: _Share) -> "PreTrainedModel":
    import torch
    from transformers import AutoModelForCausalLM

    scoring = share.student.scoring
    devices = "auto" if torch.cuda.is_available() else None
    if share.device is not None and share.device.type != "cpu":
        devices = {"": share.device}
    try:
        dtype = getattr(torch, scoring.dtype)
        return AutoModelForCausalLM.from_pretrained(scoring.model, dtype=dtype, device_map=devices)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load `model: {scoring.model}`: {error}") from error


@contextmanager
def _vllm(share: _Share) -> "Iterator[Scorer]":
    from ..core.engine_vllm import VLLMEngine
    from ..core.generation import EngineConfig

    scoring = share.student.scoring
    engine = VLLMEngine(
        EngineConfig(model=scoring.model, dtype=scoring.dtype, max_model_len=share.student.max_length + 1)
    )
    try:
        yield lambda sequences, done: engine.token_stats([s for s in sequences if s.key not in done])
    finally:
        engine.close()


# ---------------------------------------------------------------------------------------------------------------------
# one process of several


def main(arguments: list[str]) -> int:
    """Score this process's share of a folder that `score` has written."""
    from accelerate import Accelerator

    todo = Path(arguments[0])
    job = _read_job(todo)
    accelerator = Accelerator()
    try:
        student = Student(Scoring(**job["scoring"]))
        cache = ScoreCache(Path(job["cache"]), student.key)
        place = accelerator.process_index, accelerator.num_processes, accelerator.device
        share = _Share(todo, job, cache, student, *place)
        _score_share(share, show_progress if accelerator.is_main_process else None)
    except AfterglowError as error:
        print(error, file=sys.stderr)
        return 2
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
