"""Which checkpoint of a training to go on with: the one that solves most without being longer than it need be.

While a model learns from chains, its loss falls on when what it learns has long turned into noise (TRICE, arXiv
2605.06326, selects by pass@k and response length). The paper gives no numbers: the rule is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

LONGEST = 1.15  # times the shortest mean length among the candidates
MOST_TRUNCATED = 0.05
RULE = (
    "No checkpoint with more than 5% truncated samples. Of the others, the candidates are within one standard error "
    "(over problems) of the best pass@k; of these, those with at most 1.15 times the shortest mean length; of these, "
    "the best pass@k, ties to the shorter, then to the earlier. TRICE (arXiv 2605.06326) selects by pass@k and length; "
    "the numbers are ours."
)


@dataclass(frozen=True)
class Candidate:
    """What the choice of a checkpoint looks at; `error` is the standard error of pass@k over problems."""

    name: str
    pass_at_k: float
    error: float
    mean_tokens: float
    truncated: float


def select_checkpoint(candidates: Sequence[Candidate]) -> tuple[str | None, dict[str, str]]:
    """Choose the checkpoint to go on with by pass@k and length; `RULE` says how.

    Args:
        candidates: in the order of training.

    Returns:
        Its name, None where all are rejected, and name -> why each other one is not chosen.
    """
    reasons: dict[str, str] = {}
    kept: list[Candidate] = []
    for one in candidates:
        if one.truncated > MOST_TRUNCATED:
            reasons[one.name] = f"{one.truncated:.1%} of its samples are truncated"
        else:
            kept.append(one)
    if not kept:
        return None, reasons
    best = max(kept, key=lambda one: one.pass_at_k)
    near = [one for one in kept if one.pass_at_k >= best.pass_at_k - best.error]
    shortest = min(one.mean_tokens for one in near)
    short = [one for one in near if one.mean_tokens <= LONGEST * shortest]
    chosen = max(short, key=lambda one: (one.pass_at_k, -one.mean_tokens))
    for one in kept:
        if one not in near:
            reasons[one.name] = f"more than one standard error below {best.name}"
        elif one not in short:
            reasons[one.name] = f"{one.mean_tokens / shortest:.2f} times as long as the shortest candidate"
        elif one is not chosen:
            reasons[one.name] = "a candidate, but not the best"
    return chosen.name, reasons
