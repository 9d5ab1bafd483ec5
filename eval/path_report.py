"""The audit of path dependence in the terminal: its eight parts, numbered as in docs/methods/unlearning.md."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .path_dependence import AUDIT_FILE

UNTOLD = "not told from the noise of seeds"


def depth_text(depth: Mapping[str, Any]) -> str:
    """Say how deep a path forgot."""
    return depth["label"] if depth["index"] is None else f"{depth['label']} ({depth['index']:.2f})"


def divergence_text(pair: Mapping[str, Any]) -> str:
    """Say how far two paths are apart at the start and at the end, and how fast that grows."""
    growth = pair["growth_rate"]
    rate = "" if growth is None else f", log D grows by {growth:+.3g} a step"
    return f"{' / '.join(pair['paths'])}: {pair['curve'][0]:.3g} to {pair['curve'][-1]:.3g}{rate}"


def spread_text(point: Mapping[str, Any]) -> str:
    """Say how far apart the paths are in one metric at one step, and whether that is more than seeds do."""
    test = UNTOLD if point["p_value"] is None else (
        f"path over seed variance F = {point['ratio']:.2f}, p = {point['p_value']:.3g}"
    )  # fmt: skip
    return f"{point['spread']:.3f} ({test})"


def further_parts(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the parts of a method's audit that are no column of a table: (title, text)."""
    for pair in found["divergence"]:
        yield "3 divergence D", divergence_text(pair)
    for name, points in found["spread"].items():
        widest = max(points, key=lambda point: point["spread"])
        most = f"widest {widest['spread']:.3f} at step {widest['step']}"
        yield "4 spread", f"{name.replace('_', ' ')}: {spread_text(points[-1])}; {most}"
    index = found["recency_index"]
    yield "6 recency index", (
        "none (fewer than three paths, or all alike)" if index is None
        else f"{index:+.2f} (-1: the later it was learned, the slower it is forgotten)"
    )  # fmt: skip


def show(found: Mapping[str, Any], folder: Path) -> None:
    """Print the eight parts for every method."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for method, of in found.items():
        start = Table("path", title=f"{method}, 1 before unlearning (log-probability): {folder}", title_justify="left")
        names = list(next(iter(of["initial_state"].values())))
        for name in names:
            start.add_column(name.replace("_", " "), justify="right")
        for path, state in of["initial_state"].items():
            start.add_row(path, *(f"{state[name]:.3f}" for name in names))
        values = of["initial_state"].values()
        start.add_row("largest - smallest", *(f"{_range(state[name] for state in values):.3f}" for name in names))
        console.print(start)

        end = Table("path", title=f"{method}, after {of['steps'][-1]} steps", title_justify="left")
        names = list(next(iter(of["outcome"].values())))
        columns = [f"2 {name.replace('_', ' ')}" for name in names]
        for name in (*columns, "5 steps to target", "7 depth", "8 distance to retrained"):
            end.add_column(name, justify="right")
        for path, outcome in of["outcome"].items():
            steps, distances = of["steps_to_target"][path], of["retrained_distance"]
            end.add_row(
                path, *(f"{outcome[name]:.3f}" for name in names), "never" if steps is None else f"{steps:.1f}",
                depth_text(of["depth"][path]),
                "no control" if distances is None else f"{distances[path][-1]['distance']:.3g}",
            )  # fmt: skip
        console.print(end)
        for title, text in further_parts(of):
            console.print(f"{title}, {text}", highlight=False)
    print(f"audit: {folder / AUDIT_FILE}")


def _range(values: Any) -> float:
    values = list(values)
    return max(values) - min(values)
