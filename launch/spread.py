"""Whether a run may go on with its batch spread over other processes: only where the result stays the same."""

import os
from collections.abc import Mapping
from typing import Any

from ..core.errors import RunFolderError
from .training_recipe import Training

PLAIN = ("NO", "MULTI_CPU", "MULTI_GPU")  # accelerate's types whose checkpoints hold whole weights and optimizer


def describe_spread(training: Training) -> dict[str, Any]:
    """Return how this launch spreads its batch: what the manifest keeps of it."""
    args = training.args
    # Until the trainer stands, accelerate calls FSDP what it is built on; `check_processes` sees that it became one.
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    return {
        "world_size": args.world_size,
        "distributed_type": "FSDP" if sharded else str(training.state.distributed_type.value),
        "effective_batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "split": [args.per_device_train_batch_size, args.gradient_accumulation_steps],
    }


def check_spread(training: Training, before: Mapping[str, Any]) -> None:
    """Refuse to go on where another spread would give another result.

    The same rows make up the same global batches, and their order does not depend on the processes, so gradients are
    equal up to the rounding of their sums, if nothing draws at random in a process and checkpoints are whole.

    Args:
        training: this launch.
        before: what `describe_spread` returned when the run was last started.

    Raises:
        RunFolderError: every reason why not.
    """
    now = describe_spread(training)
    if before == now:
        return
    reasons = _reasons(training, before, now)
    if reasons:
        raise RunFolderError(
            f"{training.args.output_dir}: was started with {before['world_size']} process(es) "
            f"({before['distributed_type']}), this is {now['world_size']} ({now['distributed_type']}): "
            f"{'; '.join(reasons)}. Start it in the same way, choose another `output_dir`, or pass --overwrite to "
            "start again."
        )


def _reasons(training: Training, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    args, model = training.args, training.model
    reasons = []
    if before["effective_batch"] != now["effective_batch"]:
        reasons.append(
            f"the global batch would be {now['effective_batch']} instead of {before['effective_batch']} rows (set "
            "`gradient_accumulation_steps` or `per_device_train_batch_size` so that it stays the same)"
        )
    kinds = {before["distributed_type"], now["distributed_type"]}
    moved = before["world_size"] != now["world_size"] or len(kinds) > 1
    if moved and (sharded := kinds.difference(PLAIN)):
        reasons.append(f"checkpoints of {', '.join(sorted(sharded))} are not known to fit another number of processes")
    if not getattr(training.trainer, "any_spread", False):
        reasons.append(f"the batches of `method: {training.stage.method}` depend on how they are spread")
    if args.train_sampling_strategy != "random":
        reasons.append(f"`train_sampling_strategy: {args.train_sampling_strategy}` orders rows by batches of a process")
    if args.dataloader_drop_last:
        reasons.append("`dataloader_drop_last` drops other rows")
    noisy = [name for name in ("neftune_noise_alpha",) if getattr(args, name, None)]
    noisy += ["lora_dropout"] if model.use_peft and model.lora_dropout else []
    noisy += _dropouts(str(model.model_name_or_path), model.model_revision)
    if noisy:
        reasons.append(f"each process draws its own noise for {', '.join(noisy)}")
    return reasons


def _dropouts(model: str, revision: str | None) -> list[str]:
    """Name the dropouts of a model's configuration that are not 0."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, revision=revision).get_text_config().to_dict()
    return [name for name, value in config.items() if ("dropout" in name or name.endswith("pdrop")) and value]
