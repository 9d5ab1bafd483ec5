"""`afterglow eval` with `suite:`: what an unlearned model still knows, and what else it lost.

    suite: tofu                       model: runs/unlearn/npo
    retrained: runs/eval/retrained    output_dir: runs/eval/npo
    forget: forget10_perturbed.jsonl  retain: retain_perturbed.jsonl

loads the checkpoint, scores every text in one batched pass, generates every answer, and writes each as soon as it is
there (`token_scores.jsonl`, `generations.jsonl`, ...), then `rows.jsonl` (one row per question with all its metrics)
and `scores.json`, forgetting and utility side by side.
"""

import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ..core.checkpoint import read_checkpoint
from ..core.generation import EngineConfig
from ..core.recipe import Section, build, plain
from ..core.row_sources import is_file
from ..core.run_folder import RunFolder, write_atomic
from ..core.trajectory import content_hash
from . import diagnostics, path_audit, relearning, scaling, tofu_logs
from .quantisation import quantised_copy
from .suite_base import NO_MODEL, ROWS_FILE, SCORES_FILE, Measured, RetrainedConfig, Suite, SuiteConfig, read_retrained
from .suite_leakage import LeakageConfig, LeakageSuite
from .suite_memorisation import MemorisationConfig, MemorisationSuite
from .suite_muse import MuseConfig, MuseSuite
from .suite_tofu import TofuConfig, TofuSuite
from .suite_wmdp import LETTERS, WmdpConfig, WmdpSuite
from .unlearning_measure import answer_choices, generate, gradient_norms, local, opened, score_texts

SUITES: dict[str, tuple[type[SuiteConfig], Any]] = {
    "tofu": (TofuConfig, TofuSuite),
    "muse": (MuseConfig, MuseSuite),
    "wmdp": (WmdpConfig, WmdpSuite),
    "memorisation": (MemorisationConfig, MemorisationSuite),
    "leakage": (LeakageConfig, LeakageSuite),
}
STUDIES = {  # which do not ask one model once
    "relearning": (relearning.RelearningConfig, relearning.run),
    "path_dependence": (path_audit.PathAuditConfig, path_audit.run),
    "tofu_logs": (tofu_logs.TofuLogsConfig, tofu_logs.run),
    "scaling": (scaling.ScalingConfig, scaling.run),
    "diagnostics": (diagnostics.DiagnosticsConfig, diagnostics.run),
}


@dataclass
class _SuiteName:
    suite: str = field(metadata={"choices": (*SUITES, *STUDIES)})


def parse_suite(section: Section) -> Any:
    """Read a recipe with `suite:` and return what runs it: a function of `overwrite` and `dry_run`.

    Raises:
        RecipeError: the suite, a key or a value is wrong.
    """
    (named,) = build(Section({"suite": section.values["suite"]}, section.lines, section.where), _SuiteName)
    if named.suite in STUDIES:
        config_class, run = STUDIES[named.suite]
        return partial(run, *build(section, config_class))
    config_class, suite_class = SUITES[named.suite]
    config, engine = build(section, config_class, EngineConfig)
    return _SuiteRun(suite_class(config), engine).run


def run_suite(section: Section, overwrite: bool = False, dry_run: bool = False) -> Path:
    """Evaluate a checkpoint with a suite, or study several, and return the run's folder; a killed run goes on.

    Recipe, sets, the retrained model's run and the chat template are checked before the model is loaded.

    Raises:
        RecipeError: a key or value is wrong, or the run of the retrained model is missing.
        DataError: a row of a set cannot be used, or the retrained model was asked other questions.
        ModelError: the model cannot be read or has no chat template.
        RunFolderError: the folder belongs to another recipe, model or data.
    """
    return parse_suite(section)(overwrite, dry_run)


class _SuiteRun:
    """One evaluation of one checkpoint."""

    def __init__(self, suite: Suite, engine: EngineConfig):
        self.suite, self.engine, self.config = suite, engine, suite.config
        self.path = Path(self.config.output_dir)
        self.resolved = plain(self.config) | plain(engine)
        self.inputs: dict[str, str | list[str]] = {**suite.sources(), "model": engine.model}
        if isinstance(self.config, RetrainedConfig):
            if self.config.retrained != NO_MODEL:
                self.inputs["retrained"] = str(Path(self.config.retrained) / ROWS_FILE)
            if self.config.reference_model:
                self.inputs["reference_model"] = self.config.reference_model

    def run(self, overwrite: bool, dry_run: bool) -> Path:
        retrained = read_retrained(self.config) if isinstance(self.config, RetrainedConfig) else None
        if dry_run:
            if not overwrite:
                RunFolder.check(self.path, "eval", self.resolved, inputs=self.inputs)
            self._show_plan()
            return self.path
        if not overwrite and (self.path / SCORES_FILE).exists():
            with self._open() as folder:
                if folder.finished:
                    show_suite(folder.summary, self.path)
                    return self.path
        self.suite.read()
        tokenizer = read_checkpoint(self.engine.model).tokenizer
        self.suite.encode(tokenizer, getattr(self.config, "chat_template_kwargs", {}))
        # Only now: a recipe that is mended after an error meets no folder of its broken self.
        with self._open(overwrite, content_hash(tokenizer.chat_template)) as folder:
            rows = self.suite.rows(self._measure(folder))
            scores = {self.suite.name: self.suite.scores(rows, retrained)}
            write_atomic(self.path / ROWS_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            write_atomic(self.path / SCORES_FILE, json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
            folder.finish(scores)
        show_suite(scores, self.path)
        return self.path

    def _open(self, overwrite: bool = False, chat_template: str | None = None) -> RunFolder:
        extra = {"seed": self.config.seed, "suite": self.suite.name}
        return RunFolder.open(
            self.path, "eval", self.resolved, inputs=self.inputs, overwrite=overwrite,
            extra=extra if chat_template is None else extra | {"chat_template": chat_template},
        )  # fmt: skip

    def _measure(self, folder: RunFolder) -> Measured:
        """Do whatever was not done before the last kill."""
        suite, config, found = self.suite, self.config, Measured()
        keys = {"token_budget": config.token_budget, "compat": config.compat_open_unlearning}
        engine = self.engine
        if config.quantise is not None:
            engine = replace(engine, model=str(quantised_copy(local(engine), folder.path, config.quantise)))
        with opened(engine) as checkpoint:
            if suite.texts:
                found.texts = score_texts(folder, "token_scores.jsonl", suite.texts, checkpoint, **keys)
            if suite.attacked and "gradnorm" in getattr(config, "attacks", ()):
                found.gradients = gradient_norms(folder, "gradient_norms.jsonl", suite.attacked, checkpoint)
            if suite.choice_prompts:
                found.choices = answer_choices(
                    folder, "choices.jsonl", suite.choice_prompts, LETTERS, checkpoint,
                    read_checkpoint(engine.model).tokenizer, config.token_budget,
                )  # fmt: skip
            if suite.asks:
                found.answers = generate(
                    folder, "generations.jsonl", suite.asks, checkpoint, suite.sampling, config.seed
                )
        if suite.attacked and (reference := getattr(config, "reference_model", None)):
            with opened(replace(local(engine), model=reference)) as checkpoint:
                found.reference = score_texts(folder, "reference_scores.jsonl", suite.attacked, checkpoint, **keys)
        return found

    def _show_plan(self) -> None:
        from rich.console import Console
        from rich.markup import escape
        from rich.panel import Panel

        console = Console()
        recipe = yaml.safe_dump(self.resolved, sort_keys=False, allow_unicode=True).rstrip()
        console.print(Panel(escape(recipe), title="recipe"))
        if not all(map(is_file, self.suite.sources().values())):
            console.print("Sets on the hub were not read.")
        else:
            self.suite.read()
            if Path(self.engine.model).exists():
                tokenizer = read_checkpoint(self.engine.model).tokenizer
                self.suite.encode(tokenizer, getattr(self.config, "chat_template_kwargs", {}))
                tokens = sum(len(text.input_ids) for text in self.suite.texts)
                console.print(
                    f"{len(self.suite.texts):,} texts to score ({tokens:,} tokens), {len(self.suite.asks):,} answers "
                    f"to generate, {len(self.suite.choice_prompts):,} multiple-choice questions."
                )
        console.print("Nothing was written.")


def show_suite(scores: dict[str, Any], folder: Path) -> None:
    """Print every score with its interval."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for name, of_suite in scores.items():
        table = Table(title=f"{name}: {folder}", title_justify="left", caption="95% interval over questions")
        table.add_column("")
        table.add_column("value", justify="right")
        table.add_column("interval", justify="right")
        for metric, found in of_suite.items():
            if isinstance(found, dict) and "value" in found:
                interval = f"[{found['low']:.3g}, {found['high']:.3g}]" if found["low"] < found["high"] else ""
                table.add_row(metric.replace("_", " "), f"{found['value']:.4g}", interval)
        console.print(table)
    print(f"rows: {folder / ROWS_FILE}")
