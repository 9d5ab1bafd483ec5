"""What is evaluated: problems with gold answers, how they are asked, how answers are found and compared.

A recipe names its tasks in one list, `tasks: [gsm8k, my_task.yaml, my_problems.jsonl]`:

* a benchmark that comes with the package (`core/benchmarks/*.yaml`),
* a task file of your own, with the same keys,
* or just a file of problems; `columns` of the recipe says how its columns are called.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..core.answer_extraction import Extract
from ..core.benchmark_files import benchmark_names, task_file
from ..core.code_grading import CodeGrader
from ..core.code_tests import gold_of_row
from ..core.errors import DataError, RecipeError
from ..core.generation import SamplingConfig
from ..core.grading import Grader
from ..core.recipe import build, read_recipe
from ..core.sandbox import SandboxConfig
from ..core.trajectory import MAX_ERRORS_SHOWN, DataConfig, content_hash, load_trajectories, prompt_text
from .choices import lettered

DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
BOXED_PROMPT = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."
GraderKind = Literal["math", "choice", "numeric", "code"]
SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "stop")


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        problem_id: unique within its task.
        prompt: chat messages.
        answer: what each row of its samples repeats: the gold answer (None: sampled, never graded), or a short name
            of the tests.
        tests: of a program, where they stand in columns of their own: too long to be repeated.
    """

    problem_id: str
    prompt: list[dict[str, Any]]
    answer: str | None
    tests: str | None = None

    @property
    def gold(self) -> str | None:
        """What its grader compares with."""
        return self.answer if self.tests is None else self.tests


@dataclass(frozen=True)
class Task:
    """A benchmark, and how it is sampled unless the recipe says otherwise. Change its file, raise its version."""

    name: str = field(metadata={"help": "What its scores are called."})
    data: str = field(metadata={"help": "Hub id, or a local file of problems."})
    version: int = field(default=1, metadata={"help": "Scores of different versions do not compare."})
    subset: str | list[str] | None = field(default=None, metadata={"help": "Configuration name(s) on the hub."})
    split: str = field(default="test", metadata={"help": "Split on the hub."})
    columns: dict[str, str] = field(
        default_factory=dict, metadata={"help": "prompt, answer, problem_id -> the file's column name."}
    )
    answer_after: str | None = field(
        default=None, metadata={"help": "The gold answer is what follows the last of these marks in its column."}
    )
    choices: list[str] = field(
        default_factory=list,
        metadata={"help": "Column of the choices (a list), or a column for each: asked as A, B, ...; for `choice`."},
    )
    answer_index: int | None = field(
        default=None, metadata={"help": "Number of the first choice, where the answer is a number: 0 or 1."}
    )
    shuffle_choices: bool = field(
        default=False, metadata={"help": "Order the choices by chance (by the question, not by the run)."}
    )
    tests: list[str] = field(
        default_factory=list, metadata={"help": "Columns of tests, as LiveCodeBench has them; for `grader: code`."}
    )
    starter: str | None = field(default=None, metadata={"help": "Column of code that the answer must begin with."})
    test_seconds: float = field(default=6.0, metadata={"help": "Time limit of one test; for `grader: code`."})
    exclude: dict[str, str] = field(
        default_factory=dict, metadata={"help": "problem_id -> why it cannot be scored; left out."}
    )
    prompt_template: str = field(default=BOXED_PROMPT, metadata={"help": "Must contain {problem}."})
    system_prompt: str | None = field(default=None, metadata={"help": "Put before the problem."})
    grader: GraderKind = field(
        default="math",
        metadata={"help": "`math`: equal; `choice`: one letter; `numeric`: within rel_tol; `code`: passes its tests."},
    )
    extract: Extract = field(
        default="boxed", metadata={"help": "Where the final answer stands: `boxed`, `marked` or `last`."}
    )
    rel_tol: float = field(default=1e-2, metadata={"help": "Largest relative distance to gold, for `numeric`."})
    n: int = field(default=1, metadata={"help": "Samples per problem."})
    temperature: float = field(default=0.6, metadata={"help": "Softmax temperature."})
    top_p: float = field(default=0.95, metadata={"help": "Probability mass to sample from."})
    top_k: int = field(default=-1, metadata={"help": "Tokens to sample from; -1 is all."})
    min_p: float = field(default=0.0, metadata={"help": "Smallest probability, as a share of the largest."})
    max_tokens: int = field(default=32768, metadata={"help": "Longest completion."})
    stop: list[str] = field(default_factory=list, metadata={"help": "Strings that end a completion."})
    source: str = field(default="", metadata={"help": "Whose choice of data and settings this is."})
    pitfalls: str = field(default="", metadata={"help": "What readers of its scores must know."})

    def __post_init__(self):
        if "{problem}" not in self.prompt_template:
            raise RecipeError(f"prompt_template of task {self.name} must contain {{problem}}")
        if self.n < 1:
            raise RecipeError(f"n of task {self.name} is {self.n}: use at least 1")
        if self.n > 1 and self.temperature == 0:
            raise RecipeError(
                f"n of task {self.name} is {self.n}, but temperature 0 makes all samples the same: use n 1, or a "
                "temperature of 0.6 or so"
            )
        if self.choices and self.grader != "choice":
            raise RecipeError(f"task {self.name} has `choices`: say `grader: choice`")
        if self.tests and self.grader != "code":
            raise RecipeError(f"task {self.name} has `tests`: say `grader: code`")
        self.sampling()
        self.open_grader(1).close()  # checks the values; starts no process

    def sampling(self) -> SamplingConfig:
        """Return how its completions are drawn."""
        return SamplingConfig(**{key: getattr(self, key) for key in SAMPLING_KEYS})

    def open_grader(self, workers: int, sandbox: SandboxConfig | None = None) -> Grader | CodeGrader:
        """Return a grader of its answers; close it. Code runs in `sandbox`, within the limits of the task."""
        if self.grader == "code":
            return CodeGrader(replace(sandbox or SandboxConfig(), sandbox_timeout=self.test_seconds), workers)
        return Grader(self.grader, extract=self.extract, rel_tol=self.rel_tol, workers=workers)

    def load_problems(self, max_problems: int | None = None, graded: bool = True) -> list[Problem]:
        """Read its problems and check that every gold answer can be graded against.

        Args:
            max_problems: read only the first ones.
            graded: whether gold answers are needed; without, they may be missing and are not checked.

        Raises:
            DataError: a row without prompt or answer, a problem that stands twice, or gold answers that cannot be
                parsed; names file and row.
        """
        if self.data.endswith(DATA_SUFFIXES) and not Path(self.data).exists():
            raise DataError(f"{self.data}: no such file. Check `data` of task {self.name} (in {Path.cwd()}).")
        problems: dict[str, Problem] = {}
        faults: list[str] = []
        for place, (row, problem) in enumerate(self._rows(max_problems, graded), 1):
            if problem.problem_id in problems:
                faults.append(
                    f"row {place}: problem {problem.problem_id!r} stands twice; a task has one row per problem"
                )
            elif problem.problem_id not in self.exclude:
                try:
                    problems[problem.problem_id] = self._completed(row, problem)
                except DataError as error:
                    faults.append(f"problem {problem.problem_id!r}: {error}")
        self._refuse(faults + (self._gold_faults(problems.values()) if graded else []))
        return list(problems.values())

    def _rows(self, max_problems: int | None, graded: bool) -> Iterator[tuple[dict[str, Any], Problem]]:
        """Yield the rows of every subset, each with its problem."""
        subsets = self.subset if isinstance(self.subset, list) else [self.subset]
        for subset in subsets:
            table = load_trajectories(
                DataConfig(
                    data=self.data, subset=subset, split=self.split, columns=self.columns, max_rows=max_problems,
                    prompt_template="{problem}" if self.choices or self.starter else self.prompt_template,
                    system_prompt=self.system_prompt, answer_after=self.answer_after,
                ),
                require=("prompt", "answer") if (graded and not self.tests) or self.choices else ("prompt",),
            )  # fmt: skip
            rows: Any = table.remove_columns("completion")
            for row in rows:
                name, answer = row["problem_id"], row["answer"]
                yield row, Problem(f"{subset}/{name}" if len(subsets) > 1 else name, row["prompt"], answer)

    def _completed(self, row: dict[str, Any], problem: Problem) -> Problem:
        """Add what stands in other columns of its row."""
        if self.choices:
            return self._with_choices(row, problem)
        if self.tests:
            gold = gold_of_row(row, self.tests)
            problem = replace(problem, answer=f"tests {content_hash(gold)}", tests=gold)
        if self.starter:
            code = f"\n\nBegin with this code:\n```python\n{row[self.starter]}\n```" if row.get(self.starter) else ""
            text = self.prompt_template.replace("{problem}", prompt_text(problem.prompt) + code)
            problem = replace(problem, prompt=[*problem.prompt[:-1], {"role": "user", "content": text}])
        return problem

    def _with_choices(self, row: dict[str, Any], problem: Problem) -> Problem:
        text, letter = lettered(
            prompt_text(problem.prompt), str(problem.answer), row | {"answer": problem.answer}, self.choices,
            self.answer_index, self.shuffle_choices,
        )  # fmt: skip
        asked = {"role": "user", "content": self.prompt_template.replace("{problem}", text)}
        return replace(problem, prompt=[*problem.prompt[:-1], asked], answer=letter)

    def _gold_faults(self, problems: Iterable[Problem]) -> list[str]:
        with closing(self.open_grader(workers=1)) as grader:  # a grader of code starts no sandbox for this
            found = ((problem, grader.check_gold(problem.gold)) for problem in problems)
            return [f"problem {p.problem_id!r}: answer {str(p.answer)[:80]!r}: {fault}" for p, fault in found if fault]

    def _refuse(self, faults: list[str]) -> None:
        if not faults:
            return
        more = f"\n  ... and {len(faults) - MAX_ERRORS_SHOWN} more" if len(faults) > MAX_ERRORS_SHOWN else ""
        raise DataError(
            f"{self.data} (task {self.name}): {len(faults)} problem(s) cannot be scored:\n  "
            + "\n  ".join(faults[:MAX_ERRORS_SHOWN])
            + f"{more}\nMend the rows, map another column with `columns: {{answer: <your column>}}`, name another "
            "`grader`, or list the problems under `exclude` of a task file."
        )


def find_task(name: str) -> tuple[Task, list[str]]:
    """Return the task that a recipe means by a name, a task file or a file of problems, and the files it comes from.

    Raises:
        RecipeError: there is no such benchmark or file, or the task file is wrong; names the nearest benchmark.
    """
    if name.endswith(DATA_SUFFIXES):
        stem = Path(name).name.removesuffix(".gz").rpartition(".")[0]
        return Task(name=stem, data=name), [name]
    path = task_file(name)
    if path is None or not path.is_file():
        near = difflib.get_close_matches(name, benchmark_names(), n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise RecipeError(
            f"`tasks`: {name!r} is neither a benchmark ({', '.join(benchmark_names())}) nor a task file (.yaml) or a "
            f"file of problems ({', '.join(DATA_SUFFIXES)}) in {Path.cwd()}.{hint}"
        )
    (task,) = build(read_recipe(path), Task)
    return task, [str(path), task.data]


def load_tasks(names: Sequence[str], changes: dict[str, Any]) -> tuple[list[Task], dict[str, list[str]]]:
    """Resolve the `tasks` of a recipe.

    Args:
        names: what `find_task` understands.
        changes: keys of `Task` that the recipe sets for all of them; None means the task's own.

    Returns:
        The tasks, and for each name of a task the files it comes from.

    Raises:
        RecipeError: a task that does not exist, or a name that stands twice.
    """
    tasks: list[Task] = []
    sources: dict[str, list[str]] = {}
    set_keys = {key: value for key, value in changes.items() if value not in (None, {})}
    for name in names:
        task, made_of = find_task(name)
        if task.name in sources:
            raise RecipeError(f"`tasks`: two tasks are called {task.name!r}. Give one another name in a task file.")
        tasks.append(replace(task, **set_keys))
        sources[task.name] = made_of
    if not tasks:
        raise RecipeError(f"`tasks` is empty. Name at least one of {', '.join(benchmark_names())}, or a file.")
    return tasks, sources
