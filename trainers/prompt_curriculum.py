"""Which prompts come next: each once per pass, without those that the policy has mastered.

No-positive-resampling (arXiv 2510.13786): a prompt whose pass rate reached a cap is never shown again. A pass shows
each prompt once, so what is retired during a pass lies behind the cursor, and the pass, the cursor and the table are
the whole state: a resumed run goes on with the very prompts of an undisturbed one.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..core.errors import DataError, RunFolderError
from ..core.run_folder import write_atomic

FILE = "prompt_curriculum.json"


class PromptCurriculum:
    """Deals batches of prompts and keeps the table of their pass rates. The same in every process.

    Args:
        ids: of the prompts, by row; unique.
        batch_size: prompts of a batch.
        seed: of the order.
        shuffle: whether each pass has an order of its own, or that of the rows.
        retire_at: pass rate from which on a prompt is retired; None retires none.

    Raises:
        DataError: an id stands twice, or the prompts do not fill a batch.
    """

    def __init__(self, ids: Sequence[str], batch_size: int, seed: int, shuffle: bool, retire_at: float | None):
        self._rows = {name: row for row, name in enumerate(ids)}
        if len(self._rows) < len(ids):
            twice = next(name for row, name in enumerate(ids) if self._rows[name] != row)
            raise DataError(f"train_dataset: id {twice!r} stands twice. Give each prompt an id of its own.")
        if len(ids) < batch_size:
            raise DataError(
                f"train_dataset: {len(ids)} prompts, and one generation batch takes {batch_size}. Add prompts, or "
                "lower `per_device_train_batch_size`, `gradient_accumulation_steps` or the number of processes."
            )
        self._ids, self._batch, self._seed, self._shuffle = list(ids), batch_size, seed, shuffle
        self._retire_at = retire_at
        self._pass = self._cursor = 0
        self.dealt = 0  # batches so far
        self._order = self._new_order()
        self.visits = np.zeros(len(ids), np.int64)
        self.pass_rate = np.full(len(ids), np.nan)  # of the last visit
        self.retired = np.zeros(len(ids), bool)

    @property
    def exhausted(self) -> bool:
        """Whether the prompts that are left no longer fill a batch."""
        return int((~self.retired).sum()) < self._batch

    def next_batch(self) -> list[int]:
        """Return the rows of the next batch. A pass's last prompts that fill no batch are left out, as in TRL."""
        self.dealt += 1
        rows = self._remaining()
        if len(rows) < self._batch:
            self._pass, self._cursor = self._pass + 1, 0
            self._order = self._new_order()
            rows = self._remaining()
        if len(rows) < self._batch:  # all but a few are retired: what fills a batch is taken again
            rows = np.resize(rows if len(rows) else self._order, self._batch)
        else:
            rows = rows[: self._batch]
            self._cursor = int(np.flatnonzero(self._order == rows[-1])[0]) + 1
        return rows.tolist()

    def record(self, rows: Sequence[int], pass_rates: Sequence[float]) -> None:
        """Note the pass rates of a batch, and retire what the policy has mastered."""
        for row, rate in zip(rows, pass_rates, strict=True):
            self.visits[row] += 1
            self.pass_rate[row] = rate
            self.retired[row] |= self._retire_at is not None and rate >= self._retire_at

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint folder."""
        seen = np.flatnonzero(self.visits)
        table = {
            self._ids[row]: [int(self.visits[row]), float(self.pass_rate[row]), bool(self.retired[row])] for row in seen
        }
        state = {"pass": self._pass, "cursor": self._cursor, "dealt": self.dealt, "visits_pass_rate_retired": table}
        write_atomic(folder / FILE, json.dumps(state))

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            RunFolderError: the checkpoint has no such file, or one of other prompts.
        """
        try:
            state = json.loads((folder / FILE).read_text(encoding="utf-8"))
        except OSError as error:
            raise RunFolderError(f"{folder}: no {FILE}, so it is no checkpoint of tool_rlvr.") from error
        self._pass, self._cursor, self.dealt = state["pass"], state["cursor"], state["dealt"]
        self._order = self._new_order()
        for name, (visits, rate, retired) in state["visits_pass_rate_retired"].items():
            if name not in self._rows:
                raise RunFolderError(f"{folder / FILE}: prompt {name!r} is not in the training set. Restore the data.")
            row = self._rows[name]
            self.visits[row], self.pass_rate[row], self.retired[row] = visits, rate, retired

    def _remaining(self) -> np.ndarray:
        ahead = self._order[self._cursor :]
        return ahead[~self.retired[ahead]]

    def _new_order(self) -> np.ndarray:
        rows = np.arange(len(self._ids))
        return np.random.default_rng([self._seed, self._pass]).permutation(rows) if self._shuffle else rows
