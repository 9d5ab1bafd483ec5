"""Tasks of lm-evaluation-harness, `tasks: [lm_eval:arc_easy, lm_eval:my_task.yaml]`, on our engines.

lm-eval writes the prompts and computes its metrics; an engine answers: texts by `generate`, log-likelihoods by
`token_stats`. Every answer goes to `lm_eval_answers.jsonl` as it arrives, under a hash of what was asked, so that a
killed run asks only for what is missing; lm-eval's own results go to `lm_eval.json`. A task whose first metric is 0 or
1 for every document also gets our scores: its documents are problems with one sample each.
"""

import difflib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import DataError, MissingDependencyError, RecipeError
from ..core.generation import Engine, Request, SamplingConfig
from ..core.run_folder import JsonlLog, write_atomic
from ..core.trajectory import content_hash
from .scores import Sample, score

if TYPE_CHECKING:
    from ..core.token_stats import ScoredSequence

PREFIX = "lm_eval:"
ANSWERS_FILE, RESULTS_FILE = "lm_eval_answers.jsonl", "lm_eval.json"
SCORED_TOGETHER = 1024  # log-likelihoods between two writes
HARMLESS = {"do_sample", "until", "max_gen_toks", "temperature", "top_p", "top_k", "min_p"}


class HarnessTasks:
    """Tasks of lm-eval, loaded and checked: their data is read here, before a model is.

    Args:
        names: as in the recipe, without the prefix: names of lm-eval, or task files.
        options: arguments of `lm_eval.simple_evaluate`, such as num_fewshot, apply_chat_template or gen_kwargs.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        RecipeError: lm-eval has no such task; names the nearest.
        DataError: its data cannot be read.
    """

    def __init__(self, names: Sequence[str], options: Mapping[str, Any]):
        try:
            from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise MissingDependencyError(
                f"`tasks: [{PREFIX}...]` needs lm-eval, which cannot be imported ({error}): "
                "pip install 'afterglow[lm-eval]'."
            ) from error
        # The index of lm-eval's own tasks takes a while, and files need none.
        self._manager: Any = TaskManager(include_defaults=not all(map(is_task_file, names)))
        self._options = dict(options)
        self._tasks = {name: self._load(name) for name in names}

    def _load(self, name: str) -> Any:
        known = self._manager.all_tasks
        if name not in known and not is_task_file(name):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise RecipeError(
                f"`tasks`: lm-eval has no task {name!r}, and there is no such task file in {Path.cwd()}."
                + (f" Did you mean {PREFIX}{near[0]}?" if near else "")
            )
        try:
            return list(self._manager.load([name])["tasks"].values())
        except Exception as error:  # whatever `datasets` or the task's own code raises
            raise DataError(f"lm-eval could not load {name!r}: {type(error).__name__}: {error}") from error

    def run(self, engine: Engine, folder: Path) -> None:
        """Ask every question and write lm-eval's results."""
        import lm_eval  # pyright: ignore[reportMissingImports]

        log = JsonlLog(folder / ANSWERS_FILE)
        model = harness_model(engine, Answers(engine, log))
        results = {}
        for name, tasks in self._tasks.items():
            found = lm_eval.simple_evaluate(model=model, tasks=tasks, **self._options)
            assert found is not None  # that is for other ranks
            results[name] = {key: found[key] for key in ("results", "samples", "versions", "higher_is_better")}
        log.close()
        write_atomic(folder / RESULTS_FILE, json.dumps(results, ensure_ascii=False, default=str) + "\n")


def is_task_file(name: str) -> bool:
    """Whether a name is that of a file and not of a task in lm-eval's index."""
    return name.endswith(".yaml") and Path(name).is_file()


class Answers:
    """Answers what lm-eval asks, each answer once: those of an earlier run are read from the log.

    A question that is asked several times is answered as often: by its place among the same ones.
    """

    def __init__(self, engine: Engine, log: JsonlLog):
        self._engine, self._log = engine, log
        self._known = {row["key"]: row["answer"] for row in log.rows()}

    def texts(self, asked: Sequence[tuple[list[int], SamplingConfig]]) -> list[str]:
        """Return what the model writes after each prompt (token ids)."""
        keys = _keys("text", [(prompt, vars(sampling)) for prompt, sampling in asked])
        requests = [
            Request(key, tuple(self._cut(prompt, sampling.max_tokens)), int(key, 16) >> 1, sampling)
            for key, (prompt, sampling) in zip(keys, asked, strict=True)
            if key not in self._known
        ]
        for completion in self._engine.generate(requests) if requests else ():
            self._keep(completion.key, completion.text)
        return [self._known[key] for key in keys]

    def _cut(self, prompt: list[int], most: int) -> list[int]:
        """Leave out the beginning of a prompt that leaves no room for its answer, as lm-eval's own models do."""
        return prompt[-max(1, self._engine.max_context - most) :]

    def log_likelihoods(self, asked: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return log p(continuation | context) in nats, and whether greedy decoding would write it.

        Args:
            asked: (context, continuation) as token ids; a context too long loses its beginning.
        """
        keys = _keys("log-likelihood", asked)
        missing = [(key, pair) for key, pair in zip(keys, asked, strict=True) if key not in self._known]
        for start in range(0, len(missing), SCORED_TOGETHER):
            some = [self._sequence(*item) for item in missing[start : start + SCORED_TOGETHER]]
            for key, stats in self._engine.token_stats(some):
                self._keep(str(key), [-float(stats.nll.double().sum()), bool((stats.rank <= 1).all())])
        return [(self._known[key][0], self._known[key][1]) for key in keys]

    def _sequence(self, key: str, pair: tuple[list[int], list[int]]) -> "ScoredSequence":
        from ..core.token_stats import ScoredSequence

        ids = (pair[0] + pair[1])[-(self._engine.max_context - 1) :]  # vLLM generates one token more
        scored = min(len(pair[1]), len(ids) - 1)
        return ScoredSequence(key, ids, [False] * (len(ids) - scored) + [True] * scored)

    def _keep(self, key: str, answer: Any) -> None:
        self._log.append({"key": key, "answer": answer})
        self._known[key] = answer


def _keys(kind: str, asked: Sequence[Any]) -> list[str]:
    seen: Counter[str] = Counter()
    keys = []
    for question in asked:
        name = content_hash(kind, question)
        keys.append(content_hash(name, seen[name]))
        seen[name] += 1
    return keys


def sampling_of(asked: Mapping[str, Any]) -> SamplingConfig:
    """Turn lm-eval's `generation_kwargs`, as its `normalize_gen_kwargs` returns them, into ours.

    Raises:
        RecipeError: it asks for something that our engines do not do.
    """
    wanted = {key: value for key, value in asked.items() if value is not None}
    if wanted.get("num_beams") == 1:
        del wanted["num_beams"]
    if other := sorted(wanted.keys() - HARMLESS):
        raise RecipeError(f"an lm-eval task asks for {', '.join(other)}, which no engine here does")
    return SamplingConfig(
        temperature=float(wanted.get("temperature", 0.0)), top_p=float(wanted.get("top_p", 1.0)),
        top_k=int(wanted.get("top_k") or -1), min_p=float(wanted.get("min_p", 0.0)),
        max_tokens=int(wanted["max_gen_toks"]), stop=[text for text in wanted.get("until", []) if text],
    )  # fmt: skip


def harness_model(engine: Engine, answers: Answers) -> Any:
    """Return the `lm_eval.api.model.LM` that asks an engine; tokens are made as by lm-eval's own `hf` model."""
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

    class EngineModel(TemplateLM):
        tokenizer: Any = engine.tokenizer
        tokenizer_name = str(engine.tokenizer.name_or_path)
        max_length = engine.max_context

        @property
        def eot_token_id(self) -> int:
            return self.tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            first = self.tokenizer.bos_token_id
            return self.eot_token_id if first is None else first

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            start = self.tokenizer.bos_token
            if add_special_tokens is None:
                add_special_tokens = not (start and string.startswith(start))
            return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )  # fmt: skip

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            pairs = [request.args for request in requests]
            return answers.texts(
                [(self.tok_encode(text), sampling_of(normalize_gen_kwargs(wanted))) for text, wanted in pairs]
            )

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return answers.log_likelihoods([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            windows = [
                [make_disjoint_window(window) for window in get_rolling_token_windows(
                    self.tok_encode(request.args[0], add_special_tokens=False), self.prefix_token_id,
                    self.max_length - 1, 1,
                )]
                for request in requests
            ]  # fmt: skip
            found = iter(answers.log_likelihoods([window for of_text in windows for window in of_text]))
            return [sum(next(found)[0] for _ in of_text) for of_text in windows]

    return EngineModel()


# ---------------------------------------------------------------------------------------------------------------------
# results


def harness_scores(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the scores of the tasks that have right and wrong documents, and the counts of each document."""
    scores: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for name, found in json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8")).items():
        documents = _documents(found["samples"])
        metric = _right_or_wrong([sample for _, sample in documents])
        if metric is None:
            continue
        samples = {doc: [Sample(0, bool(sample[metric]), None, None, None, None)] for doc, sample in documents}
        label = f"{PREFIX}{name}"
        scores[label], counts = score(samples, 1, [1], label)
        scores[label] |= {
            "task": label, "mode": "none", "version": next(iter(found["versions"].values()), None), "lm_eval": metric,
        }  # fmt: skip
        rows += [{"task": label, **row} for row in counts]
    return scores, rows


def _documents(samples: Mapping[str, list[dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """Return every document of every task under its name; of several filters, the first."""
    found: dict[str, dict[str, Any]] = {}
    for task, of_task in samples.items():
        for sample in of_task:
            found.setdefault(f"{task}/{sample['doc_id']}", sample)
    return list(found.items())


def _right_or_wrong(samples: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the first metric that is 0 or 1 for every document, if there is one."""
    names = dict.fromkeys(name for sample in samples for name in sample["metrics"])
    return next((name for name in names if all(sample.get(name) in (0, 1) for sample in samples)), None)


def harness_table(folder: Path) -> Iterator[tuple[str, str, float, float | None]]:
    """Yield lm-eval's own numbers: task, metric with its filter, value, and its standard error."""
    for found in json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8")).values():
        for task, metrics in found["results"].items():
            for metric, value in metrics.items():
                if isinstance(value, int | float) and "," in metric and "_stderr," not in metric:
                    name, _, chosen = metric.partition(",")
                    error = metrics.get(f"{name}_stderr,{chosen}")
                    yield task, metric, float(value), error if isinstance(error, int | float) else None


def show_harness(folder: Path) -> None:
    """Print lm-eval's own numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "metric, filter", "value", "standard error", title="lm-eval", title_justify="left")
    for task, metric, value, error in harness_table(folder):
        table.add_row(task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}")
    Console().print(table)
