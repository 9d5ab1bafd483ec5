"""Forget rows, each with a retain row: which ones, how they are batched, and what a batch looks like."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

FORGET_ROWS, RETAIN_ROWS = "forget_rows", "retain_rows"  # keys of a batch: (pairs,) rows of the two sets
PARTS = ("forget", "alternative", "retain")


def pair_rows(seed: int, epoch: int, forget: int, retain: int) -> np.ndarray:
    """Return the retain row that each forget row is paired with in an epoch.

    A function of nothing but its arguments: whatever process, worker or resumed run draws a forget row, it gets the
    same retain row, and rows of different processes get different ones. Through the epochs the retain set is walked in
    one shuffled pass after another, so that no row is used twice before all were used once.

    Args:
        seed: of the run.
        epoch: from 0.
        forget: rows of the forget set.
        retain: rows of the retain set.

    Returns:
        (forget,) rows of the retain set.
    """
    start, end = epoch * forget, (epoch + 1) * forget
    passes = range(start // retain, (end - 1) // retain + 1)
    walk = np.concatenate([np.random.default_rng([seed, number]).permutation(retain) for number in passes])
    start -= passes.start * retain
    return walk[start : start + forget]


class PairedRows(torch.utils.data.Dataset):
    """Forget rows, their alternative answers where there are any, and this epoch's retain rows.

    Args:
        tables: `forget`, `retain`, and maybe `alternative` (aligned with `forget`), tokenised.
        seed: of the pairs.
    """

    def __init__(self, tables: dict[str, Dataset], seed: int):
        self._tables = {name: table.select_columns(["input_ids", "labels"]) for name, table in tables.items()}
        self._seed = seed
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        """Pair anew."""
        self._pairs = pair_rows(self._seed, epoch, len(self), len(self._tables["retain"]))

    def retain_rows(self, epochs: int) -> np.ndarray:
        """Return the retain rows that any of the first epochs has, in order and each once."""
        drawn = [pair_rows(self._seed, epoch, len(self), len(self._tables["retain"])) for epoch in range(epochs)]
        return np.unique(np.concatenate(drawn))

    def __len__(self) -> int:
        return len(self._tables["forget"])

    def __getitem__(self, row: int) -> dict[str, Any]:
        rows = {name: int(self._pairs[row]) if name == "retain" else row for name in self._tables}
        return {"row": row, "retain_row": rows["retain"], **{name: self._tables[name][rows[name]] for name in rows}}


@dataclass
class PairCollator(DataCollatorForLanguageModeling):
    """TRL's collator, on all forget rows of a batch, then their alternatives, then their retain rows.

    They are padded to one length and go through the model together. Adds `forget_rows`, `retain_rows` (pairs,).
    """

    def torch_call(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate pairs; other examples (of an evaluation) are collated as by TRL."""
        if "forget" not in examples[0]:
            return super().torch_call(list(examples))
        batch = super().torch_call([pair[part] for part in PARTS if part in examples[0] for pair in examples])
        batch[FORGET_ROWS] = torch.tensor([pair["row"] for pair in examples])
        batch[RETAIN_ROWS] = torch.tensor([pair["retain_row"] for pair in examples])
        return batch


def parts(batch: dict[str, Any]) -> tuple[int, slice, slice]:
    """Return the pairs of a batch, its rows to forget (and their alternatives), and its rows to keep."""
    pairs = len(batch[FORGET_ROWS])
    kept = len(batch["input_ids"]) - pairs
    return pairs, slice(kept), slice(kept, None)
