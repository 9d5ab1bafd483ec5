"""The heat map of the report: how often each problem is solved, by every run, as inline SVG in the page's colours."""

from collections.abc import Mapping
from html import escape

COLUMNS, CELL, GAP = 30, 10, 6  # 30 cells of 11 px are one column of a phone
MOST_PROBLEMS = 300
FAINTEST = 0.18  # opacity of a problem that is solved once, so that it does not look like one that never is


def heat_map(title: str, runs: Mapping[str, Mapping[str, tuple[int, int]]]) -> str:
    """Draw a cell for each problem of each run, darker where more of its samples are right.

    Problems stand in the order of their mean share over the runs, hardest first; a block of rows has the same problems.
    Of more than 300 problems evenly spaced ones are drawn. A cell's tooltip names its problem and its counts.

    Args:
        title: of the figure.
        runs: run -> problem id -> (right samples, samples).
    """
    names = list(dict.fromkeys(name for problems in runs.values() for name in problems))
    shares = {name: [found[name][0] / found[name][1] for found in runs.values() if name in found] for name in names}
    names.sort(key=lambda name: (sum(shares[name]) / len(shares[name]), name))
    total = len(names)
    if total > MOST_PROBLEMS:
        names = [names[place * total // MOST_PROBLEMS] for place in range(MOST_PROBLEMS)]
    left = 14 if len(runs) > 1 else 0
    parts, y = [f'<text x="0" y="12" class="head">{escape(title)}</text>'], 22
    for start in range(0, len(names), COLUMNS):
        for number, found in enumerate(runs.values(), 1):
            if left:
                parts.append(f'<text x="0" y="{y + 9}">{number}</text>')
            for column, name in enumerate(names[start : start + COLUMNS]):
                if name in found:
                    parts.append(_cell(left + column * (CELL + 1), y, name, *found[name]))
            y += CELL + 1
        y += GAP
    parts += _legend(y, f"{MOST_PROBLEMS} of {total:,} problems" if total > MOST_PROBLEMS else f"{total:,} problems")
    y += 16
    for number, name in enumerate(runs, 1):
        if left:
            parts.append(f'<text x="0" y="{y + 12}">{number}  {escape(name)}</text>')
            y += 15
    width = left + COLUMNS * (CELL + 1)
    return (
        f'<svg role="img" aria-label="{escape(title)}" class="heat" width="{width}" height="{y + 4}" '
        f'viewBox="0 0 {width} {y + 4}" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _cell(x: float, y: float, name: str, right: int, samples: int) -> str:
    tip = f"<title>{escape(name)}: {right} of {samples}</title>"
    return f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" rx="1.5" {_fill(right / samples)}>{tip}</rect>'


def _fill(share: float) -> str:
    if not share:
        return 'fill="none" stroke="var(--soft)" stroke-width="0.8"'
    return f'fill="var(--s0)" fill-opacity="{FAINTEST + (1 - FAINTEST) * share:.2f}"'


def _legend(y: float, problems: str) -> list[str]:
    parts, x = [], 0
    for share, word in ((0.0, "never"), (0.5, "half"), (1.0, "always right")):
        parts.append(f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" rx="1.5" {_fill(share)}/>')
        parts.append(f'<text x="{x + CELL + 4}" y="{y + 9}">{word}</text>')
        x += 56 if share < 1 else 90
    return [*parts, f'<text x="{x}" y="{y + 9}">{problems}</text>']
