"""Figures of the report as inline SVG, drawn in the page's own colours so that they follow its light and dark mode."""

import io
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that stand in for variables of the page's style sheet: matplotlib needs real ones while it draws.
INK, FAINT = "#010101", "#020202"
SERIES = tuple(f"#0300{number:02x}" for number in range(8))
VARIABLES = {INK: "--ink", FAINT: "--line"} | {colour: f"--s{number}" for number, colour in enumerate(SERIES)}

SERIES_SHOWN = 8
WIDTH, HEIGHT = 3.7, 2.9  # inches at 96 px: one column of a phone
STYLE: dict[Any, Any] = {
    "font.size": 8.5, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.grid": True, "grid.color": FAINT,
    "grid.linewidth": 0.6, "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.8,
    "svg.fonttype": "none", "xtick.major.size": 0, "ytick.major.size": 0, "axes.titlesize": 9,
    "axes.titlelocation": "left", "figure.constrained_layout.use": True,
}  # fmt: skip


def pass_at_k_curves(title: str, runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw pass@k over k with its interval as a band for each run, and maj@k as a dashed line."""
    figure, axes = _start(title)
    sizes: set[int] = set()
    for colour, (label, scores) in zip(_colours(len(runs)), runs.items(), strict=True):
        k, found = _curve(scores, "pass@")
        sizes |= set(k)
        value, low, high = ([100 * of[key] for of in found] for key in ("value", "low", "high"))
        axes.fill_between(k, low, high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(k, value, color=colour, marker="o", markersize=3.5, label=label)
        voted, votes = _curve(scores, "maj@")
        if voted:
            axes.plot(voted, [100 * of["value"] for of in votes], color=colour, linestyle=(0, (3, 2)), linewidth=1.2)
    axes.set_xscale("log", base=2)
    ticks = sorted(sizes)[:: max(1, len(sizes) // 7)]
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 100)
    axes.set(xlabel="k samples", ylabel="% solved")
    return _finish(figure, axes, title, legend=len(runs) > 1)


def _curve(scores: Mapping[str, Any], prefix: str) -> tuple[list[int], list[Mapping[str, float]]]:
    names = [name for name in scores if name.startswith(prefix)]
    return [int(name.removeprefix(prefix)) for name in names], [scores[name] for name in names]


def solve_rates(title: str, runs: Mapping[str, Sequence[tuple[int, int]]]) -> str:
    """Draw how many problems are solved how often: (right, samples) of each problem, for each run.

    The first and the last bar hold only problems that are never and always solved.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _start(title)
    most = max(samples for pairs in runs.values() for _, samples in pairs)
    last = most if most <= 10 else 11  # a bar for each possible share where there are few, else ten between the ends
    width = 0.84 / len(runs)
    for number, (colour, (label, pairs)) in enumerate(zip(_colours(len(runs)), runs.items(), strict=True)):
        counts = np.bincount([_bar(right, samples, last) for right, samples in pairs], minlength=last + 1)
        left = np.arange(last + 1) - 0.42 + number * width
        axes.bar(left, counts, width, align="edge", color=colour, label=label)
    axes.set_xticks([0, last / 2, last], ["never", "half", "always"])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="share of samples that are right", ylabel="problems")
    return _finish(figure, axes, title, legend=len(runs) > 1)


def _bar(right: int, samples: int, last: int) -> int:
    if right in (0, samples):
        return last if right else 0
    return right if samples == last else min(max(math.ceil(right / samples * (last - 1)), 1), last - 1)


def histogram(title: str, edges: Sequence[float], counts: Mapping[str, Sequence[int]], what: str = "rows") -> str:
    """Draw counts in bins, one outline per group."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _start(title)
    for colour, (label, of_group) in zip(_colours(len(counts)), counts.items(), strict=True):
        axes.stairs(of_group, edges, color=colour, fill=True, alpha=0.13)
        axes.stairs(of_group, edges, color=colour, linewidth=1.4, label=label)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(ylabel=what)
    return _finish(figure, axes, title, legend=len(counts) > 1)


OUTCOMES = {"right": SERIES[2], "wrong": SERIES[7], "cut off": SERIES[5], "no verdict": SERIES[4]}


def outcomes(title: str, edges: Sequence[float], counts: Mapping[str, Sequence[int]], xlabel: str) -> str:
    """Draw a histogram of samples whose bars are stacked by outcome: `counts` is outcome -> counts in the bins."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _start(title)
    base = np.zeros(len(edges) - 1)
    for outcome, of_outcome in counts.items():
        top = base + np.asarray(of_outcome)
        axes.stairs(top, edges, baseline=base, color=OUTCOMES[outcome], fill=True, alpha=0.75, label=outcome)
        base = top
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel=xlabel, ylabel="samples")
    return _finish(figure, axes, title)


def few(groups: dict[str, list[int]]) -> dict[str, list[int]]:
    """Keep the largest groups of a histogram, and add up the others."""
    order = sorted(groups, key=lambda name: -sum(groups[name]))
    if len(order) <= SERIES_SHOWN:
        return groups
    kept = {name: groups[name] for name in order[: SERIES_SHOWN - 1]}
    rest = [groups[name] for name in order[SERIES_SHOWN - 1 :]]
    return kept | {f"{len(rest)} others": [sum(column) for column in zip(*rest, strict=True)]}


def curve_over(title: str, names: Sequence[str], series: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Draw scores with intervals over checkpoints, in equal steps; `series` is metric -> one interval for each."""
    figure, axes = _start(title)
    places = range(len(names))
    for colour, (label, found) in zip(_colours(len(series)), series.items(), strict=True):
        value, low, high = ([100 * of[key] for of in found] for key in ("value", "low", "high"))
        axes.fill_between(places, low, high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(places, value, color=colour, marker="o", markersize=3.5, label=label)
    step = max(1, len(names) // 6)
    axes.set_xticks(list(places)[::step], list(names)[::step])
    axes.set_ylim(0, 100)
    axes.set(xlabel="checkpoint", ylabel="% solved")
    return _finish(figure, axes, title, legend=len(series) > 1)


def lines(title: str, x: Sequence[float], series: Mapping[str, Sequence[float]], xlabel: str, ylabel: str) -> str:
    """Draw quantities over time."""
    figure, axes = _start(title)
    for colour, (label, y) in zip(_colours(len(series)), series.items(), strict=True):
        axes.plot(x, y, color=colour, label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return _finish(figure, axes, title, legend=len(series) > 1)


def differences(title: str, labels: Sequence[str], intervals: Sequence[tuple[float, float, float]]) -> str:
    """Draw differences with their intervals, one line each, beside a line at zero.

    Args:
        title: of the figure.
        labels: one per line.
        intervals: (difference, low, high) of each line, as shares.
    """
    figure, axes = _start(title)
    figure.set_size_inches(WIDTH, 0.9 + 0.42 * len(labels))
    axes.axvline(0, color=INK, linewidth=0.9)
    for place, (label, interval) in enumerate(zip(labels, intervals, strict=True)):
        value, low, high = (100 * share for share in interval)
        axes.plot([low, high], [place, place], color=SERIES[0], solid_capstyle="butt")
        axes.plot(value, place, color=SERIES[0], marker="o", markersize=5)
        axes.text(0, place - 0.2, label, transform=axes.get_yaxis_transform(), va="bottom", fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.85)
    axes.set_yticks([])
    axes.set(xlabel="points, 95% interval")
    return _finish(figure, axes, title, legend=False)


def sorted_changes(title: str, changes: Sequence[float]) -> str:
    """Draw the change of every problem (shares of its samples) as a bar, from the largest gain to the largest loss."""
    figure, axes = _start(title)
    values = 100 * np.sort(np.asarray(changes, dtype=float))[::-1]
    places = np.arange(1, len(values) + 1)
    for colour, chosen in ((SERIES[2], values > 0), (SERIES[7], values < 0)):
        axes.bar(places[chosen], values[chosen], width=1.0, color=colour)
    axes.axhline(0, color=INK, linewidth=0.9)
    axes.set_xlim(0.4, len(values) + 0.6)
    axes.set(xlabel="problems", ylabel="points")
    return _finish(figure, axes, title, legend=False)


def bands(title: str, series: Mapping[str, Sequence[tuple[int, float, float, float]]], xlabel: str, ylabel: str) -> str:
    """Draw curves with their intervals over log(1 + x): (x, value, low, high) of each point of each series."""
    figure, axes = _start(title)
    ticks: set[int] = set()
    for colour, (label, points) in zip(_colours(len(series)), series.items(), strict=True):
        x, value, low, high = (np.array(column) for column in zip(*points, strict=True))
        ticks |= set(x.tolist())
        axes.fill_between(np.log1p(x), low, high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(np.log1p(x), value, color=colour, marker="o", markersize=3.5, label=label)
    axes.set_xticks([math.log1p(x) for x in sorted(ticks)], [str(x) for x in sorted(ticks)])
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return _finish(figure, axes, title)


def points(title: str, found: Mapping[str, Sequence[tuple[float, float, float]]], xlabel: str, ylabel: str) -> str:
    """Draw two quantities of each run against each other, (value, low, high) each."""
    figure, axes = _start(title)
    for colour, (label, (x, y)) in zip(_colours(len(found)), found.items(), strict=True):
        x_error, y_error = ([[of[0] - of[1]], [of[2] - of[0]]] for of in (x, y))
        axes.errorbar(
            x[0], y[0], yerr=y_error, xerr=x_error, color=colour, marker="o", markersize=4, linewidth=1.2, label=label
        )
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return _finish(figure, axes, title)


def fitted(
    title: str,
    measured: Sequence[Sequence[float]],
    curves: Mapping[str, Sequence[Sequence[float]]],
    xlabel: str,
    ylabel: str,
) -> str:
    """Draw measured points (x, y) and the curves fitted to them, (x, value, low, high) each, over log x."""
    figure, axes = _start(title)
    x, y = np.array(measured).T
    axes.plot(x, y, color=INK, marker="o", markersize=3, linestyle="", alpha=0.5, label="measured")
    for colour, (label, points) in zip(_colours(len(curves)), curves.items(), strict=True):
        at, value, low, high = np.array(points).T
        axes.fill_between(at, low, high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(at, value, color=colour, label=label)
    axes.set_xscale("log")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return _finish(figure, axes, title)


def ledger(title: str, groups: Mapping[str, np.ndarray]) -> str:
    """Draw the loss of samples by epoch: the median of each group, and the middle 80% as a band.

    Args:
        title: of the figure.
        groups: label -> losses, (samples, epochs), NaN where unseen.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _start(title)
    for colour, (label, losses) in zip(_colours(len(groups)), groups.items(), strict=True):
        seen = ~np.isnan(losses).all(axis=0)
        epochs = np.flatnonzero(seen) + 1
        low, middle, high = np.nanquantile(losses[:, seen], [0.1, 0.5, 0.9], axis=0)
        axes.fill_between(epochs, low, high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(epochs, middle, color=colour, marker="o", markersize=3.5, label=f"{label} ({len(losses):,})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylim(bottom=0)
    axes.set(xlabel="epoch", ylabel="loss per sample (nats per token)")
    return _finish(figure, axes, title)


def trajectories(title: str, groups: Mapping[str, np.ndarray]) -> str:
    """Draw the loss of single samples by epoch, one line each, one colour per group.

    Args:
        title: of the figure.
        groups: label -> losses, (samples, epochs), NaN where unseen.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _start(title)
    for colour, (label, losses) in zip(_colours(len(groups)), groups.items(), strict=True):
        for number, row in enumerate(losses):
            axes.plot(range(1, len(row) + 1), row, color=colour, linewidth=1.2, label=None if number else label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel="epoch", ylabel="loss (nats per token)")
    return _finish(figure, axes, title)


def _colours(count: int) -> list[str]:
    return [SERIES[number % len(SERIES)] for number in range(count)]


def _start(title: str) -> "tuple[Figure, Axes]":
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT))
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_title(title, fontweight="bold")
    return figure, axes


def _finish(figure: "Figure", axes: "Axes", name: str, legend: bool = True) -> str:
    """Return the SVG; `name` is what a screen reader says."""
    from matplotlib import rc_context

    with rc_context({**STYLE, "svg.hashsalt": "afterglow"}):
        if legend:
            handles, labels = axes.get_legend_handles_labels()
            columns = 1 if max(map(len, labels)) > 24 else 2
            figure.legend(handles, labels, loc="outside lower left", ncols=columns, handlelength=1.2, columnspacing=1.2)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _for_the_page(out.getvalue(), name)


def _for_the_page(svg: str, name: str) -> str:
    """Make an SVG part of a page: the page's colours and font, sizes in px, ids that no other figure has."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r'(width|height)="([\d.]+)pt"', lambda m: f'{m[1]}="{float(m[2]) * 96 / 72:.0f}"', svg, count=2)
    svg = re.sub(r"font-family: [^;\"]*;?|font: (?:bold )?([\d.]+px) [^;\"]*", _font, svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(id="|#)([mp][0-9a-f]{10})\b', rf"\1\2-{zlib.crc32(svg.encode()):x}", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(name)}" ', 1)


def _font(match: re.Match[str]) -> str:
    if match[1] is None:
        return ""
    weight = "; font-weight: 600" if "bold" in match[0] else ""
    return f"font-size: {match[1]}{weight}"
