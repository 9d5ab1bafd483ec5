"""The routers of a mixture of experts: finding them, and reading what they chose in a forward pass."""

from typing import Any

import torch
from torch import Tensor, nn


def find_routers(model: nn.Module) -> list[nn.Module]:
    """Return the softmax top-k routers of a transformers model in the order of its layers; none for a dense model.

    Those of Qwen2-, Qwen3-MoE, OLMoE and others, which return logits, weights and experts of (tokens, ...).
    """
    return [m for m in model.modules() if type(m).__name__.endswith("TopKRouter") and hasattr(m, "norm_topk_prob")]


class RouterProbabilities:
    """Hooks that keep the router probabilities of the last forward pass.

    Args:
        routers: of `find_routers`.
    """

    def __init__(self, routers: list[nn.Module]):
        self._last: list[Tensor] = [torch.empty(0)] * len(routers)
        self._handles = [router.register_forward_hook(self._hook(i)) for i, router in enumerate(routers)]

    def _hook(self, layer: int) -> Any:
        def hook(router: nn.Module, args: tuple, output: tuple[Tensor, ...]) -> None:
            self._last[layer] = output[0].detach().softmax(-1, dtype=torch.float32)

        return hook

    def mean_of(self, row: int, rows: int, tokens: int) -> Tensor:
        """Return (layers, experts) on the CPU: the mean over the first tokens of one row of a padded batch.

        Args:
            row: of the batch.
            rows: of the batch.
            tokens: of that row; what follows is padding.
        """
        means = [of_layer.view(rows, -1, of_layer.size(-1))[row, :tokens].mean(0) for of_layer in self._last]
        return torch.stack([mean.cpu() for mean in means])

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
