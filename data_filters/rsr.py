"""Rank-Surprisal Ratio: keep the trajectories, or the teacher, that suit the student best (arXiv 2601.14249).

    RSR(x) = sum_k min(rank(t_k), r_max) / sum_k surprisal(t_k)        (Eq. 7; lower is better)

over the tokens t_k that the assistant wrote, under the student before training. A low rank says that the student
would consider the token, a high surprisal that it has something to learn from it. Correctness plays no part: in the
paper (section 5.1) discarding wrong trajectories first did not help.

The mathematics stands in `rank_surprisal`, the forward passes in `scoring`, what is compared in `quality_baselines`.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from ..core.errors import DataError, RecipeError
from ..core.trajectory import completion_text
from .columns import source_names, values_of
from .quality_baselines import limo_scores
from .rank_surprisal import RSRScore, rank_teachers, sample_teachers, select_per_problem
from .result import FilterResult, ShowProgress
from .rsr_report import report_student
from .score_cache import default_folder
from .scoring import Measured, score
from .student import Scoring, Student

if TYPE_CHECKING:
    from datasets import Dataset

Selection = Literal["per_problem", "best_teacher", "none"]
Precision = Literal["bfloat16", "float16", "float32"]
Backend = Literal["transformers", "vllm"]


@dataclass
class RSRConfig:
    """Score trajectories under the student and keep the most suitable of each problem, or of the best teacher."""

    model: str = field(metadata={"help": "The student before training: a model folder or hub id with a chat template."})
    more_students: list[str] = field(
        default_factory=list,
        metadata={"help": "Further students to score under, for comparison; `model` decides what is kept."},
    )
    r_max: int = field(
        default=100, metadata={"help": "Higher ranks count as this one (Eq. 7); the paper's value is 100."}
    )
    select: Selection = field(
        default="per_problem",
        metadata={
            "help": "per_problem: keep the lowest ratio of each problem. best_teacher: score a sample, keep the "
            "teacher with the lowest ratio. none: only score."
        },
    )
    teacher_sample: int = field(
        default=200, metadata={"help": "Trajectories of each teacher that `best_teacher` scores; the paper's value."}
    )
    max_length: int = field(
        default=32768,
        metadata={"help": "Tokens of prompt and completion, at most the model's context; the rest is cut off."},
    )
    drop_truncated: bool = field(
        default=False, metadata={"help": "Drop trajectories that were cut off instead of scoring their beginning."}
    )
    min_tokens: int = field(default=1, metadata={"help": "Drop trajectories with fewer scored tokens."})
    include_eos: bool = field(
        default=False, metadata={"help": "Also score the token that ends a turn (the paper's code does not)."}
    )
    baselines: bool = field(
        default=False,
        metadata={"help": "Also measure entropy and local surprisal, to compare with: about six times the work."},
    )
    dtype: Precision = field(
        default="bfloat16",
        metadata={"help": "Precision of the forward pass. Ties in low precision lower ranks slightly; do not mix."},
    )
    backend: Backend = field(
        default="transformers",
        metadata={"help": "transformers: exact ranks. vllm: the same in float32, ties in 16 bits count upwards."},
    )
    token_budget: int = field(default=4096, metadata={"help": "Tokens of one forward pass, padding included."})
    num_processes: int = field(
        default=1, metadata={"help": "Processes that share the work through accelerate, each with a GPU of its own."}
    )
    score_cache: str | None = field(
        default=None,
        metadata={"help": "Folder of scores that runs share; default: ~/.cache/afterglow/scores."},
    )

    def __post_init__(self) -> None:
        for name in ("r_max", "max_length", "min_tokens", "token_budget", "num_processes"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.teacher_sample < 2:
            raise RecipeError(f"teacher_sample must be at least 2, got {self.teacher_sample}")
        for name, choices in (("select", Selection), ("dtype", Precision), ("backend", Backend)):
            if getattr(self, name) not in get_args(choices):
                raise RecipeError(f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(self, name)!r}")
        if self.backend == "vllm" and (self.baselines or self.num_processes > 1):
            name = "baselines" if self.baselines else "num_processes"
            raise RecipeError(f"`{name}` needs `backend: transformers`: vLLM gives no entropy and runs in one process")
        if self.select == "best_teacher" and (self.drop_truncated or self.min_tokens > 1):
            raise RecipeError(
                "`select: best_teacher` scores a sample only, so `drop_truncated` and `min_tokens` cannot be asked of "
                "every row; use a `length` step"
            )
        names = [self.model, *self.more_students]
        if len({Path(name).name for name in names}) < len(names):
            raise RecipeError(f"`model` and `more_students` must end in different names, got {', '.join(names)}")
        if self.r_max < 100:
            warnings.warn(
                f"r_max {self.r_max} is below 100: in the paper's ablation 50 lowered the correlation with the "
                "student's results from 0.86 to 0.70",
                stacklevel=2,
            )

    def scoring(self, model: str) -> Scoring:
        """Return what the score of a trajectory under one of the students depends on."""
        settings = (self.backend, self.dtype, self.r_max, self.max_length, self.include_eos, self.baselines)
        return Scoring(model, *settings)


def check(table: "Dataset", config: RSRConfig, filled: set[str]) -> None:
    """Say what is wrong with the students before anything is computed: nothing but small files is read.

    Raises:
        ModelError: A model cannot be found, lacks weights, chat template or a fast tokenizer.
        DataError: The chat template does not render the first trajectory, or there is no second teacher to compare.
        MissingDependencyError: `backend: vllm` without vLLM.
    """
    for model in (config.model, *config.more_students):
        Student(config.scoring(model)).check(table)
    if config.select == "best_teacher" and len(set(source_names(table))) < 2:
        raise DataError("`select: best_teacher` compares teachers, and `source` names one only; check `columns`")
    if config.backend == "vllm":
        from ..core.engine_vllm import import_vllm, process_state_kept

        with process_state_kept():
            import_vllm()


def apply(
    table: "Dataset", config: RSRConfig, *, seed: int, cache_folder: Path, progress: ShowProgress | None = None
) -> FilterResult:
    """Score every trajectory, or a sample of each teacher, and decide which to keep.

    Args:
        table: Trajectories: id, problem_id, prompt, completion, source, correct.
        config: What to do.
        seed: Decides which trajectories `best_teacher` scores, and the bootstrap.
        cache_folder: What a killed call had planned is found in it.
        progress: Opens a progress bar; None shows none.

    Returns:
        Columns rsr, rsr_rank, rsr_surprisal, rsr_tokens, rsr_truncated, rsr_mean_rank, rsr_limo, with `baselines`
        rsr_entropy and rsr_local_surprisal, rsr_for_NAME of further students; the dropped rows; the report's numbers.

    Raises:
        ModelError: The model cannot be loaded, has no chat template, or cannot be scored with.
        DataError: The chat template renders none of the trajectories.
    """
    teachers = source_names(table)
    ids, problems = values_of(table, "id"), values_of(table, "problem_id")
    rows = list(range(len(table)))
    if config.select == "best_teacher":
        rows = sample_teachers(problems, teachers, ids, config.teacher_sample, seed)
    measured = _Under(table, rows, config, config.model, cache_folder, progress)
    limo: list[float | None] = list(limo_scores([completion_text(completion) for completion in table["completion"]]))
    dropped = measured.unusable(config)
    if config.select == "per_problem":
        dropped |= _all_but_lowest(problems, teachers, ids, measured.scores, dropped)
    elif config.select == "best_teacher":
        dropped = _all_but_best_teacher(teachers, rows, measured.scores)
    scores = measured.columns(config) | {"rsr_limo": limo}
    reported = report_student(table, measured.scores, rows, scores, dropped, seed)
    report = {"model": config.model, "dtype": config.dtype, "backend": config.backend, "r_max": config.r_max}
    report |= reported | measured.work()
    for model in config.more_students:
        other = _Under(table, rows, config, model, cache_folder, progress)
        scores[f"rsr_for_{Path(model).name}"] = other.column("rsr")
        of = report_student(table, other.scores, rows, scores | other.columns(config), {}, seed)
        report.setdefault("more_students", {})[model] = {"teachers": of["teachers"]} | other.work()
    return FilterResult(scores=scores, dropped=dict(sorted(dropped.items())), report=report)


class _Under:
    """A table's rows, or some of them, under one student."""

    def __init__(
        self,
        table: "Dataset",
        rows: list[int],
        config: RSRConfig,
        model: str,
        cache_folder: Path,
        progress: ShowProgress | None,
    ):
        self.scores: dict[int, RSRScore] = {}
        self._length, self._rows = len(table), rows
        self._measured: Measured = score(
            table if len(rows) == len(table) else table.select(rows),
            config.scoring(model),
            cache=Path(config.score_cache) if config.score_cache else default_folder(),
            work=cache_folder,
            token_budget=config.token_budget,
            processes=config.num_processes,
            progress=progress,
        )
        for i, line in zip(rows, self._measured.rows, strict=True):
            rank, surprisal = _or_nan(line.get("avg_rank_clip")), _or_nan(line.get("avg_surprisal"))
            self.scores[i] = RSRScore(line["n_tokens"], rank, surprisal, line.get("fault"))

    def work(self) -> dict[str, int]:
        """Return how many trajectories were scored by this run, and how many were there already."""
        truncated = sum(line["truncated"] for line in self._measured.rows)
        new, rows = self._measured.new, len(self._rows)
        return {"scored_now": new, "rows_scored": rows, "truncated": truncated, "max_length": self._measured.max_length}

    def column(self, name: str) -> list:
        """Return one value per row of the table; None where there is none."""
        column: list = [None] * self._length
        for i, line in zip(self._rows, self._measured.rows, strict=True):
            value = self.scores[i].rsr if name == "rsr" else line.get(name)
            column[i] = None if isinstance(value, float) and math.isnan(value) else value
        return column

    def columns(self, config: RSRConfig) -> dict[str, list]:
        """Return the columns of the table that a student fills."""
        names = {
            "rsr": "rsr",
            "rsr_rank": "avg_rank_clip",
            "rsr_surprisal": "avg_surprisal",
            "rsr_tokens": "n_tokens",
            "rsr_truncated": "truncated",
            "rsr_mean_rank": "mean_rank",
        }
        if config.baselines:
            names |= {"rsr_entropy": "entropy", "rsr_local_surprisal": "local_surprisal"}
        return {column: self.column(name) for column, name in names.items()}

    def unusable(self, config: RSRConfig) -> dict[int, str]:
        """Return the rows that have no ratio to be chosen by, and why."""
        dropped: dict[int, str] = {}
        for i, line in zip(self._rows, self._measured.rows, strict=True):
            score = self.scores[i]
            if score.fault:
                dropped[i] = f"rsr: {score.fault}"
            elif score.n_tokens < config.min_tokens:
                dropped[i] = f"rsr: {score.n_tokens} scored tokens, fewer than {config.min_tokens}"
            elif config.drop_truncated and line["truncated"]:
                dropped[i] = f"rsr: longer than {self._measured.max_length} tokens"
            elif score.invalid:
                dropped[i] = f"rsr: {score.invalid}"
        return dropped


def _all_but_lowest(
    problems: Sequence[str], teachers: Sequence[str], ids: Sequence[str], scores: dict[int, RSRScore], out: dict
) -> dict[int, str]:
    ratios = [None if i in out else scores[i].rsr for i in range(len(ids))]
    kept = select_per_problem(problems, teachers, ids, ratios)
    lowest = {problems[i]: scores[i].rsr for i in kept}
    others = set(range(len(ids))) - set(kept) - set(out)
    return {i: f"rsr: {scores[i].rsr:.3f}, while another of its problem has {lowest[problems[i]]:.3f}" for i in others}


def _all_but_best_teacher(teachers: Sequence[str], rows: list[int], scores: dict[int, RSRScore]) -> dict[int, str]:
    by_teacher: dict[str, list[RSRScore]] = {name: [] for name in teachers}
    for i in rows:
        by_teacher[teachers[i]].append(scores[i])
    ranked = rank_teachers(by_teacher)
    best, ratio = ranked[0][0], {name: of.rsr for name, of in ranked}
    if math.isnan(ratio[best]):
        raise DataError("`select: best_teacher`: no teacher has a trajectory with a ratio; see `rsr` in the report")
    return {
        i: f"rsr: teacher {name} has {ratio[name]:.3f}, while {best} has {ratio[best]:.3f}"
        for i, name in enumerate(teachers)
        if name != best
    }


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
