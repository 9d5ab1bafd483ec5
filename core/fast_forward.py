"""What makes a long series of passes through a model faster without changing what they compute."""

import ctypes
import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def can_compile(device: torch.device) -> bool:
    """Say whether `torch.compile` has what it needs here: Triton for a GPU, a C++ compiler for the CPU."""
    if device.type == "cpu":
        return any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "g++"), "g++", "clang++"))
    return importlib.util.find_spec("triton") is not None


@contextmanager
def compiled_layers(model: nn.Module) -> Iterator[None]:
    """Run the repeated layers of a Hugging Face model through `torch.compile` while the context is open.

    One layer is compiled and serves for all, which takes seconds where the whole model takes minutes; its elementwise
    operations are fused. The model itself is not changed.
    """
    names = getattr(model, "_no_split_modules", None) or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    before = [layer.forward for layer in layers]
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            layer.forward = forward


def keep_freed_memory() -> None:
    """Let the C library keep up to 1 GiB of freed memory instead of handing it back to the system after every layer.

    On the CPU every activation of a few MB is otherwise mapped afresh, and clearing its pages takes a quarter of a
    small model's forward pass, and 40% of a training step with a vocabulary of 151,936. It holds for the rest of the
    process; other C libraries than glibc are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**30)
