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

import numpy as np

from ..core.errors import DataError


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
