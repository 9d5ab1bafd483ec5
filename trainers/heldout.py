"""Early stopping and checkpoint selection by held-out pass@k and response length, not by loss.

`core.checkpoint_selection` has the rule and its source. Where it rejects all checkpoints, the last weights remain.

Each checkpoint is sampled from through `core.generation`, by the first process, once it is on the disk; the others wait
(`ddp_timeout` limits how long). `heldout.jsonl` in `output_dir` has one row per checkpoint. A checkpoint is marked
complete after its row is written, so a resumed run finds the rows of all checkpoints that it can start from.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from warnings import warn

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..core.chat_encoding import encode_prompt
from ..core.checkpoint_selection import MOST_TRUNCATED, Candidate, select_checkpoint
from ..core.errors import RecipeError
from ..core.generation import EngineConfig, Request, SamplingConfig, open_engine
from ..core.grading import Grader
from ..core.pass_at_k import pass_at_k
from ..core.progress import progress
from ..core.run_folder import JsonlLog, write_atomic
from ..core.trajectory import DataConfig, content_hash, load_trajectories
from .checkpoints import checkpoint_folder

HELDOUT_FILE = "heldout.jsonl"


@dataclass
class HeldoutConfig:
    """Keys of the held-out evaluation; it runs where `heldout_problems` is set, at every checkpoint."""

    heldout_problems: str | None = field(
        default=None,
        metadata={
            "help": "File of held-out problems (`prompt`, `answer`). After each checkpoint (`save_steps`) they are "
            "sampled, and the model that remains at the end is the checkpoint that solves most without being longer."
        },
    )
    heldout_columns: dict[str, str] = field(
        default_factory=dict, metadata={"help": "Like `columns`, for `heldout_problems`."}
    )
    heldout_samples: int = field(default=8, metadata={"help": "Samples of each held-out problem."})
    heldout_k: int = field(default=8, metadata={"help": "The k of the pass@k that decides; at most `heldout_samples`."})
    heldout_temperature: float = field(default=0.6, metadata={"help": "Temperature of the held-out samples."})
    heldout_max_tokens: int = field(default=2048, metadata={"help": "Longest held-out sample, in tokens."})
    heldout_extract: str = field(
        default="boxed",
        metadata={"help": "Where the final answer stands, as in `grade`.", "choices": ["boxed", "marked", "last"]},
    )
    heldout_engine: str = field(
        default="transformers",
        metadata={
            "help": "What draws the samples. `vllm` is faster; on a GPU its memory stands beside the training's.",
            "choices": ["transformers", "vllm"],
        },
    )
    heldout_engine_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Passed on to the engine, such as `gpu_memory_utilization` for vllm."}
    )
    heldout_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many checkpoints in a row without a new best pass@k; null never stops."},
    )

    def check_heldout(self) -> None:
        """Check the keys against each other.

        Raises:
            RecipeError: one is out of range.
        """
        if not 1 <= self.heldout_k <= self.heldout_samples:
            raise RecipeError(
                f"`heldout_k: {self.heldout_k}` must be from 1 to `heldout_samples: {self.heldout_samples}`."
            )
        if self.heldout_patience is not None and self.heldout_patience < 1:
            raise RecipeError(f"`heldout_patience` must be at least 1, got {self.heldout_patience}.")
        if self.heldout_temperature == 0 and self.heldout_samples > 1:
            raise RecipeError("`heldout_temperature: 0` draws the same sample every time; use `heldout_samples: 1`.")
        if self.heldout_patience is not None and self.heldout_problems is None:
            raise RecipeError("`heldout_patience` does nothing without `heldout_problems`.")


def select(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the row of heldout.jsonl whose checkpoint to go on with, None where there is none."""
    candidates = [
        Candidate(str(row["step"]), row["pass@k"], row["standard_error"], row["mean_tokens"], row["truncated"])
        for row in rows
    ]
    name, _ = select_checkpoint(candidates)
    return next((row for row in rows if str(row["step"]) == name), None)


def should_stop(rows: list[dict[str, Any]], patience: int | None) -> bool:
    """Whether the last `patience` checkpoints brought no new best pass@k."""
    if patience is None or len(rows) <= patience:
        return False
    before = max(row["pass@k"] for row in rows[:-patience])
    return max(row["pass@k"] for row in rows[-patience:]) <= before


class HeldoutEvaluation(TrainerCallback):
    """Samples held-out problems after each checkpoint, and says which checkpoint is best and when to stop.

    It must stand before `MarkComplete`. `state.best_model_checkpoint` keeps the best one from being deleted.

    Args:
        args: the trainer's, a `HeldoutConfig`.
        seed: of the samples; those of a problem are the same draw at every checkpoint.

    Raises:
        DataError: the file of problems is wrong.
    """

    def __init__(self, args: Any, seed: int):
        self.args, self.seed = args, seed
        self._output_dir = Path(str(args.output_dir))
        data = DataConfig(data=args.heldout_problems, columns=args.heldout_columns)
        table = load_trajectories(data, require=("prompt", "answer"))
        self.problems = {str(row["problem_id"]): row for row in map(dict, table)}
        self.rows: list[dict[str, Any]] = []
        self._engine: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Keep the rows up to the step that training goes on from."""
        path = self._output_dir / HELDOUT_FILE
        if PartialState().is_main_process and path.exists():
            log = JsonlLog(path)
            self.rows = [row for row in log.rows() if row["step"] <= state.global_step]
            log.close()
            write_atomic(path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._decide(state, control)

    def on_save(self, args, state, control, **kwargs):
        """Sample from the checkpoint that was just written."""
        PartialState().wait_for_everyone()  # until every process has written its part
        if PartialState().is_main_process:
            row = {"step": state.global_step, "epoch": state.epoch, **self._evaluate(checkpoint_folder(args, state))}
            log = JsonlLog(self._output_dir / HELDOUT_FILE)
            log.append(row)
            log.close()
            self.rows.append(row)
        self._decide(state, control)

    def on_train_end(self, args, state, control, **kwargs):
        """Free the engine, and say so where no checkpoint was good enough to be selected."""
        if self.rows and not state.best_model_checkpoint:
            warn(
                f"{HELDOUT_FILE}: every checkpoint cut more than {MOST_TRUNCATED:.0%} of its held-out samples, so none "
                "was selected and the last weights remain. Raise `heldout_max_tokens`.",
                stacklevel=2,
            )
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _decide(self, state, control) -> None:
        """Tell all processes what the rows say."""
        # `save_total_limit` may have deleted one that only now, beside a shorter one, would be the best.
        best = select([row for row in self.rows if self._folder(row).is_dir()])
        told: list[Any] = [best, should_stop(self.rows, self.args.heldout_patience)]
        if PartialState().num_processes > 1:
            broadcast_object_list(told)
        best, stop = told
        if best is not None:
            state.best_model_checkpoint, state.best_metric = str(self._folder(best)), best["pass@k"]
        control.should_training_stop |= stop

    def _folder(self, row: dict[str, Any]) -> Path:
        return self._output_dir / f"{PREFIX_CHECKPOINT_DIR}-{row['step']}"

    def _evaluate(self, folder: Path) -> dict[str, Any]:
        args = self.args
        if self._engine is None:
            config = {"model": str(folder), "engine": args.heldout_engine, "dtype": "auto"}
            self._engine = open_engine(EngineConfig(**config, **args.heldout_engine_kwargs))
        else:
            self._engine.load_weights(str(folder))
        sampling = SamplingConfig(temperature=args.heldout_temperature, max_tokens=args.heldout_max_tokens)
        requests = [
            Request(f"{name}/{index}", prompt, int(content_hash(self.seed, name, index), 16) >> 1, sampling)
            for name, row in self.problems.items()
            for prompt in [tuple(encode_prompt(self._engine.tokenizer, row["prompt"]))]
            for index in range(args.heldout_samples)
        ]
        right = dict.fromkeys(self.problems, 0)
        tokens = truncated = 0
        with progress(f"held-out {folder.name}", len(requests)) as bar, Grader(extract=args.heldout_extract) as grader:
            for done in self._engine.generate(requests):
                name = done.key.rpartition("/")[0]
                right[name] += grader.grade(done.text, self.problems[name]["answer"]).correct is True
                tokens += len(done.token_ids)
                truncated += done.finish_reason == "length"
                bar.advance()
        return summarise(right, tokens, truncated, args.heldout_samples, args.heldout_k)


def summarise(right: dict[str, int], tokens: int, truncated: int, samples: int, k: int) -> dict[str, Any]:
    """Return pass@k over problems with its standard error, mean tokens and the share of cut samples."""
    scores, count = pass_at_k(samples, list(right.values()), k), len(right)
    spread = scores.var(ddof=1) if count > 1 else 0.0
    return {
        "pass@k": float(scores.mean()), "k": k, "pass@1": sum(right.values()) / (samples * count),
        "standard_error": float(np.sqrt(spread / count)), "problems": count, "samples": samples,
        "mean_tokens": tokens / (samples * count), "truncated": truncated / (samples * count),
    }  # fmt: skip
