"""What generates the turns of rollouts while a model is trained: the model itself, colocated vLLM, or a vLLM server.

Each engine turns a list of requests into completions, in order. `collective` engines are called by every process in
the same rounds, with a stand-in where a process has nothing to ask: a sharded model gathers its weights in them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig
from trl.models.utils import unwrap_model_for_generation

from ..core.engine_transformers import sample_batch
from ..core.generation import Checkpoint, Completion, Request, room


class TransformersTurns:
    """The model in training generates by itself.

    Args:
        trainer: a `GRPOTrainer`.
        checkpoint: end tokens and tokenizer.
        max_context: tokens that the model can hold.
    """

    def __init__(self, trainer: Any, checkpoint: Checkpoint, max_context: int):
        self._trainer, self._checkpoint, self.max_context = trainer, checkpoint, max_context
        self._model: Any = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Gather what must be gathered to generate; around all turns of a batch of rollouts."""
        trainer = self._trainer
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
            ) as self._model,
            torch.no_grad(),
            trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False),
        ):
            # generate() would fill what a request leaves open from the model's own file (top-k, a repetition penalty).
            own, self._model.generation_config = self._model.generation_config, GenerationConfig()
            try:
                yield
            finally:
                self._model.generation_config, self._model = own, None

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        """Generate one batch."""
        limits = [room(request, self.max_context) for request in requests]
        with self._trainer.accelerator.autocast():
            return sample_batch(self._model, requests, limits, self._checkpoint)


def open_turns(trainer: Any, checkpoint: Checkpoint) -> TransformersTurns:
    """Return the engine that the trainer's arguments name."""
    return TransformersTurns(trainer, checkpoint, int(checkpoint.config.max_position_embeddings))
