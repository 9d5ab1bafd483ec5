"""What unlearning needs to know of the model it started from, without a second copy of it in memory.

One number a row (npo, dpo) is computed before the first step, stored with a fingerprint in every checkpoint, and read
back on a resume. Whole distributions and hidden states (kl, undial, hidden) come from the same weights with the LoRA
adapter switched off, which is the start model as long as the adapter was new.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, send_to_device
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.errors import DataError, RecipeError, RunFolderError
from ..core.progress import progress

if TYPE_CHECKING:
    from .unlearning import UnlearnTrainer

REFERENCE_FILE = "reference_log_probs.safetensors"
PROBES = 32  # elements of each parameter that the fingerprint sees: training changes all of them


def load_alternatives(forget: Dataset, file: str | None, seed: int) -> Dataset:
    """Return the forget set with its answers replaced by the preferred ones.

    A file holds one answer a line, and each row gets one of them for the whole training, so that the start model's
    log-probability of it is one number.

    Raises:
        DataError: no file is named and there is no column `alternative`, or one of them is empty.
    """
    if file is None:
        if "alternative" not in forget.column_names:
            raise DataError(
                "dpo needs a preferred answer for each row: a column `alternative` (map it with `columns`), or "
                "`alternatives: FILE` with one refusal a line."
            )
        answers = list(forget["alternative"])
    else:
        if not Path(file).is_file():
            raise DataError(f"{file}: no such file. `alternatives` is a text file with one answer a line.")
        lines = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise DataError(f"{file}: has no line with an answer.")
        answers = random.Random(seed).choices(lines, k=len(forget))
    empty = [row for row, answer in enumerate(answers) if not answer]
    if empty:
        raise DataError(f"train_dataset, row {empty[0]}: `alternative` is empty.")
    chats = [[{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer for answer in answers]
    return forget.remove_columns("completion").add_column("completion", chats)  # pyright: ignore[reportCallIssue, reportArgumentType]


class StartModel:
    """The start model of a training: its log-probabilities of the forget rows, or itself while the adapter is off."""

    def __init__(self, trainer: "UnlearnTrainer", tables: list[Dataset]):
        self._trainer, self._tables = trainer, tables  # the tokenised rows to forget, and their alternatives
        args = trainer.args
        self._needed = args.forget_loss in ("npo", "dpo")
        self._values: Tensor | None = None
        self._fingerprint = self._compute_fingerprint() if self._needed else ""
        if args.forget_loss == "undial" or args.retain_loss in ("kl", "hidden"):
            self._check_adapter()

    def _check_adapter(self) -> None:
        args = self._trainer.args
        key = "forget_loss: undial" if args.forget_loss == "undial" else f"retain_loss: {args.retain_loss}"
        model: Any = self._trainer.model
        if not hasattr(model, "disable_adapter"):
            raise RecipeError(
                f"`{key}` needs the start model beside the trained one, which here is the trained one without its "
                "adapter. Use LoRA (`use_peft: true`), or `retain_loss: nll`."
            )
        new = [name for name, p in model.named_parameters() if "lora_B" in name and not _local(p).any()]
        if len(new) < sum("lora_B" in name for name, _ in model.named_parameters()) or not new:
            raise RecipeError(
                f"`{key}`: the adapter is not new, so that without it the model is not the one that unlearning starts "
                "from. Merge it into the weights first, and train a new one (LoRA with its plain initialisation)."
            )

    @contextmanager
    def acting(self) -> Iterator[None]:
        """While this is open, the trained model is the start model."""
        model: Any = self._trainer.accelerator.unwrap_model(self._trainer.model)
        model.eval()
        with model.disable_adapter():
            yield
        model.train()

    # -----------------------------------------------------------------------------------------------------------------
    # log-probabilities of the forget rows

    def log_probs(self, rows: Tensor) -> Tensor:
        """Return the log-probability of the answers of `rows` (pairs,), and of their alternatives: (1 or 2, pairs)."""
        if self._values is None:
            raise RuntimeError("the start model's log-probabilities are computed when training begins")
        return self._values[:, rows]

    def compute(self) -> None:
        """Score the forget rows with the model as it is now (collective; nothing to do after `load`)."""
        if not self._needed or self._values is not None:
            return
        model: Any = self._trainer.model_wrapped
        model.eval()
        rows = sum(map(len, self._tables))
        with torch.no_grad(), progress("start model's log-probabilities", rows) as bar:
            self._values = torch.stack([self._score(model, table, bar) for table in self._tables])
        model.train()

    def _score(self, model: Any, table: Dataset, bar: Any) -> Tensor:
        trainer = self._trainer
        accelerator, norm = trainer.accelerator, str(trainer.args.length_norm)
        batch = 2 * trainer.args.per_device_train_batch_size  # as many rows as a training batch has
        lengths = np.array([len(ids) for ids in table["input_ids"]])
        values = torch.empty(len(table), device=accelerator.device)
        # Every process makes the same number of equal batches: sharded models gather their weights in each.
        order, processes = np.argsort(lengths, kind="stable"), accelerator.num_processes
        for first in range(0, len(table), batch * processes):
            rows = order[first : first + batch * processes]
            mine = np.resize(rows, batch * processes)[accelerator.process_index :: processes]
            collated = trainer.data_collator([table[int(row)] for row in mine])
            inputs: Any = send_to_device(collated, accelerator.device)
            scores = trainer.score(model, inputs).log_prob(norm).float()
            gathered = accelerator.gather(scores).view(processes, -1).T.reshape(-1)  # pyright: ignore[reportAttributeAccessIssue]
            values[torch.from_numpy(rows)] = gathered[: len(rows)]
            bar.advance(len(rows))
        return values

    def forget(self) -> None:
        """Drop what was computed: a training that starts again starts from the model as it is."""
        self._values = None

    def save(self, folder: Path) -> None:
        """Write the log-probabilities and their fingerprint into a checkpoint."""
        if self._values is not None:
            save_file({"log_probs": self._values.cpu()}, folder / REFERENCE_FILE, {"fingerprint": self._fingerprint})

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            RunFolderError: there is nothing, or it is of another model or of other rows.
        """
        if not self._needed:
            return
        path = folder / REFERENCE_FILE
        if not path.exists():
            raise RunFolderError(f"{folder}: has no {REFERENCE_FILE}. Resume from a checkpoint of the same training.")
        with safe_open(path, "pt") as file:
            if file.metadata()["fingerprint"] != self._fingerprint:
                raise RunFolderError(
                    f"{path}: was computed with another start model, tokenizer, `length_norm`, or forget set. Give the "
                    "model that the training started from (not a checkpoint of it) and the same data, or start again."
                )
            self._values = file.get_tensor("log_probs").to(self._trainer.accelerator.device)

    def _compute_fingerprint(self) -> str:
        """Hash the start weights (some elements of each) and the forget rows' tokens, which the tokenizer made."""
        digest = hashlib.sha256(str(self._trainer.args.length_norm).encode())
        for name, parameter in self._trainer.model.named_parameters():
            flat = _local(parameter).reshape(-1)
            digest.update(name.encode())
            digest.update(flat[:: max(len(flat) // PROBES, 1)][:PROBES].float().cpu().numpy().tobytes())
        for table in self._tables:
            for ids, labels in zip(table["input_ids"], table["labels"], strict=True):
                digest.update(np.array([ids, labels], dtype=np.int64).tobytes())
        fingerprint = [digest.hexdigest()[:16]]
        if self._trainer.accelerator.num_processes > 1:
            broadcast_object_list(fingerprint)  # the other processes' weights may not be loaded yet
        return fingerprint[0]


def _local(parameter: Tensor) -> Tensor:
    """Return the elements that this process holds of a parameter; under ZeRO-3 it is an empty shell."""
    return getattr(parameter, "ds_tensor", parameter).detach()
