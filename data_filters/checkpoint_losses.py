"""The loss of every row at several checkpoints of one training run: read from a Parquet file, or computed."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..core.errors import DataError
from ..core.fingerprint import MODEL_FILES
from ..core.trajectory import DataConfig, load_trajectories
from .result import ShowProgress

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass
class StoredLosses:
    """Losses by id.

    Attributes:
        names: the columns, in the order of training.
        values: (rows, checkpoints) float64; NaN where a row was not seen.
        rows: id -> row of `values`.
    """

    names: list[str]
    values: np.ndarray
    rows: dict[str, int]

    def of(self, ids: list[str]) -> np.ndarray:
        """Return (ids, checkpoints); NaN for an id that is not stored."""
        padded = np.vstack([self.values, np.full(len(self.names), math.nan)])
        return padded[[self.rows.get(name, len(self.values)) for name in ids]]


def read_losses(file: str) -> StoredLosses:
    """Read a Parquet table with `id` and `epoch_1`, `epoch_2`, ..., such as GLOW's ledger.

    Raises:
        DataError: the file is missing, unreadable, or has other columns.
    """
    import pandas as pd

    path = Path(file)
    if not path.is_file():
        raise DataError(f"{file}: no such file. GLOW writes loss_ledger.parquet into each of its checkpoints.")
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as Parquet ({error}).") from error
    names = sorted((c for c in frame.columns if re.fullmatch(r"epoch_\d+", c)), key=lambda c: int(c[len("epoch_") :]))
    if "id" not in frame.columns or not names:
        raise DataError(
            f"{file}: needs the columns `id`, `epoch_1`, `epoch_2`, ...; it has {', '.join(map(str, frame.columns))}."
        )
    ids = [str(name) for name in frame["id"]]
    rows = {name: row for row, name in enumerate(ids)}
    if len(rows) < len(ids):
        twice = next(name for row, name in enumerate(ids) if rows[name] != row)
        raise DataError(f"{file}: id {twice!r} stands twice. Losses are found by id: give each row its own.")
    values = frame[names].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    return StoredLosses(names, values, rows)


def find_checkpoints(folder: str) -> list[Path]:
    """Return the checkpoints of a training run in the order of its steps.

    Raises:
        DataError: there is no such folder, or it holds no `checkpoint-N` with weights.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{folder}: no such folder. Name the `output_dir` of a training run.")
    numbered = [(int(match[1]), path) for path in root.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    found = [path for _, path in sorted(numbered) if any(any(path.glob(weights)) for weights in MODEL_FILES[:2])]
    if not found:
        raise DataError(f"{folder}: holds no `checkpoint-N` with weights. Train with `save_strategy: epoch`.")
    return found


def losses_at_checkpoints(
    table: Dataset,
    folder: str,
    validation: str | None,
    *,
    by: str | None,
    dtype: Any,
    max_length: int,
    token_budget: int,
    work: Path,
    progress: ShowProgress | None,
) -> tuple[np.ndarray, dict[str, np.ndarray] | None]:
    """Score the rows, and the validation rows, under every checkpoint. What was scored is found again in the cache.

    Returns:
        (rows, checkpoints) mean NLL of the assistant's tokens, NaN where a row has none or cannot be rendered; and the
        mean of the validation rows by class (the class "" for all), or None without validation rows.
    """
    from .score_cache import default_folder
    from .scoring import score
    from .student import Scoring

    checkpoints = find_checkpoints(folder)
    held_out = load_trajectories(DataConfig(data=validation)) if validation else None
    if held_out is not None and by is not None and by not in held_out.column_names:
        raise DataError(f"{validation}: no column `{by}`, which `coreset` with `by: {by}` compares by.")

    def scored(rows: Dataset, part: str) -> np.ndarray:
        columns = []
        for checkpoint in checkpoints:
            scoring = Scoring(str(checkpoint), "transformers", dtype, 100, max_length, False, False)
            done = score(
                rows, scoring, cache=default_folder(), work=work / part, token_budget=token_budget, progress=progress
            )
            columns.append([_number(line.get("avg_surprisal")) for line in done.rows])
        return np.array(columns, dtype=np.float64).T

    own = scored(table, "rows")
    if held_out is None:
        return own, None
    reference = scored(held_out, "validation")
    usable = np.isfinite(reference).all(axis=1)
    if not usable.any():
        raise DataError(f"{validation}: no row has a loss at every checkpoint.")
    means = {"": reference[usable].mean(axis=0)}
    if by is not None:
        classes = np.array([str(value) for value in held_out[by]])
        means = {name: reference[usable & (classes == name)].mean(axis=0) for name in sorted(set(classes[usable]))}
    return own, means


def _number(value: float | None) -> float:
    return math.nan if value is None else value
