"""How fast a model reads tokens, and what share of the device's peak that is (model FLOPs utilisation)."""

import time
from collections.abc import Callable

import torch
from torch import nn

# Dense bf16 / fp16 operations per second, from the vendors' data sheets. The first name that fits counts.
_PEAKS = (
    ("B200", 2.25e15), ("H100 PCIE", 7.56e14), ("H100 NVL", 8.35e14), ("H100", 9.89e14), ("H200", 9.89e14),
    ("H20", 1.48e14), ("A100", 3.12e14), ("L40S", 3.62e14), ("L40", 1.81e14), ("L4", 1.21e14), ("MI300X", 1.307e15),
)  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return a device's dense 16-bit peak in operations per second, or None where it is not known."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """Return the dense 16-bit peak of a device by its vendor's name, or None."""
    words = name.upper().replace("-", " ")
    return next((peak for known, peak in _PEAKS if f" {known}" in f" {words}"), None)


def forward_flops(body: nn.Module, head: torch.Tensor) -> tuple[int, int]:
    """Return the operations that a token costs in a model's body, and a scored position in its head (2 per weight).

    Attention over the context is left out, as usual, and so is the look-up of embeddings.
    """
    embeddings = body.get_input_embeddings().weight  # pyright: ignore[reportCallIssue]
    return 2 * (sum(p.numel() for p in body.parameters()) - embeddings.numel()), 2 * head.numel()


class Throughput:
    """A live figure of tokens per second, and of the share of the peak where both sides of it are known.

    Args:
        flops: (operations per token read, operations per token scored), or None.
        peak: Of all devices that work together, in operations per second, or None.
        processes: How many work at the same pace as the one that is measured.
        clock: Seconds; for tests.
    """

    def __init__(
        self,
        flops: tuple[int, int] | None = None,
        peak: float | None = None,
        processes: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._flops, self._peak, self._processes, self._clock = flops, peak, processes, clock
        self._start, self._read, self._scored = clock(), 0, 0

    def add(self, read: int, scored: int) -> None:
        """Count tokens that this process read and scored."""
        self._read += read
        self._scored += scored

    def note(self) -> str:
        """Return the rate since the start, such as `12,345 tokens/s, MFU 41%`."""
        seconds = max(self._clock() - self._start, 1e-9)
        note = f"{self._processes * self._read / seconds:,.0f} tokens/s"
        if self._flops and self._peak:
            done = self._flops[0] * self._read + self._flops[1] * self._scored
            note += f", MFU {self._processes * done / seconds / self._peak:.0%}"
        return note
