"""What the report says of a loss ledger: how samples learn, which do not, and what GLOW weighs most.

The ledger (`trainers/loss_ledger.py`) is a Parquet file: `id`, the losses `epoch_1`, `epoch_2`, ..., and `weight`, that
of the last epoch. Labels, sources and texts come from the data that the run was trained on, where they are still there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from ..core.errors import AfterglowError
from ..core.trajectory import DataConfig, completion_text, load_trajectories, prompt_text
from . import report_figures as figures

if TYPE_CHECKING:
    from datasets import Dataset

LEDGER_FILE = "loss_ledger.parquet"
MAX_TEXT = 6_000
SAMPLES = 5  # of each kind
HARD = 0.75  # quantile of the last loss from which on a sample is hard, as in GLOW's released code
LABELS = {True: "right", False: "wrong", None: "not graded"}


def find_ledger(path: Path) -> Path | None:
    """Return the ledger of a run folder: the finished one, or that of the newest checkpoint."""
    found = sorted(path.glob(f"checkpoint-*/{LEDGER_FILE}"), key=lambda file: int(file.parent.name.split("-")[1]))
    candidates = [path / LEDGER_FILE, *reversed(found)]
    return next((file for file in candidates if file.exists()), None)


@dataclass(frozen=True)
class Ledger:
    """A ledger with what is known of its samples.

    Attributes:
        ids: of the samples.
        losses: (samples, epochs), NaN where unseen.
        weights: (samples,), of the last epoch; None in ledgers that have none.
        labels: right, wrong or not graded.
        sources: which teacher; a dash where unknown.
        table: the training set, None where it is no longer here.
        rows: row of each sample in it, None where it has none.
    """

    ids: list[str]
    losses: np.ndarray
    weights: np.ndarray | None
    labels: list[str]
    sources: list[str]
    table: "Dataset | None"
    rows: list[int | None]


def read_ledger(path: Path) -> Ledger | None:
    """Read the ledger of a run folder; None where there is none, or nothing in it."""
    import pandas as pd

    if (file := find_ledger(path)) is None:
        return None
    frame = pd.read_parquet(file).set_index("id")
    losses = frame.filter(like="epoch_").to_numpy("float32")
    if not losses.size or np.isnan(losses).all():
        return None
    weights = frame["weight"].to_numpy("float32") if "weight" in frame else None
    table = trained_rows(path)
    position = {name: row for row, name in enumerate(table["id"])} if table else {}
    rows = [position.get(name) for name in frame.index]
    correct, source = (list(table[name]) if table else [] for name in ("correct", "source"))
    labels = [LABELS[None if row is None else correct[row]] for row in rows]
    sources = ["–" if row is None else source[row] or "–" for row in rows]
    return Ledger(list(frame.index), losses, weights, labels, sources, table, rows)


def describe_ledger(path: Path) -> dict[str, Any]:
    """Return the figures of a run folder's ledger and its notable samples; both empty where it has none."""
    if (ledger := read_ledger(path)) is None:
        return {"figures": [], "notable": []}
    notable = [
        ("most regressed", "the loss rose most in the last epoch", most_regressed(ledger.losses)),
        ("stagnating", "in the hardest quarter, the loss fell least since the first epoch", stagnating(ledger.losses)),
    ]
    groups = [
        {"kind": kind, "what": what, "samples": [_sample(ledger, row) for row in rows]}
        for kind, what, rows in notable
        if rows
    ]
    lines = {kind: ledger.losses[rows] for kind, _, rows in notable if rows}
    drawn = _figures(ledger)
    if lines:
        drawn.append(figures.trajectories("samples that do not learn", lines))
    return {"figures": drawn, "notable": groups}


def most_regressed(losses: np.ndarray, count: int = SAMPLES) -> list[int]:
    """Return the rows of (samples, epochs) whose loss rose most from the last epoch but one to the last."""
    if losses.shape[1] < 2:
        return []
    gains = losses[:, -2] - losses[:, -1]
    order = np.argsort(np.where(np.isnan(gains), np.inf, gains), kind="stable")
    return [int(row) for row in order[:count] if gains[row] < 0]


def stagnating(losses: np.ndarray, count: int = SAMPLES) -> list[int]:
    """Return the rows of the hardest quarter whose loss fell by the smallest share since they were first seen.

    Of those that fell at all: what rose is regressed.
    """
    if losses.shape[1] < 2:
        return []
    first = losses[np.arange(len(losses)), np.argmax(~np.isnan(losses), axis=1)]
    last = losses[:, -1]
    hard = last >= np.nanquantile(last, HARD) if not np.isnan(last).all() else np.zeros(len(last), bool)
    fallen = np.where(hard & (first > last), (first - last) / np.maximum(first, 1e-12), np.inf)
    return [int(row) for row in np.argsort(fallen, kind="stable")[:count] if np.isfinite(fallen[row])]


def trained_rows(path: Path) -> "Dataset | None":
    """Return the table that a run was trained on, if its files are still here and still what they were."""
    config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")) or {}
    keys = {f.name: config[f.name] for f in fields(DataConfig) if f.name in config}
    files = [keys["data"]] if isinstance(keys.get("data"), str) else keys.get("data") or []
    if not files or not all(Path(file).is_file() for file in files):
        return None
    try:
        return load_trajectories(DataConfig(**keys))
    except AfterglowError:
        return None


def cut(text: str) -> str:
    """Leave the middle of a long text out."""
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[: MAX_TEXT // 2]}\n… {len(text) - MAX_TEXT:,} more characters …\n{text[-MAX_TEXT // 2 :]}"


def _figures(ledger: Ledger) -> list[str]:
    by_label = {
        name: np.array([label == name for label in ledger.labels]) for name in LABELS.values() if name in ledger.labels
    }
    if list(by_label) == ["not graded"]:
        by_label = {"samples": by_label["not graded"]}
    by_source = {name: np.array([of == name for of in ledger.sources]) for name in dict.fromkeys(ledger.sources)}
    groups = {name: ledger.losses[chosen] for name, chosen in by_label.items()}
    drawn = [figures.ledger("loss of each sample", {n: rows for n, rows in groups.items() if not np.isnan(rows).all()})]
    if ledger.losses.shape[1] < 2:
        return drawn
    gains = ledger.losses[:, -2] - ledger.losses[:, -1]
    for what, values in (("gain in the last epoch, nats", gains), ("weight in the last epoch", ledger.weights)):
        drawn.append(_histogram(what, values, by_label))
        if len(by_source) > 1:
            drawn.append(_histogram(f"{what}, by source", values, by_source))
    return [figure for figure in drawn if figure]


def _histogram(title: str, values: np.ndarray | None, groups: Mapping[str, np.ndarray]) -> str:
    """Draw the values of each group; nothing where there are none."""
    if values is None or np.isnan(values).all():
        return ""
    low, high = np.nanquantile(values, [0.005, 0.995])
    edges = np.histogram_bin_edges(values[~np.isnan(values)], bins=30, range=(low, high) if high > low else None)
    counts = {name: np.histogram(values[of & ~np.isnan(values)], edges)[0].tolist() for name, of in groups.items()}
    return figures.histogram(title, edges.tolist(), figures.few(counts))


def _sample(ledger: Ledger, row: int) -> dict[str, Any]:
    losses, weights, at, table = ledger.losses[row], ledger.weights, ledger.rows[row], ledger.table
    text: dict[str, Any] = dict(table[at]) if table is not None and at is not None else {}
    return {
        "id": ledger.ids[row],
        "label": ledger.labels[row],
        "source": ledger.sources[row],
        "losses": " → ".join("–" if np.isnan(loss) else f"{loss:.3g}" for loss in losses),
        "weight": "–" if weights is None or np.isnan(weights[row]) else f"{weights[row]:.3g}",
        "problem": cut(prompt_text(text["prompt"])) if text else None,
        "completion": cut(completion_text(text["completion"])) if text else None,
    }
