"""What unlearning needs to know of the model it started from, without a second copy of it in memory.

One number a row (npo, dpo) is computed before the first step, stored with a fingerprint in every checkpoint, and read
back on a resume. Whole distributions and hidden states (kl, undial, hidden) come from the same weights with the LoRA
adapter switched off, where there is one and it is new; otherwise they are made of what `start_states` keeps.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.errors import DataError, RunFolderError
from ..core.progress import progress
from .paired_rows import FORGET_ROWS, RETAIN_ROWS, parts
from .start_states import StartStates, each_batch, gather_batch

if TYPE_CHECKING:
    from .unlearning import Answers, UnlearnTrainer

REFERENCE_FILE = "start_model.safetensors"
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
    """The start model of a training: what it says of the rows, or itself while the adapter is off.

    Args:
        trainer: whose start model it is.
        tables: tokenised rows: `forget`, `retain`, and maybe `alternative`.
    """

    def __init__(self, trainer: "UnlearnTrainer", tables: dict[str, Dataset]):
        args = trainer.args
        self._trainer = trainer
        self._scored = [tables[name] for name in ("forget", "alternative") if name in tables]
        self._needed = args.forget_loss in ("npo", "dpo")
        self._values: Tensor | None = None
        self._loaded = False
        self._hidden = args.retain_loss == "hidden"
        wanted = {"forget": args.forget_loss == "undial", "retain": args.retain_loss in ("kl", "hidden")}
        adapter_is_new = self._adapter_is_new()
        self._states = {
            part: StartStates(trainer, tables[part], of_head=part == "forget" or not self._hidden)
            for part, is_wanted in wanted.items()
            if is_wanted and not adapter_is_new
        }
        self._fingerprint = self._compute_fingerprint() if self._needed or self._states else ""

    def _adapter_is_new(self) -> bool:
        """Whether the model without its adapter is the one that training starts from."""
        fresh = [not _local(p).any() for name, p in self._trainer.model.named_parameters() if "lora_B" in name]
        return self._as_the_first_process(bool(fresh) and all(fresh))

    @contextmanager
    def acting(self) -> Iterator[None]:
        """While this is open, the trained model is the start model."""
        model: Any = self._trainer.accelerator.unwrap_model(self._trainer.model)
        model.eval()
        with model.disable_adapter():
            yield
        model.train()

    def answer_tokens(self, model: Any, inputs: dict[str, Any], part: str, answers: "Answers") -> Tensor:
        """Return what it says at the answer tokens of a batch's rows to forget or to retain, one row after the other.

        Args:
            model: the (wrapped) trained model.
            inputs: the batch.
            part: "forget" or "retain".
            answers: the trained model's, of the same rows.

        Returns:
            (tokens, vocabulary) logits, or for `retain_loss: hidden` (tokens, width) hidden states.
        """
        is_retain = part == "retain"
        if states := self._states.get(part):
            rows = inputs[RETAIN_ROWS if is_retain else FORGET_ROWS]
            return states.of(rows) if is_retain and self._hidden else states.logits(rows)
        _, forget_rows, retain_rows = parts(inputs)
        with self.acting(), torch.no_grad():
            found = self._trainer.score(model, inputs, retain_rows if is_retain else forget_rows, answers.columns)
        return (found.hidden if is_retain and self._hidden else found.logits)[found.mask]

    # -----------------------------------------------------------------------------------------------------------------
    # what is computed before the first step

    def log_probs(self, rows: Tensor) -> Tensor:
        """Return the log-probability of the answers of `rows` (pairs,), and of their alternatives: (1 or 2, pairs)."""
        if self._values is None:
            raise RuntimeError("the start model's log-probabilities are computed when training begins")
        return self._values[:, rows]

    def compute(self, epochs: int) -> None:
        """Ask the model as it is now (collective); nothing to do after `load`.

        Args:
            epochs: of the training, which decide which retain rows it meets.

        Raises:
            RunFolderError: what was loaded is of a training with fewer epochs.
        """
        rows = {part: np.arange(len(states.table)) for part, states in self._states.items()}
        if "retain" in rows:
            rows["retain"] = self._trainer.pairs.retain_rows(epochs)
        if self._loaded:
            if not all(self._states[part].covers(needed) for part, needed in rows.items()):
                raise RunFolderError(
                    f"the checkpoint's {REFERENCE_FILE} has not the retain rows of {epochs} epochs. Resume with as "
                    "many epochs (or steps) as the training began with, or start again."
                )
            return
        count = sum(map(len, rows.values())) + (sum(map(len, self._scored)) if self._needed else 0)
        if not count:
            return
        model: Any = self._trainer.model_wrapped
        model.eval()
        with torch.no_grad(), progress("what the start model says", count) as bar:
            if self._needed:
                self._values = torch.stack([self._score(model, table, bar) for table in self._scored])
            for part, states in self._states.items():
                states.compute(model, rows[part], bar)
        model.train()

    def _score(self, model: Any, table: Dataset, bar: Any) -> Tensor:
        trainer, norm = self._trainer, str(self._trainer.args.length_norm)
        values = torch.empty(len(table), device=trainer.accelerator.device)
        for rows, inputs in each_batch(trainer, table, np.arange(len(table))):
            scores = trainer.score(model, inputs).log_prob(norm).float()
            values[torch.from_numpy(rows)] = gather_batch(trainer, scores, len(rows))
            bar.advance(len(rows))
        return values

    def forget(self) -> None:
        """Drop what was computed: a training that starts again starts from the model as it is."""
        self._values, self._loaded = None, False
        for states in self._states.values():
            states.set({})

    def save(self, folder: Path) -> None:
        """Write what was computed, and whose it is, into a checkpoint."""
        tensors = {} if self._values is None else {"log_probs": self._values.cpu()}
        for part, states in self._states.items():
            tensors |= {f"{part}.{name}": tensor for name, tensor in states.tensors().items()}
        if tensors:
            save_file(tensors, folder / REFERENCE_FILE, {"fingerprint": self._fingerprint})

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            RunFolderError: there is nothing, or it is of another model or of other rows.
        """
        if not self._fingerprint:
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
            if self._needed:
                self._values = file.get_tensor("log_probs").to(self._trainer.accelerator.device)
            for part, states in self._states.items():
                names = [name for name in file.keys() if name.startswith(f"{part}.")]  # noqa: SIM118  it is no dict
                states.set({name.removeprefix(f"{part}."): file.get_tensor(name) for name in names})
        self._loaded = True

    def _compute_fingerprint(self) -> str:
        """Hash the start weights (some elements of each) and the rows' tokens, which the tokenizer made."""
        args = self._trainer.args
        digest = hashlib.sha256(f"{args.length_norm} {args.rmu_layer if self._hidden else ''}".encode())
        for name, parameter in self._trainer.model.named_parameters():
            flat = _local(parameter).reshape(-1)
            digest.update(name.encode())
            digest.update(flat[:: max(len(flat) // PROBES, 1)][:PROBES].float().cpu().numpy().tobytes())
        for table in (*self._scored, *(states.table for states in self._states.values())):
            for ids, labels in zip(table["input_ids"], table["labels"], strict=True):
                digest.update(np.array([ids, labels], dtype=np.int64).tobytes())
        return self._as_the_first_process(digest.hexdigest()[:16])

    def _as_the_first_process(self, value: Any) -> Any:
        """Return its value in all processes: the others' weights may not be loaded yet."""
        box = [value]
        if self._trainer.accelerator.num_processes > 1:
            broadcast_object_list(box)
        return box[0]


def _local(parameter: Tensor) -> Tensor:
    """Return the elements that this process holds of a parameter; under ZeRO-3 it is an empty shell."""
    return getattr(parameter, "ds_tensor", parameter).detach()
