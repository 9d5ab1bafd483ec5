"""The loss of every sample in every epoch: one float32 table that follows the samples by id, not by position."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import DataError, RunFolderError

LEDGER_FILE = "loss_ledger.parquet"
NO_SAMPLE = -1  # the row number of what is no sample (padding, a repeated row): recorded nowhere


def check_ids(ids: Sequence[str]) -> list[str]:
    """Return the ids of a training set as a list.

    Raises:
        DataError: an id is not a string, or stands twice.
    """
    first: dict[str, int] = {}
    for row, name in enumerate(ids):
        if not isinstance(name, str):
            raise DataError(f"train_dataset, row {row}: `id` must be a string that stays the same, got {name!r}.")
        if name in first:
            raise DataError(
                f"train_dataset, rows {first[name]} and {row}: both have the id {name!r}. A sample's loss is followed "
                "by its id; give each row its own (a content hash), or drop the duplicate."
            )
        first[name] = row
    return list(first)


class LossLedger:
    """Per-sample loss by id and epoch, [samples, epochs seen], and the latest weight; NaN where a sample was not seen.

    During an epoch each process writes the rows of its own samples and compares with `previous_loss`, the latest loss
    from before this epoch, which is frozen: a sample met twice cannot compare with itself. `synchronise` brings the
    processes together, with one all-reduce. Nothing is sent in between.
    """

    def __init__(self, ids: Sequence[str], device: torch.device | str = "cpu"):
        self.ids = list(ids)
        self.epoch = 0
        self._finished: list[Tensor] = []
        # One slot more than samples: row NO_SAMPLE lands there.
        self._current = torch.full((len(self.ids) + 1,), torch.nan, device=device)
        self._previous = self._current.clone()
        self._weight = self._current.clone()
        self._ago: dict[int, Tensor] = {}  # epochs -> column, on the device

    def begin_epoch(self, epoch: int) -> None:
        """Enter an epoch, counted from 0: the finished one becomes the past that its successor is compared with."""
        while self.epoch < epoch:
            self._finished.append(self._current[:-1].cpu())
            self._previous = torch.where(self._current.isnan(), self._previous, self._current)
            self._current = torch.full_like(self._current, torch.nan)
            self._weight = self._current.clone()
            self._ago.clear()
            self.epoch += 1

    def record(self, rows: Tensor, losses: Tensor, weights: Tensor | None = None) -> None:
        """Note the losses (samples,) of this epoch, and the weights, at the row numbers `rows` (samples,)."""
        self._current[rows] = losses.detach().float()
        if weights is not None:
            self._weight[rows] = weights.detach().float()

    def previous_loss(self, rows: Tensor) -> Tensor:
        """Return the latest loss of each row from before this epoch, NaN where there is none."""
        return self._previous[rows]

    def loss_ago(self, rows: Tensor, epochs: int) -> Tensor:
        """Return the loss of each row that many epochs before this one, NaN where there is none."""
        if epochs > len(self._finished):
            return torch.full_like(rows, torch.nan, dtype=torch.float32)
        if epochs not in self._ago:
            self._ago[epochs] = self._finished[-epochs].to(self._current.device)
        return self._ago[epochs][rows]

    def synchronise(self) -> None:
        """Give every process the rows of all of them: one all-reduce of this epoch's columns (collective)."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        # A row belongs to one process and is unseen in the others, so the maximum is that row, bit for bit.
        merged = torch.stack([self._current, self._weight]).nan_to_num(nan=-torch.inf, posinf=torch.inf)
        torch.distributed.all_reduce(merged, op=torch.distributed.ReduceOp.MAX)
        self._current, self._weight = merged.masked_fill(merged == -torch.inf, torch.nan)

    def table(self) -> Tensor:
        """Return the losses, (samples, epochs), float32 on the CPU; the last column is the running epoch's."""
        return torch.stack([*self._finished, self._current[:-1].cpu()], dim=1)

    def save(self, folder: Path) -> Path:
        """Write the table as Parquet, whole or not at all.

        Columns: `id`; the losses `epoch_1`, `epoch_2`, ...; `weight`, that of the last epoch.
        """
        import pandas as pd

        columns = self.table().numpy()
        frame = pd.DataFrame(columns, columns=[f"epoch_{n + 1}" for n in range(columns.shape[1])])
        frame.insert(0, "id", self.ids)
        frame["weight"] = self._weight[:-1].cpu().numpy()
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{LEDGER_FILE}.partial"
        frame.to_parquet(partial, index=False)
        os.replace(partial, folder / LEDGER_FILE)
        return folder / LEDGER_FILE

    @classmethod
    def load(cls, folder: Path, ids: Sequence[str], device: torch.device | str = "cpu") -> "LossLedger":
        """Read what `save` wrote, for a training set that may be reordered or larger: new ids are unseen.

        Raises:
            RunFolderError: the folder has no ledger.
        """
        import pandas as pd

        path = folder / LEDGER_FILE
        if not path.exists():
            raise RunFolderError(
                f"{folder}: has no {LEDGER_FILE}, so the losses of the epochs before it are unknown. Resume from a "
                "checkpoint of a GLOW run, or train from the start."
            )
        stored = pd.read_parquet(path).set_index("id").reindex(list(ids))
        ledger = cls(ids, device)
        for epoch, name in enumerate(name for name in stored.columns if name.startswith("epoch_")):
            ledger.begin_epoch(epoch)
            ledger._current[:-1] = torch.from_numpy(stored[name].to_numpy("float32", copy=True)).to(device)
        if "weight" in stored:
            ledger._weight[:-1] = torch.from_numpy(stored["weight"].to_numpy("float32", copy=True)).to(device)
        return ledger
