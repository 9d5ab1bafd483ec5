"""`suite: relearning`: fine-tune an unlearned model for a few steps and watch what comes back, beside a control.

    suite: relearning            model: runs/npo         original: runs/full       retrained: runs/retrained
    forget: forget.jsonl         benign: other.jsonl     samples: 20               seeds: [0, 1, 2]

Each arm is one attack: a model (unlearned, retrained), what it is fine-tuned on (some forget rows, or benign ones), how
(full or LoRA), a seed. `curves.jsonl` has a row for every arm and step: the metric over the whole forget set, and over
the forget rows that the arm does not train on. A killed run repeats at most the arm it was in.
"""

import gc
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import yaml

from ..core.checkpoint import read_checkpoint
from ..core.errors import RecipeError
from ..core.progress import Bar, progress
from ..core.recipe import plain
from ..core.row_sources import is_file
from ..core.run_folder import RunFolder, write_atomic
from ..core.token_stats import ScoredSequence, score_tokens
from .relearning_curve import CURVES_FILE, ORIGINAL, RETRAINED, UNLEARNED, relearning_scores
from .suite_base import NO_MODEL, SCORES_FILE
from .unlearning_data import SPEC_HELP, Text, encode_answer, encode_text, messages_of, read_set, text_of
from .unlearning_measure import text_row
from .unlearning_metrics import probability

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METRICS = ("probability", "extraction_strength", "exact_memorisation")


@dataclass(kw_only=True)
class RelearningConfig:
    """Who attacks whom, with what."""

    output_dir: str = field(metadata={"help": "Folder of this run."})
    suite: str = field(metadata={"help": "relearning."})
    model: str | dict[str, str] = field(
        metadata={"help": "The unlearned model; or several, name -> model, which share original and control."}
    )
    original: str = field(metadata={"help": "The model before it unlearned: the upper end of recovery."})
    retrained: str = field(
        metadata={"help": "The control: a model that never saw the forget set. `none`: the curve has no control then."}
    )
    forget: str = field(metadata={"help": f"Forget set: question and answer, or text. {SPEC_HELP}"})
    benign: str | None = field(default=None, metadata={"help": "Other data to fine-tune on: a second attack."})
    columns: dict[str, str] = field(default_factory=dict, metadata={"help": "Our column name -> the file's."})
    samples: int | None = field(
        default=20, metadata={"help": "Rows that an arm trains on, drawn by its seed; null takes all."}
    )
    steps: list[int] = field(
        default_factory=lambda: [0, 1, 2, 5, 10, 20, 50, 100],
        metadata={"help": "Optimizer steps after which the model is measured; starts at 0."},
    )
    tuning: list[Literal["full", "lora"]] = field(
        default_factory=lambda: ["full"], metadata={"help": "full, lora, or both."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank, for lora, on all linear layers; alpha is twice that."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Constant, so that every point is a whole attack."})
    batch_size: int = field(default=4, metadata={"help": "Rows of one optimizer step."})
    max_length: int = field(default=1024, metadata={"help": "Longest row in tokens."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Draws of rows and their order."})
    metric: Literal["probability", "extraction_strength", "exact_memorisation"] = field(
        default="probability", metadata={"help": "What the scores are about; the file has all three."}
    )
    max_rows: int | None = field(default=None, metadata={"help": "First rows of each set: for smoke runs."})
    token_budget: int = field(default=4096, metadata={"help": "Most tokens of one forward pass, padding included."})

    def __post_init__(self):
        if self.steps[:1] != [0] or self.steps != sorted(set(self.steps)) or len(self.steps) < 2:
            raise RecipeError(f"steps is {self.steps}: use increasing whole numbers from 0, at least two")
        for key in ("batch_size", "lora_r", "max_length", "token_budget"):
            if getattr(self, key) < 1:
                raise RecipeError(f"{key} is {getattr(self, key)}: use at least 1")
        if taken := [name for name in self.unlearned if name in (ORIGINAL, RETRAINED) or "/" in name]:
            raise RecipeError(f"model: {taken[0]!r} cannot be the name of a model, choose another")
        if not self.unlearned:
            raise RecipeError("model is empty: name at least one")
        if self.samples is not None and self.samples < 1:
            raise RecipeError(f"samples is {self.samples}: use at least 1, or null for all rows")
        if not self.learning_rate > 0:
            raise RecipeError(f"learning_rate is {self.learning_rate}: use a positive number")
        for key, least in (("seeds", 2), ("tuning", 1)):
            values = getattr(self, key)
            if len(values) < least or len(set(values)) < len(values):
                raise RecipeError(f"{key} is {values}: name at least {least}, each once")

    @property
    def unlearned(self) -> dict[str, str]:
        """Name -> unlearned model."""
        return {UNLEARNED: self.model} if isinstance(self.model, str) else self.model


class Arm(NamedTuple):
    """One attack."""

    model: str
    data: str
    tuning: str
    seed: int

    @property
    def name(self) -> str:
        """What names it in the files."""
        return "/".join(map(str, self))

    @property
    def group(self) -> str:
        """Arms that differ in their seed only share this."""
        return "/".join(self[:3])


def run(config: RelearningConfig, overwrite: bool = False, dry_run: bool = False) -> Path:
    """Attack, or go on where a killed run stopped, and return the run's folder.

    Raises:
        RecipeError: `samples` is more than a set has.
        DataError: a row cannot be used.
        ModelError: a model cannot be read.
        RunFolderError: the folder belongs to another recipe, model or data.
    """
    return _Attack(config).run(overwrite, dry_run)


class _Attack:
    """One run."""

    def __init__(self, config: RelearningConfig):
        self.config, self.path = config, Path(config.output_dir)
        self.models = config.unlearned | ({} if config.retrained == NO_MODEL else {RETRAINED: config.retrained})
        data = ["forget", *(["benign"] if config.benign else [])]
        self.arms = [Arm(*parts) for parts in product(self.models, data, config.tuning, config.seeds)]
        sets = {"forget": config.forget, "benign": config.benign}
        self.inputs: dict[str, str | list[str]] = {
            name: spec for name, spec in {**sets, ORIGINAL: config.original, **self.models}.items() if spec
        }

    def run(self, overwrite: bool, dry_run: bool) -> Path:
        config = self.config
        if dry_run:
            if not overwrite:
                RunFolder.check(self.path, "eval", plain(config), inputs=self.inputs)
            print(yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
            print("\n".join(f"{arm.name}: {config.steps[-1]} steps of {config.batch_size} rows" for arm in self.arms))
            if all(is_file(spec) for spec in (config.forget, config.benign or config.forget)):
                print(", ".join(f"{len(rows):,} rows of {name}" for name, rows in self._read().items()))
            print("Nothing was written.")
            return self.path
        sets = self._read()
        tokenizer = read_checkpoint(config.original).tokenizer
        texts = [_encode(tokenizer, f"forget/{i}", row, config.max_length) for i, row in enumerate(sets["forget"])]
        extra = {"seeds": config.seeds, "suite": "relearning"}
        with RunFolder.open(
            self.path, "eval", plain(config), inputs=self.inputs, overwrite=overwrite, extra=extra
        ) as folder:
            if not folder.finished:
                rows = self._attack(folder, sets, texts, tokenizer)
                scores = {"relearning": relearning_scores(rows, config.steps, config.metric)}
                write_atomic(self.path / SCORES_FILE, json.dumps(scores, indent=1) + "\n")
                folder.finish(scores)
            show(folder.summary, self.path)
        return self.path

    def _read(self) -> dict[str, list[dict[str, Any]]]:
        config = self.config
        specs = {"forget": config.forget} | ({"benign": config.benign} if config.benign else {})
        sets = {}
        for name, spec in specs.items():
            is_text = "text" in read_set(spec, name, (), config.columns, 1)[0]
            sets[name] = read_set(
                spec, name, ("text",) if is_text else ("question", "answer"), config.columns, config.max_rows
            )
            if config.samples is not None and config.samples > len(sets[name]):
                raise RecipeError(f"samples is {config.samples}, but `{name}` has {len(sets[name])} rows")
        return sets

    def _attack(
        self, folder: RunFolder, sets: dict[str, list[dict[str, Any]]], texts: list[Text], tokenizer: Any
    ) -> list[dict[str, Any]]:
        config = self.config
        last = _keep_whole_arms(folder, config.steps[-1])
        log = folder.log(CURVES_FILE)
        with progress("relearn", (1 + len(self.arms)) * len(config.steps)) as bar:
            if ORIGINAL in last:
                bar.advance(len(config.steps))
            else:
                model = _load(config.original)
                log.append({"arm": ORIGINAL, "step": 0, **_measure(model, texts, [], config.token_budget)})
                bar.advance(len(config.steps))
            for arm in self.arms:
                if arm.name in last:
                    bar.advance(len(config.steps))
                    continue
                for row in self._arm(arm, sets[arm.data], texts, tokenizer, bar):
                    log.append({"arm": arm.name, **row})
        rows = list(log.rows())
        log.close()
        return rows

    def _arm(
        self, arm: Arm, rows: list[dict[str, Any]], texts: list[Text], tokenizer: Any, bar: Bar
    ) -> Iterator[dict[str, Any]]:
        """Fine-tune one model and yield what it knows after each of the steps."""
        config = self.config
        count = len(rows) if config.samples is None else config.samples
        drawn = sorted(np.random.default_rng(arm.seed).choice(len(rows), count, replace=False).tolist())
        trained = drawn if arm.data == "forget" else []
        found: list[dict[str, Any]] = []

        def measure(model: Any, step: int) -> None:
            if step in config.steps:
                found.append({"step": step, **_measure(model, texts, trained, config.token_budget)})
                bar.advance(note=f"{arm.name}, step {step}: {found[-1][config.metric]:.3f}")

        fine_tune(_load(self.models[arm.model]), tokenizer, [rows[i] for i in drawn], config, arm, measure)
        gc.collect()  # a trainer refers to itself: its model and optimizer would stay until the next collection
        yield from found


def _keep_whole_arms(folder: RunFolder, last_step: int) -> set[str]:
    """Leave only the rows of arms that came to their end, and name them: an interrupted one starts again."""
    log = folder.log(CURVES_FILE)
    rows = list(log.rows())
    log.close()
    whole = {row["arm"] for row in rows if row["step"] == last_step or row["arm"] == ORIGINAL}
    write_atomic(log.path, "".join(json.dumps(row) + "\n" for row in rows if row["arm"] in whole))
    return whole


def _encode(tokenizer: "PreTrainedTokenizerBase", key: str, row: dict[str, Any], max_length: int) -> Text:
    if "text" in row:
        return encode_text(tokenizer, key, row["text"], max_length)
    return encode_answer(tokenizer, key, row["question"], text_of(row["answer"]))


def _load(model: str) -> "PreTrainedModel":
    import torch
    from transformers import AutoModelForCausalLM

    # In fp32: the steps of a learning rate of 1e-5 vanish in bf16 weights. On a GPU the trainer computes in bf16.
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def _measure(model: Any, texts: Sequence[Text], trained: Sequence[int], token_budget: int) -> dict[str, Any]:
    """Mean of each metric over the forget set, and over the rows that are not trained on (`unseen_...`)."""
    import torch

    if torch.cuda.is_available():
        model = model.to("cuda")
    sequences = [ScoredSequence(i, text.input_ids, text.scored) for i, text in enumerate(texts)]
    rows: dict[int, dict[str, Any]] = {}
    for i, stats in score_tokens(model, sequences, token_budget=token_budget, entropy=True, compiled=False):
        made = text_row(texts[int(str(i))], stats)
        rows[int(str(i))] = made | {"probability": probability(made["nll"])}
    unseen = [i for i in rows if i not in set(trained)]
    means = {name: float(np.mean([row[name] for row in rows.values()])) for name in METRICS}
    if unseen and len(unseen) < len(rows):
        means |= {f"unseen_{name}": float(np.mean([rows[i][name] for i in unseen])) for name in METRICS}
    return means


def fine_tune(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[dict[str, Any]],
    config: RelearningConfig,
    arm: Arm,
    measure: Any,
) -> None:
    """Fine-tune with TRL's SFTTrainer at a constant learning rate; loss over the answers, or the whole texts.

    Args:
        model: changed in place.
        tokenizer: its own.
        rows: the arm's data.
        config: the recipe.
        arm: decides seed and tuning.
        measure: called with the model and the number of steps, before the first and after each.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            measure(kwargs["model"], state.global_step)

    examples = [
        {"text": row["text"]}
        if "text" in row
        else {
            "prompt": messages_of(row["question"]),
            "completion": [{"role": "assistant", "content": text_of(row["answer"])}],
        }
        for row in rows
    ]
    scratch = tempfile.mkdtemp(prefix="afterglow-relearn-")
    gpu = torch.cuda.is_available()
    settings = SFTConfig(
        output_dir=scratch, max_steps=config.steps[-1], per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
        max_length=config.max_length, seed=arm.seed, data_seed=arm.seed, bf16=gpu, use_cpu=not gpu,
        gradient_checkpointing=False, save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=gpu, completion_only_loss=None,
    )  # fmt: skip
    lora = LoraConfig(r=config.lora_r, lora_alpha=2 * config.lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
    try:
        trainer = SFTTrainer(
            model=model, args=settings, train_dataset=Dataset.from_list(examples), processing_class=tokenizer,
            peft_config=lora if arm.tuning == "lora" else None, callbacks=[Watch()],
        )  # fmt: skip
        measure(trainer.model, 0)
        trainer.train()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def show(scores: dict[str, Any], folder: Path) -> None:
    """Print every number, and say it where there was no control."""
    from rich.console import Console
    from rich.table import Table

    of = scores["relearning"]
    table = Table(title=f"relearning: {folder}", title_justify="left", caption="95% interval over seeds")
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("interval", justify="right")
    for name, found in of.items():
        if isinstance(found, str):
            table.add_row(name.replace("_", " "), found, "")
        elif isinstance(found, list):
            table.add_row(name.replace("_", " "), ", ".join("never" if v is None else f"{v:.1f}" for v in found), "")
        else:
            interval = f"[{found['low']:.3g}, {found['high']:.3g}]" if found["low"] < found["high"] else ""
            table.add_row(name.replace("_", " "), f"{found['value']:.4g}", interval)
    console = Console()
    console.print(table)
    if not any(name.startswith(RETRAINED) for name in of):
        console.print("No control: a model that never saw the forget set learns from fine-tuning too (`retrained`).")
