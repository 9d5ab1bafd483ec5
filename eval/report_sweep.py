"""What the report says of a sweep over checkpoints: the curve of each task, and which checkpoint was selected."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import report_figures as figures
from .scores import shown_metrics
from .sweep import SELECTION_FILE, SWEEP_FILE


def describe_sweeps(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the curves and the choice of every sweep in and below a folder."""
    for path in sorted(folder.rglob(SWEEP_FILE)):
        points = json.loads(path.read_text(encoding="utf-8"))["checkpoints"]
        chosen = json.loads((path.parent / SELECTION_FILE).read_text(encoding="utf-8"))
        names = [point["name"].rpartition("-")[2] for point in points]
        drawn = []
        for task in points[0]["scores"]:
            scores = [point["scores"][task] for point in points]
            solved = [name for name in shown_metrics(scores) if name.startswith("pass@")]
            series = {name: [of[name] for of in scores] for name in dict.fromkeys((solved[0], solved[-1]))}
            drawn.append(figures.curve_over(f"{task}, over checkpoints", names, series))
            lengths = {"tokens": [of["mean_tokens"] for of in scores]}
            drawn.append(figures.lines(f"{task}, mean tokens", range(len(names)), lengths, "checkpoint", "tokens"))
        name = str(path.parent.relative_to(folder)) if path.parent != folder else folder.resolve().name
        yield {"name": name, "chosen": chosen, "figures": drawn}
