"""`suite: scaling`: fit a score's growth with compute, from any file of rows, and forecast no further than it may.

    suite: scaling                      output_dir: runs/scaling
    curves: {scalerl: runs/rlvr/heldout.jsonl}
    compute: step                       score: pass@1
    start: 0.31                         extrapolate_to: 20000

writes `scaling.json` (points, parameters with intervals, bands, tests of the forecast) and `scores.json`. Procedure of
arXiv 2510.13786 (appendices A.4 to A.8) with the hygiene of arXiv 2410.11840: R_0 is measured and not fitted, the cut
of the first points is part of the recipe, all checkpoints count, and each forecast stands beside one whose outcome is
known.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from ..core.errors import DataError, RecipeError
from ..core.recipe import plain
from ..core.row_sources import read_rows
from ..core.run_folder import RunFolder, write_atomic
from .scaling_law import FEWEST, Fit, Law, PowerLaw, Sigmoid, backtest, fit_law, least_squares, refusals
from .suite_base import SCORES_FILE

SCALING_FILE = "scaling.json"
SCALING_SCHEMA = 1
CUT = 0.1
"""Share of the points that is dropped from the start where the recipe says nothing (arXiv 2410.11840, section 5)."""
SAME = 0.02
"""Asymptotes closer than this share of the highest score are the same (arXiv 2510.13786: three seeds within 0.015)."""
BAND_POINTS = 60


@dataclass(kw_only=True)
class ScalingConfig:
    """Which curves, and how they are fitted."""

    output_dir: str = field(metadata={"help": "Folder of this run."})
    suite: str = field(metadata={"help": "scaling."})
    curves: dict[str, str] = field(
        metadata={"help": "Name -> file of rows (.jsonl, .jsonl.gz), such as metrics.jsonl."}
    )
    score: str = field(metadata={"help": "Column of the score: of held-out problems, not the training reward."})
    compute: str = field(default="step", metadata={"help": "Column of the compute: steps, tokens, FLOPs, GPU hours."})
    group: str | None = field(default=None, metadata={"help": "Column that tells the curves of one file apart."})
    law: list[Literal["sigmoid", "power"]] = field(
        default_factory=lambda: ["sigmoid", "power"],
        metadata={"help": "sigmoid: a score that rises to a ceiling; power: also losses and proxies."},
    )
    start: float | None = field(
        default=None,
        metadata={
            "help": "Score before training, by the same evaluation; default: that at compute 0. For the sigmoid."
        },
    )
    highest: float | None = field(
        default=1.0, metadata={"help": "Largest score there can be: 1, 100 for percent, null for a loss."}
    )
    from_compute: float | None = field(
        default=None, metadata={"help": "Leave out points below; default: the first tenth of the points."}
    )
    extrapolate_to: float | None = field(
        default=None, metadata={"help": "Compute to forecast; refused where the points do not carry it."}
    )
    draws: int = field(default=400, metadata={"help": "Of the bootstrap."})
    seed: int = field(default=0, metadata={"help": "Of the bootstrap."})

    def __post_init__(self):
        if not self.law or not self.curves:
            raise RecipeError("curves and law name at least one each")
        if self.draws < 20:
            raise RecipeError(f"draws is {self.draws}: an interval needs at least 20")
        if "sigmoid" in self.law and self.highest is None:
            raise RecipeError("highest is null: a sigmoid needs a largest score. For a loss use `law: power`")
        if self.extrapolate_to is not None and self.extrapolate_to <= 0:
            raise RecipeError(f"extrapolate_to is {self.extrapolate_to}: use a positive compute")


@dataclass(frozen=True)
class Curve:
    """The points of one run, in the order of compute, without what lies before the cut."""

    compute: np.ndarray
    score: np.ndarray
    start: float | None
    dropped: int
    every: tuple[np.ndarray, np.ndarray]  # compute and score, nothing dropped


def run(config: ScalingConfig, overwrite: bool = False, dry_run: bool = False) -> Path:
    """Fit all curves of a recipe and return the run's folder.

    Raises:
        RecipeError: a key or value is wrong.
        DataError: a file has no such columns, a score is out of range, or a curve has too few points.
    """
    path = Path(config.output_dir)
    inputs: dict[str, str | list[str]] = {**config.curves}
    if dry_run:
        if not overwrite:
            RunFolder.check(path, "eval", plain(config), inputs=inputs)
        print(yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
        for name, curve in read_curves(config).items():
            print(f"{name}: {len(curve.score)} points, {curve.dropped} before the cut. Nothing was written.")
        return path
    curves = read_curves(config)
    extra = {"suite": "scaling", "seed": config.seed}
    with RunFolder.open(path, "eval", plain(config), inputs=inputs, overwrite=overwrite, extra=extra) as folder:
        if not folder.finished:
            found = describe(config, curves)
            write_atomic(path / SCALING_FILE, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
            scores = {"scaling": _scores(found)}
            write_atomic(path / SCORES_FILE, json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
            folder.finish(scores)
    show(json.loads((path / SCALING_FILE).read_text(encoding="utf-8")), path)
    return path


def read_curves(config: ScalingConfig) -> dict[str, Curve]:
    """Read the points of every curve; of two rows at one compute the later one counts, as after a resume.

    Raises:
        DataError: names file and row.
    """
    points: dict[str, dict[float, float]] = {}
    columns: set[str] = set()
    for name, file in config.curves.items():
        for where, row in read_rows(file):
            columns |= row.keys()
            compute, score = row.get(config.compute), row.get(config.score)
            if compute is None or score is None:
                continue
            compute, score = _number(where, config.compute, compute), _number(where, config.score, score)
            if compute < 0:
                raise DataError(f"{where}: `{config.compute}` is {compute:g}; compute is not negative")
            if config.highest is not None and score > config.highest:
                raise DataError(
                    f"{where}: `{config.score}` is {score:g}, above `highest: {config.highest:g}`. Set `highest: 100` "
                    "for percent, `highest: null` with `law: power` for a loss."
                )
            part = row.get(config.group) if config.group else None
            label = name if part is None else str(part) if len(config.curves) == 1 else f"{name}/{part}"
            points.setdefault(label, {})[compute] = score
    if not points:
        lacking = [key for key in (config.compute, config.score) if key not in columns]
        what = f"no column {lacking[0]!r}" if lacking else "no row that has both columns"
        raise DataError(
            f"{', '.join(config.curves.values())}: {what}. Columns: {', '.join(sorted(columns)) or 'none'}."
        )
    return {label: _curve(config, label, of) for label, of in points.items()}


def _number(where: str, column: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise DataError(f"{where}: `{column}` is {value!r}, not a finite number")
    return float(value)


def _curve(config: ScalingConfig, label: str, points: dict[float, float]) -> Curve:
    start = points.pop(0.0, None) if config.start is None else config.start
    points.pop(0.0, None)
    if "sigmoid" in config.law and start is None:
        raise DataError(
            f"{label}: no row at `{config.compute}` 0. Give the score before training, measured alike: `start: 0.31`. "
            "It is not fitted."
        )
    if "sigmoid" in config.law and config.highest is not None and start is not None and start >= config.highest:
        raise DataError(f"{label}: it starts at {start:g}, the highest score; there is nothing to gain")
    compute = np.array(sorted(points))
    score = np.array([points[at] for at in compute])
    below = int(CUT * len(compute)) if config.from_compute is None else int((compute < config.from_compute).sum())
    if len(compute) - below < FEWEST:
        raise DataError(
            f"{label}: {len(compute) - below} points with `{config.compute}` and `{config.score}` after the cut of "
            f"{below}; a fit needs {FEWEST}. Evaluate more checkpoints, or lower `from_compute`."
        )
    return Curve(compute[below:], score[below:], start, below, (compute, score))


def _law(name: str, config: ScalingConfig, curve: Curve) -> Law:
    if name == "power":
        return PowerLaw(float(np.exp(np.log(curve.compute).mean())), config.highest)
    assert curve.start is not None and config.highest is not None  # checked when it was read
    return Sigmoid(curve.start, config.highest)


def describe(config: ScalingConfig, curves: dict[str, Curve]) -> dict[str, Any]:
    """Return what scaling.json holds."""
    found: dict[str, Any] = {"schema": SCALING_SCHEMA, "compute": config.compute, "score": config.score, "curves": {}}
    fits: dict[str, Fit] = {}
    for name, curve in curves.items():
        laws = {}
        for law_name in config.law:
            fit = fit_law(
                _law(law_name, config, curve), curve.compute, curve.score, draws=config.draws, seed=config.seed
            )
            laws[law_name] = _describe_fit(config, curve, fit)
            if law_name == "sigmoid":
                fits[name] = fit
        found["curves"][name] = {
            "points": [list(pair) for pair in zip(curve.compute.tolist(), curve.score.tolist(), strict=True)],
            "start": curve.start,
            "dropped": curve.dropped,
            "laws": laws,
        }
    found["common_ceiling"] = common_ceiling(fits, SAME * (config.highest or 1)) if len(fits) > 1 else None
    return found


def _describe_fit(config: ScalingConfig, curve: Curve, fit: Fit) -> dict[str, Any]:
    parameters = fit.parameters()
    tested = backtest(fit.law, curve.compute, curve.score, draws=config.draws, seed=config.seed)
    first, last = float(curve.compute[0]), float(curve.compute[-1])
    to, forecast, refused = config.extrapolate_to, None, []
    if to is not None:
        refused = refusals(fit, parameters, to, tested)
        if not refused:
            value, low, high = fit.band(np.array([to]))[:, 0].tolist()
            forecast = {"compute": to, "value": value, "low": low, "high": high}
    grid = np.geomspace(first, max(last, to or last) if forecast else last, BAND_POINTS)
    return {
        "parameters": parameters,
        "rmse": fit.rmse,
        "band": [list(point) for point in zip(grid.tolist(), *fit.band(grid).tolist(), strict=True)],
        "backtest": tested,
        "windows": _windows(fit.law, curve),
        "forecast": forecast,
        "refused": refused,
    }


def _windows(law: Law, curve: Curve) -> list[dict[str, Any]]:
    """Fit other windows of the points: with and without the cut, all and the first half of the compute."""
    compute, score = curve.every
    found = []
    for begin in dict.fromkeys((float(curve.compute[0]), float(compute[0]))):
        for end in (float(compute[-1]), float(compute[-1]) / 2):
            inside = (compute >= begin) & (compute <= end)
            if inside.sum() >= FEWEST:
                shown = law.shown(least_squares(law, compute[inside], score[inside]))
                found.append({"from": begin, "to": end, "points": int(inside.sum())} | shown)
    return found


def common_ceiling(fits: dict[str, Fit], same: float) -> dict[str, Any]:
    """Compare the efficiency of runs: refit with A fixed to their mean, then compare B (arXiv 2510.13786, A.7).

    Args:
        fits: run -> its sigmoid.
        same: ceilings that lie no further apart count as the same.

    Returns:
        `A`, whether the ceilings are the `same`, and `runs` with B and C_mid at that ceiling.
    """
    ceilings = [float(fit.theta[0]) for fit in fits.values()]
    mean = float(np.mean(ceilings))
    runs = {}
    for name, fit in fits.items():
        shown = fit.law.shown(least_squares(fit.law, fit.compute, fit.score, mean))
        runs[name] = {key: shown[key] for key in ("B", "C_mid")}
    return {"A": mean, "same": max(ceilings) - min(ceilings) <= same, "runs": runs}


def _scores(found: dict[str, Any]) -> dict[str, Any]:
    """Return what fits a table: parameters and forecasts, with their intervals."""
    scores: dict[str, Any] = {}
    method = "block bootstrap; asymptote: hull with its profile"
    for name, curve in found["curves"].items():
        for law, of in curve["laws"].items():
            scores |= {f"{name} {law} {key}": {**value, "method": method} for key, value in of["parameters"].items()}
            if of["forecast"]:
                ends = {end: of["forecast"][end] for end in ("value", "low", "high")}
                scores[f"{name} {law} at {of['forecast']['compute']:g}"] = {**ends, "method": "block bootstrap"}
    return scores


def show(found: dict[str, Any], folder: Path) -> None:
    """Print parameters, tests and forecasts of every curve."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("curve", "law", "parameters, 95% interval", "rmse", "second half from the first", "forecast")
    for name, curve in found["curves"].items():
        for law, of in curve["laws"].items():
            table.add_row(name, law, parameters_text(of), f"{of['rmse']:.3g}", backtest_text(of), forecast_text(of))
    console.print(table)
    print(f"fits: {folder / SCALING_FILE}")


def parameters_text(of: dict[str, Any]) -> str:
    """Say the parameters of a law with their intervals."""
    return ", ".join(f"{key} {v['value']:.4g} [{v['low']:.4g}, {v['high']:.4g}]" for key, v in of["parameters"].items())


def backtest_text(of: dict[str, Any]) -> str:
    """Say how a forecast with a known outcome did."""
    tested = of["backtest"]
    if tested is None:
        return "too few points"
    return f"rmse {tested['rmse']:.3g}, {tested['inside']:.0%} of {tested['points']} in the interval"


def forecast_text(of: dict[str, Any]) -> str:
    """Say the forecast, or why there is none."""
    if of["forecast"] is None:
        return f"refused: {'; '.join(of['refused'])}" if of["refused"] else "–"
    return "{value:.4g} [{low:.4g}, {high:.4g}] at {compute:g}".format(**of["forecast"])
