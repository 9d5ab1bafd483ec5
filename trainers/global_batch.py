"""What the global batch is made of: all processes, all accumulation steps, each row once."""

from typing import Any

from ..core.errors import ModelError, RecipeError


def check_spread(trainer: Any) -> None:
    """Refuse a setup in which the global batch, each sample once, is not known.

    Raises:
        RecipeError: the repeats of an epoch's last batch cannot be told, or samples are split over processes.
        ModelError: the model's loss cannot be scaled by the global batch.
    """
    loader = trainer.accelerator.dataloader_config
    if loader.split_batches or loader.dispatch_batches or not loader.even_batches:
        raise RecipeError(
            "`accelerator_config`: which rows of an epoch's last batch are repeats is known only with accelerate's "
            "own split_batches, dispatch_batches and even_batches; leave them out."
        )
    if not trainer.model_accepts_loss_kwargs:
        raise ModelError(f"{type(trainer.model).__name__}: takes no loss arguments, so its batch has no denominator.")
    parallelism = trainer.accelerator.parallelism_config
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        raise RecipeError("tensor, context or sequence parallelism splits samples over processes; use FSDP or ZeRO.")


def count_real_rows(trainer: Any) -> int:
    """Return how many rows of this process's current batch are no repeats: the first ones; else the batch size.

    accelerate gives all processes batches of the same size: it fills the last of an epoch with rows from the epoch's
    beginning. Over the processes in order, the real rows of that global batch come first.
    """
    size = trainer._train_batch_size
    real = len(trainer.train_dataset) % (size * trainer.accelerator.num_processes)
    last = trainer.accelerator.gradient_state.end_of_dataloader
    if not real or not last or trainer.args.dataloader_drop_last:
        return size
    return min(max(real - size * trainer.accelerator.process_index, 0), size)
