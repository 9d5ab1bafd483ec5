"""Quantisation as an attack (2410.16454): rounding weights can bring back what small weight changes had hidden.

Every linear layer's weight is rounded; embeddings and the language-model head stay as they are, as common quantisers
leave them. `int8` and `int4` are round-to-nearest, symmetric, one scale per output channel; `nf4` has QLoRA's sixteen
levels (2305.14314, appendix E), one scale per 64 weights, without its double quantisation: bitsandbytes' default. Made
here to run everywhere and to be read; the weights are stored as floats again, so that any engine takes them.
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
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64  # weights, in the order in which they lie in memory, that share a scale in nf4
FOLDER = "quantised"
Kind = Literal["int8", "int4", "nf4"]


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


def round_to_nf4(weight: Tensor) -> Tensor:
    """Return scale * the nearest of the sixteen levels to weight / scale with scale = max |weight| of the block.

    Args:
        weight: any shape; the last block may be short.

    Returns:
        the same shape, in the weight's dtype.
    """
    flat = weight.float().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
    levels = torch.tensor(NF4, device=weight.device)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)
    nearest = torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2)
    return (scale * levels[nearest]).reshape(-1)[: len(flat)].reshape(weight.shape).to(weight.dtype)


@torch.no_grad()
def quantise_model(model: nn.Module, kind: Kind) -> int:
    """Round the weights of a causal language model in place and return how many layers were rounded.

    Raises:
        ModelError: it has no linear layer.
    """
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    if not layers:
        raise ModelError(f"{type(model).__name__} has no linear layer to quantise")
    for layer in layers:
        weight = layer.weight
        weight.copy_(round_to_nf4(weight) if kind == "nf4" else round_to_nearest(weight, LEVELS[kind]))
    return len(layers)


def quantised_copy(config: EngineConfig, folder: Path, kind: Kind) -> Path:
    """Write a rounded copy of a checkpoint below a run folder, once, and return its path.

    Args:
        config: of the checkpoint, with `engine: transformers`.
        folder: the run folder.
        kind: which levels.
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
