r"""Keep the rows whose loss falls when the validation loss falls: coresets from loss trajectories (CLD, 2508.20230).

    - coreset: {losses: runs/glow/checkpoint-600/loss_ledger.parquet, keep_ratio: 0.3}
    - coreset: {checkpoints: runs/sft, validation: validation.jsonl, keep_ratio: 0.3}

With the losses l_0 ... l_T of a row at the checkpoints of one training run, and their mean over the validation rows,

    CLD = Pearson(l_1 - l_0, ..., l_T - l_(T-1);  the same differences of the mean validation loss of the row's class)

as in the paper; the released code scores 0 where either side does not move, and so do we. The highest scores stay, the
same share of every class. For a language model a row's loss is the mean NLL of its assistant tokens (ours).

`losses` reads GLOW's ledger, so nothing is trained or run again. Two things then differ from the paper: its losses are
those of the training passes, not of a pass after the epoch; and without `validation` the reference of a row is the mean
of all *other* rows of its class. `checkpoints` scores both files under each checkpoint of a folder, as the paper does.

A correlation over T differences is noisy: its standard deviation without any relation is 1 / sqrt(T - 1). The report
gives the null distribution, from rows whose checkpoints were permuted, and its 95 % quantile; `select: above_null`
keeps only what exceeds it. Control: `- random` at the same `keep_ratio`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice, permutations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from ..core.errors import DataError
from .checkpoint_losses import find_checkpoints, losses_at_checkpoints, read_losses
from .columns import source_names, values_of
from .result import FilterResult, ShowProgress
from .selection import histogram, kept_count, mean

MIN_CHECKPOINTS = 5  # four differences: the null's deviation is 0.58, and below that any order looks like one
NULL_PERMUTATIONS = 200
NULL_ROWS = 2000
NULL_QUANTILE = 0.95
NO_LOSSES = "coreset: no finite loss at every checkpoint"


@dataclass
class CoresetConfig:
    """Where the losses come from, and how much to keep."""

    losses: str | None = field(
        default=None, metadata={"help": "Parquet of losses, `id`, `epoch_1`, `epoch_2`, ...: a GLOW run's ledger."}
    )
    checkpoints: str | None = field(
        default=None, metadata={"help": "Folder of checkpoints (`checkpoint-N`) under which every row is scored."}
    )
    validation: str | None = field(
        default=None,
        metadata={"help": "With `losses`: such a Parquet of validation rows. With `checkpoints`: their trajectories. "
                          "Default: the other rows of the class."},
    )  # fmt: skip
    by: str | None = field(
        default=None, metadata={"help": "Column that names a row's class, such as `domain`; default: one class."}
    )
    select: Literal["top", "above_null"] = field(
        default="top",
        metadata={"help": "top: the share `keep_ratio` of each class with the highest scores. above_null: of these, "
                          "the rows above the null's 95 % quantile."},
    )  # fmt: skip
    keep_ratio: float = field(default=0.3, metadata={"help": "Share of each class that stays; 1 only scores."})
    dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="bfloat16", metadata={"help": "Of the forward passes, for `checkpoints`."}
    )
    max_length: int = field(default=32768, metadata={"help": "Tokens of a row, for `checkpoints`; the rest is cut."})
    token_budget: int = field(default=16384, metadata={"help": "Tokens of one forward pass, for `checkpoints`."})

    def __post_init__(self):
        if (self.losses is None) == (self.checkpoints is None):
            raise ValueError("give `losses` (a Parquet file) or `checkpoints` (a folder), one of them")
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"`keep_ratio` must be above 0 and at most 1, got {self.keep_ratio}")

    @property
    def checkpoint_folders(self) -> list[str]:
        """The checkpoints that are scored: what a run depends on."""
        return [str(path) for path in find_checkpoints(self.checkpoints)] if self.checkpoints else []


def cld_scores(losses: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of each row's loss differences with those of its reference.

    Args:
        losses: (rows, checkpoints) losses.
        reference: (rows, checkpoints), or (checkpoints,) for all: the mean validation loss.

    Returns:
        (rows,) in [-1, 1]; 0 where one side's differences are all equal, as in the paper's code.
    """
    return _correlation(np.diff(losses.astype(np.float64), axis=-1), np.diff(reference.astype(np.float64), axis=-1))


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one = one - one.mean(axis=-1, keepdims=True)
    other = other - other.mean(axis=-1, keepdims=True)
    scale = np.sqrt((one**2).sum(axis=-1) * (other**2).sum(axis=-1))
    # Differences that are equal up to rounding leave only rounding, whose correlation means nothing.
    flat = scale <= 1e-24
    return np.where(flat, 0.0, np.clip((one * other).sum(axis=-1) / np.where(flat, 1.0, scale), -1.0, 1.0))


def null_scores(losses: np.ndarray, reference: np.ndarray, seed: int) -> np.ndarray:
    """Return the scores that rows have when their differences come in another order than they were made.

    Args:
        losses: (rows, checkpoints) losses.
        reference: (rows, checkpoints) or (checkpoints,).
        seed: draws the orders where there are more than `NULL_PERMUTATIONS`.

    Returns:
        (orders x rows,) scores; the true order is left out.
    """
    own, other = np.diff(losses.astype(np.float64), axis=-1), np.diff(reference.astype(np.float64), axis=-1)
    count = own.shape[-1]
    if math.factorial(count) - 1 <= NULL_PERMUTATIONS:
        orders: Sequence[Any] = list(islice(permutations(range(count)), 1, None))
    else:
        rng = np.random.default_rng(seed)
        orders = [rng.permutation(count) for _ in range(NULL_PERMUTATIONS)]
    return np.concatenate([_correlation(own[:, list(order)], other) for order in orders])


def others_mean(losses: np.ndarray) -> np.ndarray:
    """Return for each row the mean of all other rows, (rows, checkpoints): a row is no evidence for itself."""
    return (losses.sum(axis=0, keepdims=True) - losses) / (len(losses) - 1)


def check(table: Dataset, config: CoresetConfig, filled: Iterable[str] = ()) -> None:
    """Look at the losses and the class column, before an earlier step computes.

    Raises:
        DataError: a file or column is missing, or there are too few checkpoints.
    """
    if config.by is not None and config.by not in table.column_names and config.by not in filled:
        raise DataError(
            f"`coreset` with `by: {config.by}` needs a column of that name; the data have "
            f"{', '.join(table.column_names)}. Map yours with `columns: {{{config.by}: <your column>}}`."
        )
    if config.losses is not None:
        _enough(read_losses(config.losses).names, config.losses)
        if config.validation is not None:
            read_losses(config.validation)
    else:
        _enough(config.checkpoint_folders, str(config.checkpoints))


def _enough(names: Sequence[Any], where: str) -> None:
    if len(names) < MIN_CHECKPOINTS:
        raise DataError(
            f"{where}: {len(names)} checkpoint(s); `coreset` needs at least {MIN_CHECKPOINTS}, since with few any two "
            "falling losses look alike. Train for more epochs, or save more often and use `checkpoints`."
        )


def apply(
    table: Dataset, config: CoresetConfig, *, seed: int, cache_folder: Path, progress: ShowProgress | None
) -> FilterResult:
    """Keep the rows of the highest CLD of each class; adds `cld` and `cld_rank` (1 = highest of its class).

    Raises:
        DataError: the losses are missing, hold none of the rows, or are of too few checkpoints.
    """
    check(table, config)
    if config.losses is not None:
        own, reference = _from_files(config, values_of(table, "id"))
    else:
        own, reference = losses_at_checkpoints(
            table, str(config.checkpoints), config.validation, by=config.by, dtype=config.dtype,
            max_length=config.max_length, token_budget=config.token_budget, work=cache_folder, progress=progress,
        )  # fmt: skip
    classes = ["all"] * len(table) if config.by is None else [str(value) for value in table[config.by]]
    usable = np.asarray(np.isfinite(own).all(axis=1))
    if not usable.any():
        raise DataError(
            f"`coreset`: {config.losses or config.checkpoints} has a finite loss at every checkpoint for none of the "
            f"{len(table):,} rows (such as {table['id'][0]!r}). Losses are found by `id`: filter the file that was "
            "trained on."
        )
    return _choose(table, own, reference, classes, usable, config, seed)


def _from_files(config: CoresetConfig, ids: list[str]) -> tuple[np.ndarray, dict[str, np.ndarray] | None]:
    stored = read_losses(str(config.losses))
    if config.validation is None:
        return stored.of(ids), None
    validation = read_losses(config.validation)
    if validation.names != stored.names:
        raise DataError(
            f"{config.validation}: its checkpoints are {', '.join(validation.names)}, those of {config.losses} are "
            f"{', '.join(stored.names)}. Give the validation losses of the same run."
        )
    values = validation.values[np.isfinite(validation.values).all(axis=1)]
    if not len(values):
        raise DataError(f"{config.validation}: no row has a finite loss at every checkpoint.")
    return stored.of(ids), {"": values.mean(axis=0)}


def _choose(
    table: Dataset,
    own: np.ndarray,
    validation: dict[str, np.ndarray] | None,
    classes: list[str],
    usable: np.ndarray,
    config: CoresetConfig,
    seed: int,
) -> FilterResult:
    ids, sources = values_of(table, "id"), source_names(table)
    cld: list[float | None] = [None] * len(ids)
    rank: list[int | None] = [None] * len(ids)
    dropped = {int(row): NO_LOSSES for row in np.flatnonzero(~usable)}
    by_class, nulls = {}, []
    for name in sorted(set(classes)):
        rows = np.array([row for row, own_class in enumerate(classes) if own_class == name and usable[row]], int)
        reference = _reference(own[rows], validation, name)
        if reference is None:
            dropped |= dict.fromkeys(rows.tolist(), "coreset: its class has no rows to compare with")
            continue
        scores = cld_scores(own[rows], reference)
        null = _null_of_some(own[rows], reference, seed)
        bar = float(np.quantile(null, NULL_QUANTILE))
        nulls.append(null)
        order = sorted(range(len(rows)), key=lambda i: (-scores[i], ids[rows[i]]))
        top = kept_count(len(rows), config.keep_ratio)
        for place, i in enumerate(order):
            row = int(rows[i])
            cld[row], rank[row] = float(scores[i]), place + 1
            if place >= top:
                dropped[row] = f"coreset: not among the highest {100 * config.keep_ratio:.3g}% of its class"
            elif config.select == "above_null" and scores[i] <= bar:
                dropped[row] = f"coreset: not above the {100 * NULL_QUANTILE:.0f}% quantile of permuted checkpoints"
        by_class[name] = {
            "rows": len(rows),
            "kept": sum(int(row) not in dropped for row in rows),
            "mean_cld": float(scores.mean()),
            "null_quantile": bar,
            "share_above_null": float((scores > bar).mean()),
        }
    differences = own.shape[1] - 1
    report = {
        "losses": config.losses or config.checkpoints,
        "reference": config.validation or "the other rows of the class",
        "checkpoints": own.shape[1],
        "null_deviation_expected": 1 / math.sqrt(differences - 1),
        "null_deviation": float(np.concatenate(nulls).std()) if nulls else None,
        "by_class": by_class,
        "by_source": {
            source: {
                "rows": sources.count(source),
                "kept": sum(s == source and row not in dropped for row, s in enumerate(sources)),
                "mean_cld": mean(score for score, s in zip(cld, sources, strict=True) if s == source),
            }
            for source in sorted(set(sources))
        },
        "without_losses": int((~usable).sum()),
        "histogram": histogram(cld, sources),
    }
    return FilterResult({"cld": cld, "cld_rank": rank}, dict(sorted(dropped.items())), report)


def _null_of_some(own: np.ndarray, reference: np.ndarray, seed: int) -> np.ndarray:
    """The null of at most `NULL_ROWS` rows: enough for a quantile, and bounded memory for a million rows."""
    some = np.random.default_rng(seed).permutation(len(own))[:NULL_ROWS]
    return null_scores(own[some], reference[some] if reference.ndim > 1 else reference, seed)


def _reference(own: np.ndarray, validation: dict[str, np.ndarray] | None, name: str) -> np.ndarray | None:
    """The mean validation losses of a class; an empty class of validation rows, or a lone row, has none."""
    if validation is None:
        return others_mean(own) if len(own) > 1 else None
    return validation.get(name, validation.get("")) if len(own) else None
