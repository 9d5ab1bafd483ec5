"""What the report says of scaling fits (laws, points, curves with bands) and of the diagnostics of checkpoints."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import report_figures as figures
from .proxy_metrics import SHOWN
from .report_results import Run
from .scaling import SCALING_FILE, backtest_text, forecast_text, parameters_text
from .suite_base import ROWS_FILE


def describe_scaling(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """Yield one entry per fitted curve of all finished runs with `suite: scaling`."""
    for run in runs:
        found = run.json(SCALING_FILE)
        if found is None:
            continue
        for name, curve in found["curves"].items():
            yield {
                "name": f"{run.name}: {name}",
                "laws": [
                    {
                        "name": law, "parameters": parameters_text(of), "rmse": f"{of['rmse']:.3g}",
                        "backtest": backtest_text(of), "forecast": forecast_text(of),
                    }
                    for law, of in curve["laws"].items()
                ],
                "figure": _figure(name, curve, found["compute"], found["score"]),
            }  # fmt: skip


def _figure(name: str, curve: Mapping[str, Any], compute: str, score: str) -> str:
    bands = {law: of["band"] for law, of in curve["laws"].items()}
    return figures.fitted(name, curve["points"], bands, compute.replace("_", " "), score.replace("_", " "))


def describe_diagnostics(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """Yield one table of checkpoints, and its curves, for each finished run with `suite: diagnostics`."""
    for run in runs:
        if run.manifest.get("suite") != "diagnostics" or not run.manifest["finished"]:
            continue
        rows = [json.loads(line) for line in (run.path / ROWS_FILE).read_text(encoding="utf-8").splitlines()]
        keys = [key for key in SHOWN if all(row.get(key) is not None for row in rows)]
        steps, shown = [row["step"] for row in rows], {}
        for group in ("rankme", "pathway"):
            series = {key.replace("_", " "): [row[key] for row in rows] for key in keys if key.startswith(group)}
            if series and len(rows) > 1:
                shown[group] = figures.lines(
                    {"rankme": "RankMe", "pathway": "pathways"}[group], steps, series, "step", ""
                )
        yield {
            "name": run.name,
            "metrics": [key.replace("_", " ") for key in keys],
            "rows": [{"name": row["key"], "cells": [f"{row[key]:.4g}" for key in keys]} for row in rows],
            "trajectories": rows[0]["trajectories"], "sequences": rows[0]["sequences"],
            "dimensions": rows[0]["dimensions"], "enough": rows[0]["enough"],
            "figures": list(shown.values()),
        }  # fmt: skip
