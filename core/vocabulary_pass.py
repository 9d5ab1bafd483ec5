"""Statistics of given tokens under a language-model head, without ever holding the logits of a batch.

Everything that is asked of a token y with logit t follows from sums over the vocabulary that need no maximum:

    nll      = log S,                 S = sum_j exp(x_j - t)
    rank     = 1 + C,                 C = #{j : x_j > t}
    entropy  = log S - D / S,         D = sum_j exp(x_j - t) (x_j - t)
    variance = Q / S - (D / S)^2,     Q = sum_j exp(x_j - t) (x_j - t)^2    (of -log p, under p)
    largest  = exp(M) / S,            M = max_j (x_j - t)                   (probability)

S, C, D and Q simply add up over slices of the vocabulary, and M is the largest of theirs; so one slice of logits is
made, read once, and overwritten by the next. Two things can spoil such a row, and both are noticed: S overflows (a
token of probability below e^-88), or the logit t, needed before its own slice is reached, was rounded differently
there. Such rows, a few in a million, are done again with all their logits at once; so the rank is always exact with
respect to one set of logits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_CPU_SLICE, _GPU_SLICE = 1024, 16384
"""Vocabulary entries per slice: on a CPU the logits of some thousand positions then stay near a core's cache; on a GPU
many small kernels would cost more than they save."""

_FULL_ELEMENTS = 2**24
"""Most logits held at once when whole rows are needed."""


@dataclass(frozen=True)
class VocabularyHead:
    """The map from hidden states to logits: `softcap * tanh(scale * (h W^T + b) / softcap)`.

    Attributes:
        weight: (vocabulary, hidden).
        bias: (vocabulary,) or None.
        scale: Positive factor on the logits (Cohere's `logit_scale`, Granite's 1 / `logits_scaling`).
        softcap: Gemma's `final_logit_softcapping`, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits (n, vocabulary) of hidden states (n, hidden): for few rows only."""
        return _transform(torch.nn.functional.linear(hidden, self.weight, self.bias), self.scale, self.softcap)


def token_statistics(
    hidden: Tensor, targets: Tensor, head: VocabularyHead, *, entropy: bool = False, compiled: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return negative log-likelihood, rank, entropy, its variance and the largest probability of each hidden state.

    The sums over the vocabulary are accumulated in fp32 from logits of the head's own dtype.

    Args:
        hidden: (n, hidden), in the dtype and on the device of the head.
        targets: (n,) token ids.
        head: The language-model head.
        entropy: Also return the entropy of each predicted distribution, the variance of -log p under it, and its
            largest probability.
        compiled: Run the pass over the logits through `torch.compile`: one kernel that reads each logit once.

    Returns:
        nll (n,) fp32 in nats; rank (n,) int32, 1 + the number of strictly greater logits; entropy (n,) fp32 in nats,
        variance (n,) fp32 in squared nats and largest probability (n,) fp32, or None.
    """
    fold = _fold(head.scale, head.softcap, entropy, compiled)
    vocabulary = head.weight.shape[0]
    if vocabulary <= _slice(hidden.device):
        results = hidden.new_empty(5, len(hidden), dtype=torch.float32)
        doubtful = torch.arange(len(hidden), device=hidden.device)
    else:
        results, doubtful = _sliced(hidden, targets, head, fold)
    for rows in doubtful.split(max(1, _FULL_ELEMENTS // vocabulary)):
        results[:, rows] = _whole_rows(hidden[rows], targets[rows], head, fold)
    nll, higher, entropies, variances, largest = results
    rank = higher.to(torch.int32) + 1
    return (nll, rank, entropies, variances, largest) if entropy else (nll, rank, None, None, None)


def _sliced(hidden: Tensor, targets: Tensor, head: VocabularyHead, fold: Callable) -> tuple[Tensor, Tensor]:
    """Go through the vocabulary slice by slice; return what `_finish` does, and doubtful rows."""
    n, vocabulary, width = len(hidden), head.weight.shape[0], _slice(hidden.device)
    # Sorted by target, the rows whose own logit lies in a slice are neighbours.
    targets, order = targets.sort()
    hidden = hidden[order]
    starts = range(0, vocabulary, width)
    bounds = torch.searchsorted(targets, torch.tensor([*starts, vocabulary], device=targets.device)).tolist()
    slices = list(zip(starts, bounds, bounds[1:], strict=False))
    target_raw = _target_logits(hidden, targets, head, slices, width)
    seen = torch.empty_like(target_raw)
    sums = hidden.new_zeros(5, n, dtype=torch.float32)
    buffer = hidden.new_empty(n * width)
    for start, first, last in slices:
        raw = buffer[: n * min(width, vocabulary - start)].view(n, -1)
        _slice_logits(hidden, head, start, raw)
        _accumulate(sums, fold(raw, target_raw))
        if first < last:
            seen[first:last] = raw[first:last].gather(1, targets[first:last, None] - start)
    doubtful = (seen != target_raw).squeeze(1) | ~sums.isfinite().all(0)
    results = torch.empty_like(sums)
    results[:, order] = _finish(sums)
    return results, order[doubtful]


def _slice_logits(hidden: Tensor, head: VocabularyHead, start: int, out: Tensor) -> Tensor:
    """Write the raw logits of the vocabulary entries from `start` on into `out` (n, v)."""
    weight = head.weight[start : start + out.shape[1]]
    if head.bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(head.bias[start : start + out.shape[1]], hidden, weight.t(), out=out)


def _target_logits(
    hidden: Tensor, targets: Tensor, head: VocabularyHead, slices: list[tuple[int, int, int]], width: int
) -> Tensor:
    """Return the raw logits (n, 1) of targets in ascending order, nearly always bit for bit those of their slices."""
    if hidden.dtype != torch.float32:  # rounding to 16 bits hides the order of summation
        logits = (hidden.float() * head.weight[targets].float()).sum(-1, keepdim=True)
        if head.bias is not None:
            logits += head.bias[targets, None].float()
        return logits.to(hidden.dtype)
    # In fp32 only a product of the same shape sums in the same order; of each slice, its own rows are few.
    logits = hidden.new_empty(len(hidden), 1)
    for start, first, last in slices:
        if first < last:
            out = hidden.new_empty(last - first, min(width, len(head.weight) - start))
            raw = _slice_logits(hidden[first:last], head, start, out)
            logits[first:last] = raw.gather(1, targets[first:last, None] - start)
    return logits


def _whole_rows(hidden: Tensor, targets: Tensor, head: VocabularyHead, fold: Callable) -> Tensor:
    """Return (5, n) nll, count, entropy, variance, largest from all logits of the rows at once."""
    raw = torch.nn.functional.linear(hidden, head.weight, head.bias)
    target_raw = raw.gather(1, targets[:, None])
    sums = torch.zeros(5, len(raw), device=raw.device)
    _accumulate(sums, fold(raw, target_raw))
    results = _finish(sums)
    overflow = (~sums.isfinite().all(0)).nonzero().squeeze(1)
    if len(overflow):
        log_p = _transform(raw[overflow], head.scale, head.softcap).log_softmax(-1)
        results[0, overflow] = -log_p.gather(1, targets[overflow, None]).squeeze(1)
        p = log_p.exp()
        results[2, overflow] = -torch.xlogy(p, p).sum(-1)
        # Where p is 0 its term is 0, whatever log p is.
        squares = torch.where(p > 0, p * log_p.square(), 0).sum(-1)
        results[3, overflow] = (squares - results[2, overflow].square()).clamp(min=0)
        results[4, overflow] = p.amax(-1)
    return results


def _slice(device: torch.device) -> int:
    return _CPU_SLICE if device.type == "cpu" else _GPU_SLICE


def _accumulate(sums: Tensor, parts: tuple[Tensor, ...]) -> None:
    """Take the sums of a slice into (5, n) S, C, D, Q, M; M starts at 0, the target's own difference."""
    for total, part in zip(sums[:4], parts[:4], strict=False):
        total += part
    if len(parts) > 4:
        torch.maximum(sums[4], parts[4], out=sums[4])


def _finish(sums: Tensor) -> Tensor:
    """Turn (5, n) S, C, D, Q, M into nll, count, entropy, variance and largest probability."""
    exp_sum, higher, first, second, most = sums
    nll, mean = exp_sum.log(), first / exp_sum
    variance = second / exp_sum - mean.square()
    largest = (most - nll).exp().clamp(max=1)
    return torch.stack([nll, higher, (nll - mean).clamp(min=0), variance.clamp(min=0), largest])


@lru_cache
def _fold(scale: float, softcap: float | None, entropy: bool, compiled: bool) -> Callable:
    """Return the pass over raw logits (n, v) with targets' raw logits (n, 1): the sums S, C and, on demand, D, Q, M."""

    def fold(raw: Tensor, target_raw: Tensor) -> tuple[Tensor, ...]:
        # Scale and softcap are increasing, so the raw logits rank as the transformed ones; comparing the raw ones
        # keeps a last-bit difference between two tanh kernels from ranking a token above itself. Counts are far below
        # 2^24, where fp32 stops being exact.
        higher = (raw.float() > target_raw.float()).float().sum(1)
        difference = _transform(raw, scale, softcap) - _transform(target_raw, scale, softcap)
        exp = difference.exp()
        if not entropy:
            return exp.sum(1), higher
        moment = exp * difference
        return exp.sum(1), higher, moment.sum(1), (moment * difference).sum(1), difference.amax(1)

    return torch.compile(fold, dynamic=True) if compiled else fold


def _transform(raw: Tensor, scale: float, softcap: float | None) -> Tensor:
    logits = raw.float()
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
