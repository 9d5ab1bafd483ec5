"""Rollout routing replay (R3, arXiv 2510.11370): train a mixture of experts with the experts that the engine chose.

    g_i = I_i exp(s_i) / sum_j I_j exp(s_j)

I: the engine's choice of experts for the token; s: the logits of the router in training, so that the gradient reaches
the router. (The exact form is from secondary sources; a model whose own weights are not normalised over the chosen
experts keeps its own convention.) Positions without a record, as padding, choose for themselves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ModelError
from ..core.routing import find_routers

NO_RECORD = -1


def replayed(
    logits: Tensor, scores: Tensor, chosen: Tensor, recorded: Tensor, normalised: bool
) -> tuple[Tensor, Tensor]:
    """Replace a router's choice by the recorded one.

    Args:
        logits: (tokens, experts).
        scores: (tokens, k), weights of the router's own choice.
        chosen: (tokens, k), its own choice.
        recorded: (tokens, k), `NO_RECORD` where there is none.
        normalised: whether the weights of a token's experts sum to 1.

    Returns:
        Weights and experts, (tokens, k) each.
    """
    known = (recorded >= 0).all(-1, keepdim=True)
    experts = torch.where(known, recorded, chosen)
    weights = logits.softmax(-1, dtype=torch.float).gather(-1, experts)
    if normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return torch.where(known, weights.to(scores.dtype), scores), experts


class RoutingReplay:
    """Hooks on the routers of a transformers model.

    Args:
        model: Qwen2-, Qwen3-MoE, OLMoE and others whose routers return logits, weights and experts.

    Raises:
        ModelError: it has no such router.
    """

    def __init__(self, model: nn.Module):
        routers = find_routers(model)
        if not routers:
            raise ModelError(
                f"routing_replay: {type(model).__name__} has no router of a kind that is known here (a softmax top-k "
                "router, as of Qwen3-MoE). Dense models need no replay; delete the key."
            )
        self.layers, self.top_k = len(routers), int(routers[0].top_k)  # pyright: ignore[reportArgumentType]
        self._waiting: Tensor | None = None  # rows that the next forward passes take, in order
        self._routes: Tensor | None = None  # of the last forward pass, kept: checkpointing runs it again backwards
        model.register_forward_pre_hook(self._take, with_kwargs=True)
        for layer, router in enumerate(routers):
            router.register_forward_hook(self._hook(layer))

    @contextmanager
    def of(self, routes: Tensor | None) -> Iterator[None]:
        """Replay in the forward passes within, which take the rows of `routes` (rows, seq, layers, k) in order."""
        self._waiting = routes
        try:
            yield
        finally:
            self._waiting = None

    def _take(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._waiting is None:
            self._routes = None
            return
        rows = kwargs["input_ids"].size(0)
        self._routes, self._waiting = self._waiting[:rows], self._waiting[rows:]

    def _hook(self, layer: int) -> Any:
        def hook(
            router: Any, args: tuple, output: tuple[Tensor, Tensor, Tensor]
        ) -> tuple[Tensor, Tensor, Tensor] | None:
            if self._routes is None:
                return None
            logits, scores, chosen = output
            recorded = self._routes[:, :, layer].reshape(-1, chosen.size(-1)).to(chosen)
            return (logits, *replayed(logits, scores, chosen, recorded, router.norm_topk_prob))

        return hook


def lay_out(records: list[Any], starts: list[int], width: int, layers: int, top_k: int) -> Tensor:
    """Lay records out like a padded batch.

    Args:
        records: per row (tokens that the engine saw, layers, k) from the prompt's first token on, or None.
        starts: position of the first token of each row.
        width: of the batch.
        layers: routers of the model.
        top_k: experts of a token.

    Returns:
        (rows, width, layers, k), `NO_RECORD` where there is none.
    """
    laid = torch.full((len(records), width, layers, top_k), NO_RECORD)
    for row, (record, start) in enumerate(zip(records, starts, strict=True)):
        if record is not None:
            record = torch.as_tensor(record)[: width - start].to(laid)
            laid[row, start : start + len(record)] = record
    return laid
