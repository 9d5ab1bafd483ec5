import xml.etree.ElementTree as ET

import pytest

from afterglow.eval.report_flow import REASONS, STREAM, flow

STEPS = [
    {"step": "grade", "rows_in": 100, "kept": 100, "reasons": {}},
    {"step": "length", "rows_in": 100, "kept": 60, "reasons": {"fewer than 3 words": 10, "more than 9 words": 30}},
    {"step": "random", "rows_in": 60, "kept": 45, "reasons": {"drawn at random": 15}},
]


def drawn(steps):
    svg = ET.fromstring(flow("rows", steps))
    return svg, [float(r.get("width")) for r in svg.iter("rect")], ["".join(t.itertext()) for t in svg.iter("text")]


def ribbons(svg):
    """Width at the stream and height at the words of each path, in order."""
    for path in svg.iter("path"):
        numbers = [point.strip("MQVZ").split(",") for point in path.get("d").split()]
        xs = [float(n[0]) for n in numbers if len(n) == 2]
        yield xs[0] - xs[-1]


def test_widths_are_rows():
    svg, streams, said = drawn(STEPS)
    assert streams == pytest.approx([STREAM * share for share in (1.0, 0.6, 0.45, 0.45)], abs=0.05)
    assert list(ribbons(svg)) == pytest.approx([STREAM * share for share in (0.3, 0.1, 0.15)], abs=0.11)
    assert said[:2] == ["grade: 100 rows in", "length: 100 rows in"]
    assert said[2].endswith("30 more than 9 words") and said[-1] == "45 rows kept"


def test_many_and_hostile_reasons():
    reasons = {f"reason <b>{n}</b> & more": 10 - n for n in range(REASONS + 3)}
    svg, streams, said = drawn([{"step": "<i>", "rows_in": 100, "kept": 0, "reasons": reasons}])
    assert len(list(svg.iter("path"))) == REASONS and said[0] == "<i>: 100 rows in"
    assert said[REASONS].endswith("for 4 other reasons") and f"{10 - 4 + 10 - 5 + 10 - 6 + 10 - 7} for" in said[REASONS]
    assert all(0 < width <= STREAM for width in streams)
    long, _, said = drawn([{"step": "s", "rows_in": 2, "kept": 1, "reasons": {"x" * 90: 1}}])
    assert "…" in said[1] and "x" * 90 in said[1], "cut, and whole as a tip"
    height = float(long.get("height"))
    assert all(float(t.get("y")) < height for t in long.iter("text"))
