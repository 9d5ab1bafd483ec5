"""How fast forgotten knowledge comes back: one curve in, three numbers out (our choice; no paper fixes them).

    gain(k)     = m_k - m_0                      m: a metric of the forget set, k: steps of fine-tuning
    recovery(k) = (m_k - m_0) / (m_full - m_0)   m_full: the model before it unlearned
    area        = mean of recovery over log(1 + k): a step at the beginning counts for more than one at the end
    half        = steps until half of the knowledge is back

A model that never saw the forget set learns from fine-tuning too: only what exceeds the retrained model's curve was
still there.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core.errors import DataError
from .uncertainty import mean_over_seeds

CURVES_FILE = "curves.jsonl"
UNLEARNED = "unlearned"  # name of the attacked model where the recipe names one only
ORIGINAL, RETRAINED = "original", "retrained"  # arms that are no attack on an unlearned model


def recovery(values: Sequence[float] | np.ndarray, full: float) -> np.ndarray:
    """Return (steps,) the share of the lost knowledge that is back, of a curve whose first value is the start.

    Args:
        values: (steps,) metric after each number of steps, the first one before any.
        full: the metric of the model before it unlearned.

    Raises:
        DataError: nothing was lost: the share has no meaning.
    """
    curve = np.asarray(values, dtype=float)
    if full - curve[0] <= 1e-9:
        raise DataError(
            f"at its start the attack meets a model that knows as much of the forget set ({curve[0]:.4g}) as the model "
            f"before unlearning ({full:.4g}): nothing was forgotten, so nothing can be relearned"
        )
    return (curve - curve[0]) / (full - curve[0])


def area_over_log_steps(steps: Sequence[int], values: Sequence[float] | np.ndarray) -> float:
    """Return the mean height of a curve over log(1 + steps), by trapezoids; steps begin at 0 and increase."""
    x = np.log1p(np.asarray(steps, dtype=float))
    return float(np.trapezoid(np.asarray(values, dtype=float), x) / (x[-1] - x[0]))


def steps_to_reach(steps: Sequence[int], values: Sequence[float] | np.ndarray, target: float) -> float:
    """Return the steps at which a curve first reaches a target, linear in log(1 + steps); infinity if it never does."""
    curve, x = np.asarray(values, dtype=float), np.log1p(np.asarray(steps, dtype=float))
    reached = np.flatnonzero(curve >= target)
    if not len(reached):
        return math.inf
    i = int(reached[0])
    if i == 0:
        return float(steps[0])
    share = (target - curve[i - 1]) / (curve[i] - curve[i - 1])
    return float(np.expm1(x[i - 1] + share * (x[i] - x[i - 1])))


def robustness(gain_unlearned: float, gain_retrained: float) -> float:
    """min(gain of the retrained model / gain of the unlearned one, 1): open-unlearning's R (2506.12618, section 4.2).

    1: fine-tuning teaches the unlearned model no more than one that never knew. Where the unlearned model gains
    nothing it is 1.
    """
    return 1.0 if gain_unlearned <= 0 else min(max(gain_retrained, 0.0) / gain_unlearned, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# scores


def relearning_scores(rows: Sequence[dict[str, Any]], steps: Sequence[int], metric: str) -> dict[str, Any]:
    """Return the numbers of every kind of attack, each a mean over seeds with its interval, and beside the control.

    Args:
        rows: those of curves.jsonl.
        steps: after which the models were measured.
        metric: which of the metrics.
    """
    full = next(row[metric] for row in rows if row["arm"] == ORIGINAL)
    groups: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for row in rows:
        if row["arm"] != ORIGINAL:
            group, _, seed = row["arm"].rpartition("/")
            groups.setdefault(group, {}).setdefault(seed, {})[row["step"]] = row
    scores: dict[str, Any] = {"original": {"value": full, "low": full, "high": full, "method": "one measurement"}}
    for group, arms in groups.items():
        model, _, attack = group.partition("/")
        label = f"{model}_{attack.replace('/', '_')}"
        curves = [[arms[seed][step][metric] for step in steps] for seed in arms]
        scores[f"{label}_start"] = _over_seeds([curve[0] for curve in curves])
        scores[f"{label}_end"] = _over_seeds([curve[-1] for curve in curves])
        control = groups.get(f"{RETRAINED}/{attack}") if model != RETRAINED else None
        theirs = [[control[seed][step][metric] for step in steps] for seed in arms] if control else []
        gains = [(ours[-1] - ours[0], other[-1] - other[0]) for ours, other in zip(curves, theirs, strict=False)]
        if gains:
            scores[f"{label}_robustness"] = _over_seeds([robustness(*gain) for gain in gains])
        if any(full <= curve[0] for curve in curves):
            scores[f"{label}_note"] = "it knows as much as the original from the start: nothing can be relearned"
            continue
        shares = [recovery(curve, full) for curve in curves]
        halves = [steps_to_reach(steps, share, 0.5) for share in shares]
        scores |= {
            f"{label}_recovery": _over_seeds([share[-1] for share in shares]),
            f"{label}_area": _over_seeds([area_over_log_steps(steps, share) for share in shares]),
            f"{label}_steps_to_half": [None if math.isinf(half) else half for half in halves],
        }
        if theirs and all(other[0] < full for other in theirs):
            areas = [
                area_over_log_steps(steps, share) - area_over_log_steps(steps, recovery(other, full))
                for share, other in zip(shares, theirs, strict=True)
            ]
            scores[f"{label}_area_above_control"] = _over_seeds(areas)
    return scores


def _over_seeds(values: Sequence[float]) -> dict[str, Any]:
    return vars(mean_over_seeds(values)).copy()


def curve_points(rows: Sequence[dict[str, Any]], metric: str) -> dict[str, list[tuple[int, float, float, float]]]:
    """Return for each group of arms (step, mean, low, high) over its seeds, for figures."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["arm"] != ORIGINAL:
            found.setdefault(row["arm"].rpartition("/")[0], {}).setdefault(row["step"], []).append(row[metric])
    points = {}
    for group, by_step in found.items():
        intervals = {step: mean_over_seeds(values) for step, values in by_step.items()}
        points[group] = [(step, i.value, i.low, i.high) for step, i in sorted(intervals.items())]
    return points
