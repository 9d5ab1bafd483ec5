"""`afterglow train --dry_run`: what would be trained, on what, for how long and with how much memory.

Nothing is written and nothing is downloaded. The examples are tokenised and masked by TRL's own code.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..core.errors import ModelError
from ..core.recipe import plain
from ..core.run_folder import RunFolder
from ..trainers.checkpoints import last_complete_checkpoint
from .console import print_table
from .dry_run_rl import show_rollouts
from .memory import count_parameters, estimate, peak, shape_of
from .model_folder import check_model
from .processes import Setup
from .training_recipe import RL_COLUMNS, Training, load_further_tables, load_table

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

MEASURED_ROWS = 512  # rows that are tokenised to learn their lengths
EXAMPLES, EXAMPLE_CHARACTERS = 2, 1200


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rows that were measured."""

    rows: int
    mean: float  # after truncation
    trained: float  # of these, tokens that the loss sees
    longest: int
    cut: int  # rows longer than max_length


def show_plan(training: Training, setup: Setup, overwrite: bool = False) -> None:
    """Check everything and print the plan.

    Raises:
        DataError, ModelError, RunFolderError: what would stop the run.
    """
    console = Console(highlight=False)
    args = training.args
    table = load_table(training.data, training.columns)
    load_further_tables(training)
    if not overwrite:
        RunFolder.check(
            str(args.output_dir), "train", training.config, inputs=training.inputs, defaults=training.defaults
        )
    _show_recipe(console, training)
    tokenizer = _find_tokenizer(training)
    if training.columns == RL_COLUMNS:
        show_rollouts(console, table, args, setup, tokenizer)
        if checkpoint := None if overwrite else last_complete_checkpoint(str(args.output_dir)):
            console.print(f"The run would go on from {checkpoint}.")
        console.print("Nothing was written.")
        return
    if tokenizer is None:
        print_table("batches", batch_rows(len(table), args, setup, None))
        console.print(f"{training.model.model_name_or_path} is not on this machine: tokens and memory are unknown.")
        return
    first = table.select(range(min(len(table), MEASURED_ROWS)))
    examples = prepare(first, args, tokenizer)
    lengths = measure(first, examples, args, tokenizer)
    print_table("batches", batch_rows(len(table), args, setup, lengths))
    _show_memory(console, training, setup, lengths)
    _show_examples(console, examples, tokenizer)
    if checkpoint := None if overwrite else last_complete_checkpoint(str(args.output_dir)):
        console.print(f"The run would go on from {checkpoint}.")
    console.print("Nothing was written.")


def _find_tokenizer(training: Training) -> "PreTrainedTokenizerBase | None":
    """Return the tokenizer, or None for a model of the hub that is not on this machine."""
    model = str(training.model.model_name_or_path)
    try:
        given = bool(getattr(training.args, "chat_template_path", None))
        return check_model(model, revision=training.model.model_revision, template_given=given)
    except ModelError as error:
        if Path(model).exists() or not isinstance(error.__cause__, OSError):
            raise
        return None


def prepare(table: "Dataset", args: Any, tokenizer: "PreTrainedTokenizerBase") -> "Dataset":
    """Tokenise and mask rows as the trainer will: columns `input_ids` and `labels` (-100 where there is no loss)."""
    import datasets
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers
    from trl.trainer.sft_trainer import SFTTrainer

    template = None
    if args.assistant_only_loss and not has_generation_markers(tokenizer.chat_template):
        template = get_training_chat_template(tokenizer)
    trainer: Any = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=template, completion_only_loss=args.completion_only_loss is not False
    )
    was_shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        prepare: Any = SFTTrainer._prepare_dataset
        return prepare(trainer, table, tokenizer, args, False, None, "train")
    finally:
        if not was_shown:
            datasets.enable_progress_bars()


def measure(table: "Dataset", examples: "Dataset", args: Any, tokenizer: "PreTrainedTokenizerBase") -> Lengths:
    """Count the tokens of rows, as they are and as they are cut."""
    tokens = [len(ids) for ids in examples["input_ids"]]
    trained = [sum(label != -100 for label in labels[1:]) for labels in examples["labels"]]
    cut = 0
    if args.max_length is not None and (len(tokens) < len(table) or max(tokens) >= args.max_length):
        uncut = copy.copy(args)
        uncut.max_length = None
        cut = sum(len(ids) > args.max_length for ids in prepare(table, uncut, tokenizer)["input_ids"])
    count = max(len(tokens), 1)
    return Lengths(len(table), sum(tokens) / count, sum(trained) / count, max(tokens, default=0), cut)


def batch_rows(rows: int, args: Any, setup: Setup, lengths: Lengths | None) -> dict[str, Any]:
    """Work out batches, steps and tokens, as transformers will."""
    per_device, accumulation, processes = (
        args.per_device_train_batch_size, args.gradient_accumulation_steps, setup.processes,
    )  # fmt: skip
    effective = per_device * accumulation * processes
    sequences = rows
    if args.packing and lengths:
        sequences = math.ceil(rows * lengths.mean / args.max_length)
    steps_per_epoch = math.ceil(math.ceil(sequences / (per_device * processes)) / accumulation)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    facts = {
        "rows": rows,
        "processes": f"{processes} ({setup.name})",
        "effective batch": f"{per_device} per device x {accumulation} accumulation x {processes} = {effective}",
        "steps": f"{'about ' if args.packing else ''}{steps_per_epoch:,} per epoch, {steps:,} in all",
    }
    if lengths:
        epochs = steps / steps_per_epoch
        facts |= {
            "tokens per row": f"{lengths.mean:.0f} on average, {lengths.longest:,} at most",
            "trained tokens": f"{lengths.trained:.0f} per row",
            "cut at max_length": f"{lengths.cut / lengths.rows:.1%} of the rows"
            + ("" if lengths.rows == rows else f" (first {lengths.rows})"),
            "tokens in all": f"about {rows * lengths.mean * epochs:,.0f}",
        }
    return facts


def _show_recipe(console: Console, training: Training) -> None:
    """Show the keys that are set: a training has two hundred."""
    resolved = plain(training.config)
    lines = [f"{name}: {resolved[name]}" for name in training.given if name in resolved]
    title = "recipe, all other keys at their defaults"
    console.print(Panel(Text("\n".join(lines)), title=title, title_align="left"))


def _show_memory(console: Console, training: Training, setup: Setup, lengths: Lengths) -> None:
    from transformers import AutoConfig
    from trl.trainer.utils import get_peft_config

    args, model = training.args, training.model
    config = AutoConfig.from_pretrained(str(model.model_name_or_path), revision=model.model_revision)
    parameters, trained = count_parameters(config, get_peft_config(model))
    dtype = str(config.dtype or "float32").removeprefix("torch.") if model.dtype in (None, "auto") else model.dtype
    parts = estimate(
        parameters=parameters,
        trained=trained,
        dtype=dtype,
        optimizer=str(getattr(args.optim, "value", args.optim)),
        half_precision=bool(args.bf16 or args.fp16),
        checkpointing=args.gradient_checkpointing,
        shape=shape_of(config),
        tokens=args.per_device_train_batch_size * int(args.max_length or 0 if args.packing else lengths.longest),
        setup=setup,
        cpu=args.use_cpu and setup.kind in ("NO", "MULTI_CPU"),
    )
    most = peak(parts, args.gradient_accumulation_steps > 1)
    table = Table("part", "GB", "formula", title="memory on each device, estimated", title_justify="left")
    for part in parts:
        table.add_row(part.name, f"{part.bytes / 1e9:.2f}", part.formula)
    table.add_row("peak", f"{most / 1e9:.2f}", "what stands at once, without the allocator's waste")
    console.print(table)


def _show_examples(console: Console, examples: "Dataset", tokenizer: "PreTrainedTokenizerBase") -> None:
    for number in range(min(EXAMPLES, len(examples))):
        row: dict[str, Any] = examples[number]
        text = masked_text(row["input_ids"], row["labels"], tokenizer)
        title = f"{row.get('id', 'example')}: green is trained, the rest is context"
        console.print(Panel(text, title=title, title_align="left"))


def masked_text(ids: list[int], labels: list[int], tokenizer: "PreTrainedTokenizerBase") -> Text:
    """Decode a row; what the loss sees is green, the rest dim. Long stretches are cut in the middle."""
    text, start = Text(), 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and (labels[end] == -100) == (labels[start] == -100):
            continue
        part = str(tokenizer.decode(ids[start:end]))
        if len(part) > EXAMPLE_CHARACTERS:
            half = EXAMPLE_CHARACTERS // 2
            part = f"{part[:half]}\n[... {len(part) - 2 * half:,} characters ...]\n{part[-half:]}"
        text.append(part, style="dim" if labels[start] == -100 else "bold green")
        start = end
    return text
