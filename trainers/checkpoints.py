"""Which checkpoints are whole. A kill while one is written leaves a folder that looks like a checkpoint and is none."""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..core.errors import RunFolderError

COMPLETE = "complete"


def checkpoint_folder(args, state) -> Path:
    """Return the folder of the checkpoint at this step."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


class MarkComplete(TrainerCallback):
    """Puts an empty file `complete` into each checkpoint once every process has written its part. Add it last."""

    def on_save(self, args, state, control, **kwargs):
        """Mark the checkpoint that was just written."""
        PartialState().wait_for_everyone()
        if args.should_save:
            (checkpoint_folder(args, state) / COMPLETE).touch()


def call_the_cpu_by_its_name(args: TrainingArguments) -> None:
    """Let checkpoints be loaded under DDP on a CPU. Call it before the trainer is built.

    accelerate calls the device of such a process `cpu:0`; transformers hands that to `torch.load` for the state of the
    optimizer, and torch knows only `cpu`.
    """
    if args.device.type == "cpu":
        state: Any = args.distributed_state
        state.device = args.__dict__["_setup_devices"] = torch.device("cpu")


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest whole checkpoint below `output_dir`, or None."""
    whole = [marker.parent for marker in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    return max(whole, key=lambda folder: int(folder.name.rsplit("-", 1)[1]), default=None)


def checkpoint_to_resume(resume_from_checkpoint: str | Path | bool | None, output_dir: str | Path) -> Path | None:
    """Return the folder that `resume_from_checkpoint` means: True is the last whole one, None starts anew.

    Raises:
        RunFolderError: it is True, and `output_dir` holds no whole checkpoint.
    """
    if resume_from_checkpoint is not True:
        return Path(resume_from_checkpoint) if resume_from_checkpoint else None
    found = last_complete_checkpoint(output_dir)
    if found is None:
        raise RunFolderError(f"{output_dir}: no whole checkpoint here. Train from the start.")
    return found
