"""Quantisation as an attack (2410.16454): rounding weights can bring back what small weight changes had hidden.

Round-to-nearest of every linear layer's weight, symmetric, one scale per output channel; embeddings and the
language-model head stay as they are, as common quantisers leave them. It is ours, made to run everywhere and to be
read: not the NF4 of bitsandbytes nor torchao's kernels. The weights are stored as floats again: any engine takes them.
"""

import shutil
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from ..core.engine_transformers import TransformersEngine
from ..core.errors import ModelError
from ..core.generation import EngineConfig

LEVELS = {"int8": 127, "int4": 7}  # largest integer; as many below zero
FOLDER = "quantised"


def round_to_nearest(weight: Tensor, largest: int) -> Tensor:
    """Return scale * round(weight / scale) with scale = max |weight| of the row / largest.

    Args:
        weight: (outputs, inputs).
        largest: largest integer of the grid.

    Returns:
        (outputs, inputs) in the weight's dtype; no entry moves by more than half a scale.
    """
    rows = weight.float()
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / largest
    return (scale * (rows / scale).round()).to(weight.dtype)


@torch.no_grad()
def quantise_model(model: nn.Module, kind: Literal["int8", "int4"]) -> int:
    """Round the weights of a causal language model in place and return how many layers were rounded.

    Raises:
        ModelError: it has no linear layer.
    """
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    if not layers:
        raise ModelError(f"{type(model).__name__} has no linear layer to quantise")
    for layer in layers:
        layer.weight.copy_(round_to_nearest(layer.weight, LEVELS[kind]))
    return len(layers)


def quantised_copy(config: EngineConfig, folder: Path, kind: Literal["int8", "int4"]) -> Path:
    """Write a rounded copy of a checkpoint below a run folder, once, and return its path.

    Args:
        config: of the checkpoint, with `engine: transformers`.
        folder: the run folder.
        kind: grid of integers.
    """
    target = folder / FOLDER
    if target.exists():
        return target
    partial = folder / f".{FOLDER}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    engine = TransformersEngine(config)
    try:
        quantise_model(engine.model, kind)
        engine.model.save_pretrained(partial)
        engine.tokenizer.save_pretrained(partial)
        GenerationConfig(eos_token_id=sorted(engine.stop_ids)).save_pretrained(partial)
    finally:
        engine.close()
    partial.rename(target)
    return target
