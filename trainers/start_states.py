"""The start model's hidden states at the answers of some rows: exact distributions of it without a second model.

A distribution over the vocabulary is the language-model head applied to one vector. These vectors (`width` numbers an
answer token) are computed once, before the first step, and kept in the CPU's memory and in every checkpoint, beside one
copy of the head, which is all that is needed of the start model's weights. rmu's hidden states need no head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence

from ..core.errors import ModelError

if TYPE_CHECKING:
    from .unlearning import UnlearnTrainer


def each_batch(trainer: "UnlearnTrainer", table: Dataset, rows: np.ndarray) -> Iterator[tuple[np.ndarray, dict]]:
    """Yield rows of a table in batches of nearly one length: (rows of all processes, this process's collated ones).

    Every process makes the same number of equal batches, since sharded models gather their weights in each.
    """
    accelerator, batch = trainer.accelerator, 2 * trainer.args.per_device_train_batch_size  # as a training batch
    lengths = np.array([len(ids) for ids in table.select(rows)["input_ids"]])
    order, processes = rows[np.argsort(lengths, kind="stable")], accelerator.num_processes
    for first in range(0, len(order), batch * processes):
        several = order[first : first + batch * processes]
        mine = np.resize(several, batch * processes)[accelerator.process_index :: processes]
        collated = trainer.data_collator([table[int(row)] for row in mine])
        yield several, dict(send_to_device(collated, accelerator.device))


def gather_batch(trainer: "UnlearnTrainer", values: Tensor, count: int) -> Tensor:
    """Return (count, ...) what all processes computed of a batch of `each_batch`, in the order of its rows."""
    gathered: Any = trainer.accelerator.gather(values)
    return gathered.unflatten(0, (trainer.accelerator.num_processes, -1)).transpose(0, 1).flatten(0, 1)[:count]


class StartStates:
    """Hidden states at the answer tokens of some rows of a table, in one flat tensor.

    Args:
        trainer: whose start model, batches and processes they are.
        table: tokenised rows.
        of_head: the head's input, from which `logits` follow; false: `Answers.hidden`, after `rmu_layer`.
    """

    def __init__(self, trainer: "UnlearnTrainer", table: Dataset, of_head: bool):
        self._trainer, self.table, self._of_head = trainer, table, of_head
        self._tensors: dict[str, Tensor] = {}
        self._counts = np.array([sum(label != -100 for label in labels[1:]) for labels in table["labels"]])
        if of_head and _head(trainer) is None:
            raise ModelError(f"{type(trainer.model).__name__}: has no language-model head of its own.")

    def covers(self, rows: np.ndarray) -> bool:
        """Whether the states of all these rows are there."""
        return bool(self._tensors) and bool(np.isin(rows, self._tensors["rows"].numpy()).all())

    def compute(self, model: Any, rows: np.ndarray, bar: Any) -> None:
        """Compute those of the rows with the model as it is now (collective).

        Raises:
            ModelError: the model's logits are not its head's output (soft-capped, scaled).
        """
        places = self._places(rows)
        states = torch.empty(0)
        for several, inputs in each_batch(self._trainer, self.table, rows):
            with self._head_inputs() as seen:
                answers = self._trainer.score(model, inputs)
            of_tokens = seen[0] if self._of_head else answers.hidden
            if not len(states):
                states = torch.empty(int(self._counts[rows].sum()), of_tokens.shape[-1], dtype=of_tokens.dtype)
                if self._of_head:
                    self._tensors = self._copy_head(of_tokens.dtype)
                    self._check_head(of_tokens[answers.mask], answers.logits[answers.mask])
            packed = pad_sequence([h[at] for h, at in zip(of_tokens, answers.mask, strict=True)], batch_first=True)
            padded: Any = self._trainer.accelerator.pad_across_processes(packed, dim=1)
            for row, found in zip(several, gather_batch(self._trainer, padded, len(several)), strict=True):
                states[places[row] : places[row] + self._counts[row]] = found[: self._counts[row]].cpu()
            bar.advance(len(several))
        self._tensors |= {"rows": torch.from_numpy(rows), "states": states}
        self._first = places

    def of(self, rows: Tensor) -> Tensor:
        """Return (tokens, width): the states of the answer tokens of these rows, one row after the other."""
        states = self._tensors["states"]
        spans = [(self._first[row], self._first[row] + self._counts[row]) for row in rows.tolist()]
        return torch.cat([states[start:end] for start, end in spans]).to(rows.device)

    def logits(self, rows: Tensor) -> Tensor:
        """Return (tokens, vocabulary): what the start model predicts at these rows' answer tokens, in float32."""
        return self._apply_head(self.of(rows))

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs of it."""
        return {name: tensor.cpu() for name, tensor in self._tensors.items()}

    def set(self, tensors: dict[str, Tensor]) -> None:
        """Take what `tensors` returned; nothing to forget it."""
        device = self._trainer.accelerator.device
        self._tensors = {name: t.to(device) if name.startswith("head") else t for name, t in tensors.items()}
        self._first = self._places(tensors["rows"].numpy()) if tensors else np.empty(0)

    # -----------------------------------------------------------------------------------------------------------------

    def _places(self, rows: np.ndarray) -> np.ndarray:
        """Return for each row of the table where its first token stands in the flat tensor."""
        places = np.full(len(self.table), -1)
        places[rows] = np.cumsum(self._counts[rows]) - self._counts[rows]
        return places

    @contextmanager
    def _head_inputs(self) -> Iterator[list[Tensor]]:
        seen: list[Tensor] = []
        hook = _head(self._trainer).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            yield seen
        finally:
            hook.remove()

    def _copy_head(self, dtype: torch.dtype) -> dict[str, Tensor]:
        parts = {name: getattr(_head(self._trainer), name, None) for name in ("weight", "bias")}
        return {f"head_{name}": _whole(part).to(dtype) for name, part in parts.items() if part is not None}

    def _apply_head(self, states: Tensor) -> Tensor:
        with self._trainer.accelerator.autocast():
            return linear(states, self._tensors["head_weight"], self._tensors.get("head_bias")).float()

    def _check_head(self, states: Tensor, logits: Tensor) -> None:
        tolerance = max(4 * torch.finfo(states.dtype).eps, 1e-4) * logits.abs().max()
        if (self._apply_head(states) - logits).abs().max() > tolerance:
            raise ModelError(
                f"{type(self._trainer.model).__name__}: its logits are not what its head puts out (scaled or "
                "soft-capped), so that the start model's cannot be made from its hidden states. Use LoRA "
                "(`use_peft: true`) with a new adapter, or `retain_loss: nll`."
            )


def _head(trainer: "UnlearnTrainer") -> Any:
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    return model.get_output_embeddings()


def _whole(parameter: Tensor) -> Tensor:
    """Return a copy of a parameter, whole where processes hold parts of it (collective)."""
    if hasattr(parameter, "ds_id"):
        from deepspeed.zero import GatheredParameters  # pyright: ignore[reportMissingImports]

        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    whole = parameter.detach()
    return whole.full_tensor() if isinstance(whole, DTensor) else whole.clone()
