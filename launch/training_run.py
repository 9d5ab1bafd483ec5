"""One training, from the opened run folder to the saved model, safe against a kill at any moment."""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..core.errors import AfterglowError, ModelError, RecipeError, RunFolderError
from ..core.fast_forward import keep_freed_memory
from ..core.progress import progress
from ..core.run_folder import JsonlLog, RunFolder, write_atomic
from ..core.trajectory import content_hash
from ..trainers.checkpoints import (
    MarkComplete,
    call_the_cpu_by_its_name,
    checkpoint_folder,
    last_complete_checkpoint,
)
from .console import print_table
from .full_disk import says_when_the_disk_is_full
from .model_card import write_card
from .spread import check_spread, describe_spread
from .training_recipe import (
    Training,
    check_processes,
    check_the_model,
    load_further_tables,
    load_table,
    refuse_ignored_weights,
)

METRICS_FILE = "metrics.jsonl"


class LogMetrics(TrainerCallback):
    """Appends each log to metrics.jsonl and shows progress. A resumed run drops the rows that it will write again."""

    def __init__(self, folder: Path):
        self.path = folder / METRICS_FILE
        self._showing = ExitStack()

    def on_train_begin(self, args, state, control, **kwargs):
        """Keep the rows up to the step that training goes on from."""
        log = JsonlLog(self.path)
        kept = [row for row in log.rows() if row["step"] <= state.global_step]
        log.close()
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._tokens_before = kept[-1].get("num_tokens", 0) if kept else 0
        self._log = JsonlLog(self.path)
        self._showing.callback(self._log.close)
        transformers.logging.disable_progress_bar()  # "Writing model shards", across our bar, at every checkpoint
        self._bar = self._showing.enter_context(progress("train", state.max_steps))
        self._bar.advance(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        """Move the bar."""
        self._bar.advance()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Append one row; the totals that end a training stand in the manifest."""
        if logs and "train_runtime" not in logs:
            row = {"step": state.global_step, **logs}
            if "num_tokens" in row:  # TRL counts from the resume on
                row["num_tokens"] += self._tokens_before
            self._log.append(row)
            self._bar.advance(0, f"loss {logs['loss']:.4g}" if "loss" in logs else "")

    def close(self) -> None:
        """Close the bar (an open one would leave the terminal without a cursor) and the file."""
        self._showing.close()


class Checkpoints(TrainerCallback):
    """Makes a resumed run leave what an undisturbed one leaves. It must stand after `MarkComplete`.

    Each checkpoint is also a log: the means of the next log begin at it, whether the run was resumed there or not. And
    old checkpoints are deleted once the new one is marked as whole; transformers deletes them before, so that a kill in
    between would leave none.
    """

    def __init__(self, limit: int | None):
        self.limit = limit

    def on_step_end(self, args, state, control, **kwargs):
        """Log where a checkpoint follows."""
        control.should_log |= control.should_save

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, **kwargs):
        """Delete what exceeds the limit."""
        if args.should_save:
            rotate_checkpoints(str(args.output_dir), self.limit, state.best_model_checkpoint)


class Cards(TrainerCallback):
    """Writes our model card wherever the trainer would write its own, and into each checkpoint."""

    def __init__(self, trainer: Any, training: Training, manifest: dict[str, Any]):
        self.write = partial(write_card, training=training, manifest=manifest)
        folder = Path(trainer.args.output_dir)
        trainer.create_model_card = lambda **_: self.write(folder, facts=self.facts(trainer.state))

    @staticmethod
    def facts(state: Any) -> dict[str, Any]:
        """Return what is known of a training in its middle."""
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        return {"steps": f"{state.global_step:,} of {state.max_steps:,}", "loss": losses[-1] if losses else None}

    def on_save(self, args, state, control, **kwargs):
        """Write the card of the checkpoint that was just written."""
        self.write(checkpoint_folder(args, state), facts=self.facts(state))


def run_training(training: Training, overwrite: bool = False) -> Path:
    """Train, or go on, or report a run that is finished. Every process calls it.

    Raises:
        AfterglowError: as `train.run`.
    """
    folder = Path(str(training.args.output_dir))
    done = not overwrite and _says_finished(folder)
    table = None if done else load_table(training.data, training.columns)
    if table is not None:
        refuse_ignored_weights(training, table)
    template = None if done else check_the_model(training).chat_template
    with ExitStack() as stack:
        opened: list[RunFolder] = []  # by the first process only

        def open_run() -> tuple[bool, Path | None]:
            rows = 0 if table is None else len(table)
            opened.append(stack.enter_context(_open(training, template, rows, overwrite)))
            return opened[0].finished, last_complete_checkpoint(folder)

        finished, checkpoint = from_first_process(training.state, open_run)
        run = opened[0] if opened else None
        if finished and run:
            print_table(f"{folder}: finished before", run.summary)
        if not finished:
            if table is None:  # it was finished when we looked, and was replaced before it was opened
                raise RunFolderError(f"{folder}: changed while it was opened. Start again.")
            _train(training, table, folder, run, checkpoint)
    return folder


def _train(training: Training, table: Any, folder: Path, run: RunFolder | None, checkpoint: Path | None) -> None:
    """Train and save the model. `run` is the first process's."""
    if run:
        _delete_broken_checkpoints(folder)
    if training.args.device.type == "cpu":
        keep_freed_memory()
        call_the_cpu_by_its_name(training.args)
    metrics = LogMetrics(folder)
    trainer = _make_trainer(training, table, [metrics] if run else [])
    if run:
        trainer.add_callback(Cards(trainer, training, run.manifest))
    check_processes(training, str(trainer.accelerator.distributed_type.value))
    with says_when_the_disk_is_full(folder):
        try:
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            metrics.close()
        _save_model(trainer, training, folder)
    if run:
        summary = _summary(trainer, result.metrics, len(table))
        write_card(folder, training, run.manifest, summary)
        run.finish(summary)
        print_table(f"train: {folder}", summary)
    if training.args.world_size > 1:
        trainer.accelerator.end_training()


def from_first_process(state: Any, action: Callable[[], Any]) -> Any:
    """Do something in the first process only, and give every process its result, or its error."""
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = action()
        except AfterglowError as error:
            outcome[1] = error
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _says_finished(folder: Path) -> bool:
    manifest = folder / "manifest.json"
    return manifest.is_file() and json.loads(manifest.read_text(encoding="utf-8")).get("finished") is not None


def _open(training: Training, template: Any, rows: int, overwrite: bool) -> RunFolder:
    args, state = training.args, training.state
    spread = describe_spread(training)
    facts = {
        **spread,
        "backend": state.backend,
        "device": str(args.device.type),
        "seeds": {"seed": args.seed, "data_seed": args.data_seed},
        "chat_template": content_hash(template),
        "rows": rows,
    }
    run = RunFolder.open(
        str(args.output_dir), "train", training.config, inputs=training.inputs, overwrite=overwrite, extra=facts,
        defaults=training.defaults,
    )  # fmt: skip
    try:
        check_spread(training, {name: run.manifest.get(name) for name in spread})
    except RunFolderError:
        run.close()
        raise
    run.record(**spread)
    return run


def _delete_broken_checkpoints(folder: Path) -> None:
    """A kill while a checkpoint is written leaves half of one; training will come past that step again."""
    whole = {marker.parent for marker in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/complete")}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path not in whole:
            shutil.rmtree(path)


def _make_trainer(training: Training, table: Any, callbacks: list[TrainerCallback]) -> Any:
    """Load the model and build the trainer. The arguments exist already, as DeepSpeed ZeRO-3 needs it."""
    from trl.trainer.utils import get_peft_config, get_quantization_config

    model, args = training.model, training.args
    given = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **given,
    }
    limit, args.save_total_limit = args.save_total_limit, None  # ours to keep: `Checkpoints`
    try:
        trainer = training.trainer(
            model=str(model.model_name_or_path),
            args=args,
            train_dataset=table,
            **load_further_tables(training),
            callbacks=callbacks,
            peft_config=get_peft_config(model),
            quantization_config=get_quantization_config(model),
        )
    except OSError as error:
        raise ModelError(f"{model.model_name_or_path}: the trainer cannot be built: {error}") from error
    except (ValueError, ImportError) as error:
        if isinstance(error, AfterglowError):
            raise
        raise RecipeError(f"{type(error).__name__} of the trainer: {error}") from error
    for theirs in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(theirs)
    if not any(isinstance(callback, MarkComplete) for callback in trainer.callback_handler.callbacks):
        trainer.add_callback(MarkComplete())
    trainer.add_callback(Checkpoints(limit))
    return trainer


def _save_model(trainer: Any, training: Training, folder: Path) -> None:
    """Write weights, configuration, tokenizer and chat template to the run folder. Every process calls it."""
    if not training.model.use_peft:
        trainer.save_model(str(folder))
        return
    adapter = folder / "adapter"
    trainer.save_model(str(adapter))
    if trainer.args.should_save:
        # Merged from the files, so that it is the same however the training was spread. ZeRO-3 would split what is
        # loaded here, and wait for the other processes.
        from peft import AutoPeftModelForCausalLM
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
        merged: Any = AutoPeftModelForCausalLM.from_pretrained(str(adapter), dtype=training.model.dtype)
        merged.merge_and_unload().save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)


def _summary(trainer: Any, metrics: dict[str, float], rows: int) -> dict[str, Any]:
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    selected = trainer.state.best_model_checkpoint  # by held-out problems; the model is that one's
    return {
        "rows": rows,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "loss": losses[-1]["loss"] if losses else None,
        **({"selected": Path(selected).name} if selected else {}),
        "processes": trainer.args.world_size,
        "seconds": round(metrics["train_runtime"], 1),  # of this start; an interrupted run took longer
    }
