"""Every checkpoint of a training, evaluated alike: `checkpoints: [runs/glow/checkpoint-*]` in place of `model`.

One engine samples them all (the weights are swapped), each checkpoint has a run folder of its own in `output_dir`, and
when all are there `sweep.json` holds the curve and `selection.json` the checkpoint to go on with.
"""

import glob
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..core.checkpoint_selection import RULE, Candidate, select_checkpoint
from ..core.errors import RecipeError
from ..core.generation import Engine, EngineConfig
from ..core.pass_at_k import pass_at_k
from ..core.recipe import Section, build
from ..core.row_sources import read_rows
from ..core.run_folder import write_atomic
from . import evaluate
from .scores import PROBLEMS_FILE, read_scores
from .uncertainty import new_problems_error

SWEEP_FILE, SELECTION_FILE = "sweep.json", "selection.json"
SWEEP_SCHEMA = 1


@dataclass
class SweepConfig:
    """Which checkpoints to evaluate, in place of `model`."""

    checkpoints: list[str] = field(
        metadata={"help": "Checkpoint folders in place of `model`, with wildcards, such as 'runs/glow/checkpoint-*'."}
    )


def run_sweep(section: Section, overwrite: bool = False, dry_run: bool = False) -> Path:
    """Evaluate every checkpoint of a recipe, or go on where a killed run stopped, and return the sweep's folder.

    Raises:
        RecipeError: `checkpoints` names nothing, or `model` stands beside it.
        AfterglowError: what `evaluate.run` raises.
    """
    if "model" in section.values:
        raise RecipeError(f"{section.place('model')}: `model` stands beside `checkpoints`. Delete one of them.")
    (sweep,) = build(Section({"checkpoints": section.values["checkpoints"]}, section.lines, section.where), SweepConfig)
    checkpoints = find_checkpoints(sweep.checkpoints, section.place("checkpoints"))
    recipe = {key: value for key, value in section.values.items() if key != "checkpoints"}
    config, *_ = build(
        Section(recipe | {"model": next(iter(checkpoints.values()))}, section.lines, section.where),
        evaluate.EvalConfig,
        *evaluate.STAGE_CONFIGS,
    )
    path = Path(config.output_dir)
    engine = _SharedEngine()
    try:
        for name, model in checkpoints.items():
            values = recipe | {"model": model, "output_dir": str(path / name)}
            evaluate.run(Section(values, section.lines, section.where), overwrite, dry_run, engine.open)
    finally:
        engine.close()
    if not dry_run:
        _finish(path, checkpoints)
    return path


def find_checkpoints(patterns: Sequence[str], where: str) -> dict[str, str]:
    """Return name -> folder of every checkpoint, in the order of the numbers in their names.

    Raises:
        RecipeError: a pattern matches no folder.
    """
    folders: list[str] = []
    for pattern in patterns:
        found = sorted((p for p in glob.glob(pattern) if Path(p).is_dir()), key=_natural) or [pattern]
        if found == [pattern] and glob.has_magic(pattern):
            raise RecipeError(f"{where}: `checkpoints`: no folder matches {pattern!r} (in {Path.cwd()}).")
        folders += [folder for folder in found if folder not in folders]
    names = [Path(folder).name for folder in folders]
    if len(set(names)) < len(names):
        names = [folder.strip("/").replace("/", "--") for folder in folders]
    return dict(zip(names, folders, strict=True))


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


class _SharedEngine:
    """One engine for all checkpoints: the first one opens it, the others swap their weights in."""

    def __init__(self):
        self._engine: Engine | None = None

    @contextmanager
    def open(self, config: EngineConfig) -> Iterator[Engine]:
        if self._engine is None:
            self._engine = evaluate.open_engine(config)
        else:
            self._engine.load_weights(config.model)
        yield self._engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


def _finish(path: Path, checkpoints: dict[str, str]) -> None:
    scores = {name: read_scores(path / name) for name in checkpoints}
    k = min(of["n"] for tasks in scores.values() for of in tasks.values())
    candidates = [_candidate(name, path / name, k) for name in checkpoints]
    selected, reasons = select_checkpoint(candidates)
    curve = [{"name": name, "model": model, "scores": scores[name]} for name, model in checkpoints.items()]
    write_atomic(path / SWEEP_FILE, json.dumps({"schema": SWEEP_SCHEMA, "checkpoints": curve}, indent=1) + "\n")
    chosen = {
        "schema": SWEEP_SCHEMA, "selected": selected, "model": checkpoints.get(selected or ""), "k": k, "rule": RULE,
        "checkpoints": [vars(one) | {"reason": reasons.get(one.name, "selected")} for one in candidates],
    }  # fmt: skip
    write_atomic(path / SELECTION_FILE, json.dumps(chosen, indent=1) + "\n")
    for one in candidates:
        print(
            f"{one.name}: pass@{k} {100 * one.pass_at_k:.1f}%, {one.mean_tokens:,.0f} tokens per sample: "
            f"{reasons.get(one.name, 'selected')}"
        )


def _candidate(name: str, folder: Path, k: int) -> Candidate:
    """Pool the problems of all tasks of one checkpoint."""
    rows = [row for _, row in read_rows(folder / PROBLEMS_FILE)]
    values = np.array([pass_at_k(row["n"], [row["correct"]], k)[0] for row in rows])
    return Candidate(
        name,
        float(values.mean()),
        new_problems_error(values) or 0.0,
        sum(row["mean_tokens"] for row in rows) / len(rows),
        sum(row["truncated"] for row in rows) / sum(row["n"] for row in rows),
    )
