"""What the report says of scaling fits: a table of the laws, the points, and the curves with their bands."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import report_figures as figures
from .report_results import Run
from .scaling import SCALING_FILE, backtest_text, forecast_text, parameters_text


def describe_scaling(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """Yield one entry per fitted curve of all finished runs with `suite: scaling`."""
    for run in runs:
        found = run.json(SCALING_FILE) if run.manifest.get("suite") == "scaling" else None
        for name, curve in (found or {"curves": {}})["curves"].items():
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
