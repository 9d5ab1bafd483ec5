"""The rows of a chain of filters as a stream: what came in, what left at each step and why, what stayed.

Drawn downwards, since a phone is narrow and a chain may be long: the width of the stream is the number of rows.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, STREAM = 360, 90  # px of the drawing, and of all rows that came in
TEXT = STREAM + 38  # where the words begin
LINE, GAP = 20, 14  # px of a line of text, and between two steps
REASONS = 5  # of a step; the others are one
LETTERS = 34  # that fit beside the stream


def flow(title: str, steps: Sequence[Mapping[str, Any]]) -> str:
    """Draw the steps of `steps.json`, top to bottom, as inline SVG in the page's own colours.

    Args:
        title: what a screen reader says.
        steps: `step`, `rows_in`, `kept` and `reasons` (reason -> rows) of each, in order.
    """
    scale = STREAM / max(1, steps[0]["rows_in"])
    parts: list[str] = []
    y = 0.0
    for number, step in enumerate(steps):
        drawn, y = _step(step, y, scale, f"--s{number % 7}")
        parts += drawn
    kept = steps[-1]["kept"]
    parts.append(_stream(0, y, kept * scale, LINE))
    parts.append(_text(TEXT, y + 15, f"{kept:,} rows kept", bold=True))
    return (
        f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {WIDTH} {y + LINE + 4:.0f}" '
        f'width="{WIDTH}" height="{y + LINE + 4:.0f}" font-size="12.5">{"".join(parts)}</svg>'
    )


def _step(step: Mapping[str, Any], y: float, scale: float, colour: str) -> tuple[list[str], float]:
    """Return the parts of one step that begins at height y, and the height where the next one begins."""
    reasons = _most(step["reasons"])
    parts = [_text(TEXT, y + 15, f"{step['step']}: {step['rows_in']:,} rows in", bold=True)]
    right, place, leaving = step["rows_in"] * scale, y + LINE + 4, []
    for reason, count in reasons:
        width = count * scale
        # a quarter turn: the outermost rows leave first, so that no two ribbons cross
        top, middle = place + max(0.0, (LINE - width) / 2), TEXT - 8
        leaving.append(
            f'<path d="M{right:.1f},{y:.1f} Q{right:.1f},{top:.1f} {middle},{top:.1f} V{top + max(width, 0.8):.1f} '
            f'Q{right - width:.1f},{top + max(width, 0.8):.1f} {right - width:.1f},{y:.1f} Z" '
            f'style="fill: var({colour}); opacity: 0.55"/>'
        )
        parts.append(_text(TEXT, top + max(width, 0.8) / 2 + 4.5, _cut(f"{count:,} {reason}"), reason))
        right, place = right - width, place + max(LINE, width + 4)
    bottom = place + GAP if reasons else y + LINE + GAP
    return [*leaving, _stream(0, y, step["kept"] * scale, bottom - y), *parts], bottom


def _most(reasons: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return the most frequent reasons, and the others as one."""
    found = sorted(reasons.items(), key=lambda item: -item[1])
    if len(found) <= REASONS:
        return found
    others = found[REASONS - 1 :]
    return [*found[: REASONS - 1], (f"for {len(others)} other reasons", sum(count for _, count in others))]


def _stream(x: float, y: float, width: float, height: float) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.8):.1f}" height="{height:.1f}" '
        'style="fill: var(--soft); opacity: 0.45"/>'
    )


def _text(x: float, y: float, text: str, full: str = "", bold: bool = False) -> str:
    tip = f"<title>{escape(full)}</title>" if full else ""
    weight = "; font-weight: 600" if bold else ""
    return f'<text x="{x}" y="{y:.1f}" style="fill: var(--ink){weight}">{tip}{escape(text)}</text>'


def _cut(text: str) -> str:
    return text if len(text) <= LETTERS else text[: LETTERS - 1].rstrip() + "…"
