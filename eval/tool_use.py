"""How a model used its tool: beside every score with tools, since the score alone does not tell a model that computes
from one that checks its answer at the end, or one that calls in vain.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any


def tool_use(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Count the calls in the rows of samples.jsonl that were drawn with tools.

    Returns:
        task -> `calls_per_sample` (calls that were run, a mean over all samples), `called` (share of samples with at
        least one attempt), `first_call` (mean position of the first attempt, in tokens of the completion, over the
        samples with one; None without), `failed` (share of the calls that were run which raised, timed out or came
        after the end of their session; None without), `malformed` (share of all attempts that could not be run; None
        without), `void_turns` and `interrupted` (shares of samples), `tool_limit` (share of samples that called on
        after they were told to answer).
    """
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("n_calls") is not None:
            by_task.setdefault(row["task"], []).append({name: row.get(name) for name in _NEEDED})
    return {task: _counts(of_task) for task, of_task in by_task.items()}


_NEEDED = (
    "n_calls", "n_failed", "n_malformed", "first_call_position", "void_turn", "interrupted", "finish_reason",
)  # fmt: skip


def _counts(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    calls = sum(row["n_calls"] for row in rows)
    malformed = sum(row["n_malformed"] for row in rows)
    positions = [row["first_call_position"] for row in rows if row["first_call_position"] is not None]
    return {
        "calls_per_sample": calls / len(rows),
        "called": len(positions) / len(rows),
        "first_call": sum(positions) / len(positions) if positions else None,
        "failed": sum(row["n_failed"] for row in rows) / calls if calls else None,
        "malformed": malformed / (calls + malformed) if calls + malformed else None,
        "void_turns": sum(bool(row["void_turn"]) for row in rows) / len(rows),
        "interrupted": sum(bool(row["interrupted"]) for row in rows) / len(rows),
        "tool_limit": sum(row["finish_reason"] == "tool_limit" for row in rows) / len(rows),
    }


def _shown(form: str, name: str) -> Callable[[Mapping[str, Any] | None], str]:
    return lambda use: "" if use is None or use[name] is None else form.format(use[name])


# What tables show of it: row -> text of a task's counts, empty without tools.
TOOL_FACTS: dict[str, Callable[[Mapping[str, Any] | None], str]] = {
    "calls per sample": _shown("{:.2f}", "calls_per_sample"),
    "samples that call": _shown("{:.1%}", "called"),
    "first call at token": _shown("{:,.0f}", "first_call"),
    "calls that fail": _shown("{:.1%}", "failed"),
    "malformed calls": _shown("{:.1%}", "malformed"),
}
