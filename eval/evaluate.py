"""`afterglow eval` and `afterglow sample`: draw samples, grade them as they arrive, score them, keep every one of them.

    model: Qwen/Qwen3-8B            output_dir: runs/eval/qwen3-8b
    tasks: [math500, aime24]        n: 16          k: [1, 4, 16]

writes `samples.jsonl` (one trajectory per sample: filters read it), `problems.jsonl` (counts per problem, from which
every other k, interval and paired comparison follows) and `scores.json`.

With `tools: [none, python]` every task is asked twice, as text and with Python in a sandbox; the second has the name
`math500+python` and says beside its scores how often, how early and how well the model called. `lm_eval:NAME` is a task
of lm-evaluation-harness (`lm_eval_bridge`).

With `samples: file.jsonl` nothing is generated: samples that exist are scored (`score_samples`). With `suite: tofu` and
its like a model is asked what it should have forgotten (`unlearning`). With `checkpoints:` in place of `model` every
checkpoint of a training is evaluated (`sweep`).
"""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..core.answer_extraction import Extract
from ..core.checkpoint import read_checkpoint
from ..core.code_grading import CodeGrader
from ..core.errors import RecipeError
from ..core.generation import Engine, EngineConfig, open_engine
from ..core.grading import Grader
from ..core.pass_at_k import check_k
from ..core.recipe import Section, build, plain
from ..core.rollout import RolloutConfig
from ..core.run_folder import RunFolder
from ..core.sandbox import Sandbox, SandboxConfig, open_sandbox
from ..core.tool_protocol import ToolProtocol, open_protocol
from ..core.trajectory import content_hash
from .lm_eval_bridge import PREFIX, RESULTS_FILE, HarnessTasks, harness_scores, is_task_file, show_harness
from .sampling import (
    SAMPLES_FILE,
    Job,
    Mode,
    Prompts,
    Sampler,
    encode_prompts,
    label_of,
    plan,
    put_in_order,
    read_rows_of,
    row_key,
    rows_done,
)
from .score_samples import run_scores
from .scores import default_k, group_samples, read_scores, same_mathematics, score, show_scores, write_scores
from .tasks import SAMPLING_KEYS, GraderKind, Problem, Task, load_tasks
from .tool_use import tool_use

IN_FLIGHT = 256  # rollouts with a tool at once, where the recipe's max_num_seqs does not say

Opener = Callable[[EngineConfig], AbstractContextManager[Engine]]


@dataclass
class SampleConfig:
    """What to sample. A key that is not set is the task's own."""

    output_dir: str = field(metadata={"help": "Folder of this run."})
    tasks: list[str] = field(
        metadata={"help": "Benchmarks of the package, task files (.yaml), files of problems, lm_eval:NAME."}
    )
    n: int | None = field(default=None, metadata={"help": "Samples per problem."})
    tools: list[Literal["none", "python"]] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "`none`: text only; `python`: the model may call Python; both: every task in both modes."},
    )
    seed: int = field(default=0, metadata={"help": "Decides every sample, each by its own seed made from this one."})
    columns: dict[str, str] = field(
        default_factory=dict, metadata={"help": "prompt, answer, problem_id -> the column's name in the problems file."}
    )
    prompt_template: str | None = field(default=None, metadata={"help": "Wraps each problem; contains {problem}."})
    system_prompt: str | None = field(default=None, metadata={"help": "Put before each problem."})
    chat_template_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Variables of the chat template, such as {enable_thinking: false}."}
    )
    temperature: float | None = field(default=None, metadata={"help": "Softmax temperature; 0 is greedy."})
    top_p: float | None = field(default=None, metadata={"help": "Probability mass to sample from."})
    top_k: int | None = field(default=None, metadata={"help": "Tokens to sample from; -1 is all."})
    min_p: float | None = field(default=None, metadata={"help": "Smallest probability, as a share of the largest."})
    max_tokens: int | None = field(default=None, metadata={"help": "Longest completion in tokens."})
    stop: list[str] | None = field(default=None, metadata={"help": "Strings that end a completion."})
    max_problems: int | None = field(default=None, metadata={"help": "First problems of each task: for smoke runs."})
    logprobs: bool = field(default=False, metadata={"help": "Write the mean log-probability of each sample."})

    def __post_init__(self):
        if not self.tools or len(set(self.tools)) < len(self.tools):
            raise RecipeError(f"tools is {self.tools}: use none, python, or [none, python]")

    def task_changes(self) -> dict[str, Any]:
        """Return the keys of a task that this recipe sets."""
        names = ("n", "columns", "prompt_template", "system_prompt", *SAMPLING_KEYS)
        return {name: getattr(self, name) for name in names}


@dataclass
class EvalConfig(SampleConfig):
    """What to evaluate, and how."""

    k: list[int] | None = field(default=None, metadata={"help": "Values of k; default: 1, 2, 4, ... up to n."})
    grader: GraderKind | None = field(default=None, metadata={"help": "`math`, `choice`, `numeric` or `code`."})
    extract: Extract | None = field(
        default=None, metadata={"help": "Where the final answer stands: `boxed`, `marked` or `last`."}
    )
    rel_tol: float | None = field(default=None, metadata={"help": "Relative tolerance, for `grader: numeric`."})
    workers: int = field(default=2, metadata={"help": "Answers graded at once, each in a process of its own."})
    lm_eval_kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "For lm_eval:NAME: arguments of `simple_evaluate`, such as {apply_chat_template: true}."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.workers < 1:
            raise RecipeError(f"workers is {self.workers}: use at least 1")

    def task_changes(self) -> dict[str, Any]:
        """Return the keys of a task that this recipe sets."""
        return super().task_changes() | {name: getattr(self, name) for name in ("grader", "extract", "rel_tol")}


def run(section: Section, overwrite: bool = False, dry_run: bool = False, opener: Opener | None = None) -> Path:
    """Evaluate a model as a recipe says, or go on where a killed run stopped, and return the run's folder.

    Recipe, problems, gold answers and the chat template are checked before the model is loaded.

    Args:
        section: what `core.recipe.read_recipe` returned.
        overwrite: delete what the folder holds and start again.
        dry_run: check everything that is on this machine, show what would be done, and write nothing.
        opener: opens the engine, or lends one that is open; default: `open_engine`.

    Raises:
        RecipeError: a key or value is wrong, such as a k above n.
        DataError: a problem or its gold answer is wrong.
        ModelError: the model cannot be read or has no chat template.
        RunFolderError: the folder belongs to another recipe, model or benchmark.
    """
    if section.values.get("suite") is not None:
        from .unlearning import run_suite  # needs torch

        return run_suite(section, overwrite, dry_run)
    if section.values.get("samples") is not None:
        return run_scores(section, overwrite, dry_run)
    if section.values.get("checkpoints") is not None:
        from .sweep import run_sweep  # it runs this module for each checkpoint

        return run_sweep(section, overwrite, dry_run)
    return _Evaluation("eval", *build(section, EvalConfig, *STAGE_CONFIGS), opener=opener).run(overwrite, dry_run)


def run_sample(section: Section, overwrite: bool = False, dry_run: bool = False) -> Path:
    """Draw samples as `run` does, without grading or scoring them; gold answers may be missing."""
    return _Evaluation("sample", *build(section, SampleConfig, *STAGE_CONFIGS)).run(overwrite, dry_run)


STAGE_CONFIGS = (EngineConfig, RolloutConfig, SandboxConfig)


class _Evaluation:
    """One run of `eval` or `sample`."""

    def __init__(
        self,
        stage: str,
        config: SampleConfig,
        engine: EngineConfig,
        rollouts: RolloutConfig,
        sandbox: SandboxConfig,
        opener: Opener | None = None,
    ):
        self.stage, self.config, self.engine = stage, config, engine
        self.rollouts, self.sandbox = rollouts, sandbox
        self.modes: list[Mode] = [*config.tools]
        self.open_engine = opener or open_engine
        self.path = Path(config.output_dir)
        self.harness = [name.removeprefix(PREFIX) for name in config.tasks if name.startswith(PREFIX)]
        own = [name for name in config.tasks if not name.startswith(PREFIX)]
        self.tasks, self.sources = ([], {}) if self.harness and not own else load_tasks(own, config.task_changes())
        if self.harness and not isinstance(config, EvalConfig):
            raise RecipeError(f"`tasks`: {PREFIX}{self.harness[0]} can be evaluated (`afterglow eval`), not sampled")
        if isinstance(config, EvalConfig):
            for task in self.tasks:
                check_k(config.k or [], task.n)

    def run(self, overwrite: bool, dry_run: bool) -> Path:
        if dry_run:
            if not overwrite:
                RunFolder.check(self.path, self.stage, self._resolved(), inputs=self._inputs())
            self._show_plan()
            return self.path
        if not overwrite and (self.path / SAMPLES_FILE).exists():
            with self._open() as folder:
                if folder.finished:
                    self._show()
                    return self.path
        problems = {task.name: self._load(task) for task in self.tasks}
        protocols = self._protocols()
        prompts = encode_prompts(protocols, problems)
        chat_template = content_hash(protocols[self.modes[0]].tokenizer.chat_template)
        jobs = plan(self.tasks, problems, self.modes)
        harness = HarnessTasks(self.harness, self._harness_options()) if self.harness else None
        with ExitStack() as stack:
            graders = self._open_graders(stack)
            sandbox = stack.enter_context(self._open_sandbox())
            # The folder comes last: a recipe that is mended after an error meets no folder of its broken self.
            folder = stack.enter_context(self._open(overwrite, chat_template=chat_template))
            sampler = Sampler(
                folder.log(SAMPLES_FILE), self.engine.model, self.config.seed, self.config.logprobs, graders,
                protocols, self.rollouts, self.engine.max_num_seqs or IN_FLIGHT,
            )  # fmt: skip
            self._draw(sampler, jobs, prompts, sandbox, harness)
            config = self.config
            folder.finish(self._score(config, graders) if isinstance(config, EvalConfig) else {"samples": len(jobs)})
        self._show()
        return self.path

    def _protocols(self) -> dict[Mode, ToolProtocol]:
        """Return how each mode asks. The chat template must be able to render it."""
        checkpoint = read_checkpoint(self.engine.model)
        names = {"none": None, "python": self.rollouts.tool_protocol}
        kwargs = self.config.chat_template_kwargs
        return {
            mode: open_protocol(names[mode], checkpoint.tokenizer, checkpoint.stop_ids, kwargs) for mode in self.modes
        }

    def _open_sandbox(self) -> AbstractContextManager[Sandbox | None]:
        """Start the sandbox, if a mode needs it: a machine that cannot isolate is refused before a model is loaded."""
        return open_sandbox(self.sandbox) if "python" in self.modes else nullcontext()

    def _open_graders(self, stack: ExitStack) -> dict[str, Grader | CodeGrader]:
        """Open a grader for each task, if samples are graded."""
        if not isinstance(self.config, EvalConfig):
            return {}
        workers = self.config.workers
        return {task.name: stack.enter_context(task.open_grader(workers, self.sandbox)) for task in self.tasks}

    def _resolved(self) -> dict[str, Any]:
        """Return the recipe with its defaults, without those of what it does not use."""
        resolved = plain(self.config) | plain(self.engine)
        if not self.harness:
            resolved.pop("lm_eval_kwargs", None)
        if "python" in self.modes or self.rollouts.think_tokens:
            resolved |= plain(self.rollouts)
        return resolved | (plain(self.sandbox) if self._runs_code else {})

    @property
    def _runs_code(self) -> bool:
        """Whether anything that the model writes is executed."""
        return "python" in self.modes or any(task.grader == "code" for task in self.tasks)

    def _inputs(self) -> dict[str, str | list[str]]:
        own = {f"task {name}": files for name, files in self.sources.items()}
        harness = {f"{PREFIX}{name}": name for name in self.harness if is_task_file(name)}
        return {**own, **harness, "model": self.engine.model}

    def _open(self, overwrite: bool = False, **extra: Any) -> RunFolder:
        return RunFolder.open(
            self.path,
            self.stage,
            self._resolved(),
            inputs=self._inputs(),
            overwrite=overwrite,
            extra={"seed": self.config.seed, "tasks": [plain(task) for task in self.tasks], **extra},
        )

    def _load(self, task: Task) -> list[Problem]:
        return task.load_problems(self.config.max_problems, graded=isinstance(self.config, EvalConfig))

    def _harness_options(self) -> dict[str, Any]:
        assert isinstance(self.config, EvalConfig)
        return {"limit": self.config.max_problems, **self.config.lm_eval_kwargs}

    def _draw(
        self, sampler: Sampler, jobs: list[Job], prompts: Prompts, sandbox: Sandbox | None, harness: HarnessTasks | None
    ) -> None:
        done = rows_done(sampler.log, jobs)
        todo = [job for job in jobs if job.key not in done]
        asks = harness is not None and not (self.path / RESULTS_FILE).exists()
        if todo or asks:
            with self.open_engine(self.engine) as engine:
                if todo:
                    sampler.draw(engine, todo, prompts, sandbox)
                if harness is not None and asks:
                    harness.run(engine, self.path)
        sampler.log.close()
        put_in_order(self.path / SAMPLES_FILE, {job.key: place for place, job in enumerate(jobs)}, row_key)

    def _score(self, config: EvalConfig, graders: dict[str, Grader | CodeGrader]) -> dict[str, Any]:
        samples = group_samples(read_rows_of(self.path / SAMPLES_FILE), "task")
        scores, rows = {}, []
        calls = tool_use(read_rows_of(self.path / SAMPLES_FILE))
        for task, mode in itertools.product(self.tasks, self.modes):
            label, k = label_of(task.name, mode), config.k or default_k(task.n)
            equal = same_mathematics(graders[task.name])
            scores[label], counts = score(samples[label], task.n, k, label, equal, config.workers)
            scores[label] |= {"task": task.name, "mode": mode, "version": task.version}
            if label in calls:
                scores[label]["tools"] = calls[label]
            rows += [{"task": label, **row} for row in counts]
        if self.harness:
            found, counts = harness_scores(self.path)
            scores, rows = scores | found, rows + counts
        write_scores(self.path, scores, rows)
        return scores

    def _show(self) -> None:
        if isinstance(self.config, EvalConfig):
            show_scores(read_scores(self.path), self.path)
            if self.harness:
                show_harness(self.path)
        print(f"samples: {self.path / SAMPLES_FILE}")

    def _show_plan(self) -> None:
        from rich.console import Console
        from rich.markup import escape
        from rich.panel import Panel
        from rich.table import Table

        console, table = Console(), Table("task", "version", "problems", "n", "samples", "tokens at most")
        recipe = yaml.safe_dump(self._resolved(), sort_keys=False, allow_unicode=True).rstrip()
        console.print(Panel(escape(recipe), title="recipe"))
        first = None
        for task in self.tasks:
            sizes = ["on the hub, not read", str(task.n), "", f"{task.max_tokens:,} per sample"]
            if Path(task.data).exists():
                problems = self._load(task)
                samples = len(problems) * task.n * len(self.modes)
                sizes = [f"{len(problems):,}", str(task.n), f"{samples:,}", f"{samples * task.max_tokens:,}"]
                first = first or problems[0]
            table.add_row(task.name, str(task.version), *sizes)
        for name in self.harness:
            table.add_row(f"{PREFIX}{name}", "", "lm-eval's", "", "", "")
        console.print(table)
        if first and Path(self.engine.model).exists():
            for mode, protocol in self._protocols().items():
                ids = protocol.encode(first.prompt)
                title = f"first prompt ({len(ids)} tokens, tools: {mode}), problem {first.problem_id}"
                console.print(Panel(escape(protocol.decode(ids)), title=title))
        if self._runs_code:
            with open_sandbox(self.sandbox) as sandbox:
                console.print(Panel(escape(sandbox.describe()), title="sandbox"))
        console.print("Nothing was written.")
