"""Negative log-likelihood, exact rank and entropy of given tokens under a causal language model.

Only the tokens asked for go through the language-model head, and their logits exist one slice of the vocabulary at a
time (`vocabulary_pass`); sequences are sorted by length and batched under a token budget; nothing after a sequence's
last scored token is computed.
"""

from collections.abc import Container, Hashable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from .errors import DataError, ModelError
from .fast_forward import can_compile, compiled_layers, keep_freed_memory
from .vocabulary_pass import VocabularyHead, token_statistics

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_COMPILE_PASS_FROM = 4e9
"""Logits above which, on a CPU, compiling the pass over them (some seconds) pays."""

_COMPILE_LAYERS_FROM = 5e13
"""Floating-point operations above which, on a CPU, compiling the layers (a quarter of a minute) pays."""


@dataclass(frozen=True)
class ScoredSequence:
    """A token sequence and which of its tokens are asked for.

    Attributes:
        key: Whatever names the sequence to the caller; returned with its statistics.
        input_ids: (length,) token ids.
        scored: (length,) booleans; position 0 has no context and must be False.
    """

    key: Hashable
    input_ids: Sequence[int] | np.ndarray
    scored: Sequence[bool] | np.ndarray

    def __post_init__(self) -> None:
        if len(self.input_ids) != len(self.scored):
            raise DataError(
                f"sequence {self.key!r}: {len(self.input_ids)} token ids but {len(self.scored)} entries in `scored`"
            )
        if len(self.scored) and self.scored[0]:
            raise DataError(f"sequence {self.key!r}: its first token has no context, so it cannot be scored")


@dataclass(frozen=True)
class TokenStats:
    """Statistics of the scored tokens of one sequence, in order, on the CPU.

    Attributes:
        nll: (n,) fp32, -log p(token | context) in nats.
        rank: (n,) int32, 1 + the number of vocabulary entries with strictly greater logits.
        entropy: (n,) fp32, entropy of the predicted distribution in nats, or None when not asked for.
        varentropy: (n,) fp32, variance of -log p under the predicted distribution in squared nats, with `entropy`.
        confidence: (n,) fp32, the largest probability of the predicted distribution, with `entropy`.
    """

    nll: Tensor
    rank: Tensor
    entropy: Tensor | None = None
    varentropy: Tensor | None = None
    confidence: Tensor | None = None

    def top_k_hits(self, k: int) -> Tensor:
        """Return (n,) booleans: is the token among the k most likely? Ties count in its favour."""
        return self.rank <= k


def score_tokens(
    model: "PreTrainedModel | PeftModel",
    sequences: Sequence[ScoredSequence],
    *,
    token_budget: int = 4096,
    chunk: int = 4096,
    entropy: bool = False,
    compiled: bool | None = None,
    done: Container[Hashable] = (),
) -> Iterator[tuple[Hashable, TokenStats]]:
    """Score the marked tokens of every sequence, longest sequences first.

    A result depends on the sequence and the batch it is in, and batches are planned over all `sequences`: a resumed
    call, given what is `done`, repeats exactly the batches that were not finished.

    Args:
        model: Any Hugging Face causal language model, with or without PEFT adapters.
        sequences: What to score. A sequence without scored tokens yields empty statistics.
        token_budget: Most tokens, padding included, of one forward pass; a longer sequence goes alone.
        chunk: Most positions that go through the language-model head together.
        entropy: Also compute the entropy of each predicted distribution, the variance of -log p under it, and its
            largest probability.
        compiled: Run the model's layers and the pass over the logits through `torch.compile`; None decides by the
            amount of work.
        done: Keys that need no scoring; batches made only of these are skipped.

    Yields:
        (key, statistics) of each sequence, batch by batch; a sequence of `done` again if its batch is run.

    Raises:
        ModelError: The model has no head that this module can stand in for, or its logits are NaN.
    """
    with TokenScorer(model, token_budget=token_budget, chunk=chunk, entropy=entropy, compiled=compiled) as scorer:
        for key, stats in scorer.score(sequences, done):
            if stats.nll.isnan().any():
                raise ModelError(
                    f"sequence {key!r}: the model's logits are NaN in {model.dtype}; check its weights, or load it in "
                    "another dtype"
                )
            yield key, stats


class TokenScorer:
    """`score_tokens` for block after block of sequences, of which only one is held at a time.

    Args:
        model: As in `score_tokens`, as are the other arguments that are not named here.
        expected_tokens: About how many tokens all blocks hold, for the decision whether compiling pays.

    Raises:
        ModelError: The model has no head that this module can stand in for, or NaN logits whatever it reads.
    """

    def __init__(
        self,
        model: "PreTrainedModel | PeftModel",
        *,
        token_budget: int = 4096,
        chunk: int = 4096,
        entropy: bool = False,
        compiled: bool | None = None,
        expected_tokens: int = 0,
    ):
        self._model = model
        self._body, self._head = body_and_head(model)
        self._token_budget, self._chunk, self._entropy = token_budget, chunk, entropy
        self._compiled, self._expected_tokens = compiled, expected_tokens
        self._compile_pass: bool | None = None  # decided with the first block
        self._stack = ExitStack()

    def __enter__(self) -> "TokenScorer":
        if self._head.weight.device.type == "cpu":
            keep_freed_memory()
        self._stack.callback(self._model.train, self._model.training)
        self._model.eval()
        return self

    def __exit__(self, *exc_info) -> None:
        self._stack.close()

    @torch.no_grad()
    def score(
        self, sequences: Sequence[ScoredSequence], done: Container[Hashable] = ()
    ) -> Iterator[tuple[Hashable, TokenStats]]:
        """Score a block: batches are planned within it, so that a result does not depend on other blocks.

        Yields:
            (key, statistics); those of a sequence whose logits are NaN are NaN.
        """
        positions = [np.flatnonzero(np.asarray(sequence.scored)) for sequence in sequences]
        fed = [int(p[-1]) if len(p) else 0 for p in positions]
        if self._compile_pass is None:
            self._prepare(sum(fed), sum(map(len, positions)))
        for batch in plan_batches(fed, self._token_budget):
            if all(sequences[i].key in done for i in batch):
                continue
            device = self._head.weight.device
            hidden, targets = _scored_hidden(self._body, [(sequences[i].input_ids, positions[i]) for i in batch])
            parts = [
                token_statistics(h, t, self._head, entropy=self._entropy, compiled=bool(self._compile_pass))
                for h, t in zip(
                    hidden.to(device).split(self._chunk), targets.to(device).split(self._chunk), strict=True
                )
            ]
            for i, stats in zip(batch, _per_sequence(parts, [len(positions[i]) for i in batch]), strict=True):
                yield sequences[i].key, stats

    def _prepare(self, fed: int, scored: int) -> None:
        more = max(1.0, self._expected_tokens / max(fed, 1))
        layers, self._compile_pass = _worth_compiling(self._body, self._head, more * fed, more * scored, self._compiled)
        if layers:
            self._stack.enter_context(compiled_layers(self._body))
        _check_head(self._model, self._body, self._head)


def _worth_compiling(
    body: nn.Module, head: VocabularyHead, fed: float, scored: float, asked: bool | None
) -> tuple[bool, bool]:
    """Decide whether to compile the layers and the pass over the logits, by the work that they have to do."""
    if asked is not None:
        return asked, asked
    device = head.weight.device
    if not can_compile(device):
        return False, False
    faster = 1 if device.type == "cpu" else 200
    embeddings = body.get_input_embeddings().weight  # pyright: ignore[reportCallIssue]
    parameters = sum(parameter.numel() for parameter in body.parameters()) - embeddings.numel()
    layers = 2 * parameters * fed >= faster * _COMPILE_LAYERS_FROM
    return layers, scored * len(head.weight) >= faster * _COMPILE_PASS_FROM


def plan_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Group indices of sequences, longest first, so that padded batches hold at most `token_budget` tokens.

    Args:
        lengths: Tokens that each sequence feeds to the model.
        token_budget: Most tokens of a batch, padding included; a longer sequence is a batch of its own.
    """
    batches: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * longest <= token_budget:
            batches[-1].append(i)
        else:
            batches.append([i])
            longest = lengths[i]
    return batches


def body_and_head(model: "PreTrainedModel | PeftModel") -> tuple[nn.Module, VocabularyHead]:
    """Return the part of a causal model that makes hidden states and the part that makes logits of them.

    Raises:
        ModelError: The model has no language-model head, or an adapter sits on it.
    """
    causal = cast("PreTrainedModel", getattr(model, "get_base_model", lambda: model)())
    linear = causal.get_output_embeddings()
    if linear is None or causal.config.is_encoder_decoder:
        raise ModelError(f"{type(causal).__name__} is not a causal language model with an output head")
    if hasattr(linear, "base_layer"):
        raise ModelError(
            f"an adapter sits on the language-model head of {type(causal).__name__}; call merge_and_unload() first"
        )
    config = causal.config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    if scale is None:
        scale = 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return causal.base_model, VocabularyHead(linear.weight, getattr(linear, "bias", None), scale, softcap)


def _check_head(model: "PreTrainedModel | PeftModel", body: nn.Module, head: VocabularyHead) -> None:
    """Compare the model's own logits of six tokens with what `score_tokens` relies on.

    One comparison covers scaled logits, adapters outside the body, and models in which padding on the right changes
    earlier positions.
    """
    ids = torch.arange(10, device=_input_device(body))[None] * 7 % len(head.weight)
    expected = model(input_ids=ids[:, :6], use_cache=False).logits[0].float()
    if expected.isnan().any():
        raise ModelError(
            f"the logits of {type(model).__name__} are NaN in {model.dtype}; check its weights, or load it in another "
            "dtype"
        )
    hidden = body(input_ids=ids, use_cache=False).last_hidden_state[0, :6].to(head.weight.device)
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 0.05
    same = hidden.dtype == head.weight.dtype and len(expected) == len(hidden)
    if not same or (head.logits(hidden).to(expected) - expected).abs().max() > tolerance * expected.abs().max():
        raise ModelError(
            f"the logits of {type(model).__name__} are not what its last hidden state and output head give (a logit "
            "scale or adapter that is not supported, or attention that is not causal), so its tokens cannot be scored"
        )


def _scored_hidden(
    body: nn.Module, batch: list[tuple[Sequence[int] | np.ndarray, np.ndarray]]
) -> tuple[Tensor, Tensor]:
    """Return the hidden states (n, hidden) that predict the scored tokens of a batch, and those tokens (n,)."""
    width = max((int(positions[-1]) for _, positions in batch if len(positions)), default=0)
    # Padding on the right needs no mask under causal attention, and attention without a mask takes the fast kernel.
    input_ids = torch.zeros(len(batch), max(width, 1), dtype=torch.int64)
    rows, targets = [], []
    for b, (ids, positions) in enumerate(batch):
        ids = torch.as_tensor(np.asarray(ids), dtype=torch.int64)
        fed = int(positions[-1]) if len(positions) else 0
        input_ids[b, :fed] = ids[:fed]
        rows.append(torch.as_tensor(positions) + b * input_ids.shape[1] - 1)
        targets.append(ids[positions])
    device = _input_device(body)
    hidden = body(input_ids=input_ids.to(device), use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[torch.cat(rows).to(hidden.device)], torch.cat(targets)


def _per_sequence(parts: list[tuple[Tensor | None, ...]], lengths: list[int]) -> list[TokenStats]:
    """Join the statistics of a batch's chunks and cut them into those of its sequences."""
    columns = [torch.cat(column).cpu() for column in zip(*parts, strict=True) if column[0] is not None]
    return [TokenStats(*stats) for stats in zip(*(column.split(lengths) for column in columns), strict=True)]


def _input_device(body: nn.Module) -> torch.device:
    return body.get_input_embeddings().weight.device  # pyright: ignore[reportCallIssue]
