"""The rollouts of a batch of prompts in training: driven together over all processes, graded, and chosen from."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset

from ..core.answer_extraction import find_answer
from ..core.errors import DataError
from ..core.grading import Grade, Grader
from ..core.progress import progress
from ..core.rollout import Rollout
from ..core.trajectory import content_hash, final_text
from .rl_losses import call_penalties, resample_on_correct

# What is measured of each rollout, in this order; `answer` is a hash of the final answer, 0 for none.
MEASURES = (
    "correct", "truncated", "void", "masked", "tokens", "calls", "failed", "malformed", "first_call", "interrupted",
    "tool_seconds", "answer",
)  # fmt: skip


@dataclass(frozen=True)
class GradedRollout:
    """A rollout and its verdict."""

    rollout: Rollout
    grade: Grade

    @property
    def truncated(self) -> bool:
        """Whether something else than the model ended it (TRL sees only whether the last token is an end token)."""
        return self.rollout.finish_reason != "stop"

    @property
    def correct(self) -> bool:
        """Whether it ended by itself, on the right answer."""
        return not self.truncated and self.grade.verdict == "correct"

    def measures(self, mask_truncated: bool, mask_void: bool) -> list[float]:
        """Return one number per name of `MEASURES`."""
        rollout, answer = self.rollout, self.grade.extracted
        return [
            self.correct,
            self.truncated,
            rollout.void_turn,
            (mask_truncated and self.truncated) or (mask_void and rollout.void_turn),
            rollout.n_model_tokens,
            rollout.n_calls,
            rollout.n_failed,
            rollout.n_malformed,
            rollout.first_call_position or 0,
            rollout.interrupted,
            rollout.tool_seconds,
            0 if answer is None else int(content_hash(answer), 16) >> 11,  # exact in a float64
        ]


def has_tools(row: dict[str, Any], tools: str) -> bool:
    """Say whether the rollouts of a row may call, by the recipe's key `tools` and the row's column."""
    return tools == "python" and ("tools" not in row or row["tools"] not in (None, [], "", "[]"))


def any_has_tools(table: Dataset, tools: str) -> bool:
    """Say whether any row of a table may call."""
    rows: Any = table.select_columns("tools") if "tools" in table.column_names else [{}]
    return any(has_tools(row, tools) for row in rows)


def gradable_rows(table: Dataset, grader: Grader, state: Any) -> Dataset:
    """Leave out, and count in a warning, the rows whose gold answer nothing can be graded against.

    Args:
        table: `id`, `prompt`, `answer`.
        grader: decides it.
        state: accelerate's, or None; the first process decides for all.

    Raises:
        DataError: a column is missing, or no row is left.
    """
    missing = {"id", "prompt", "answer"} - set(table.column_names)
    if missing:
        raise DataError(
            f"train_dataset: the column `{min(missing)}` is missing (columns: {', '.join(table.column_names)})."
        )
    found: list[Any] = [None]
    if state is None or state.is_main_process:
        with progress("check answers", len(table)) as bar:
            faults = []
            for gold in table["answer"]:
                faults.append("no answer" if gold is None else grader.check_gold(gold))
                bar.advance()
        found = [faults]
    if state is not None and state.num_processes > 1:
        broadcast_object_list(found)
    kept = [row for row, fault in enumerate(found[0]) if fault is None]
    if not kept:
        raise DataError(f"train_dataset: no answer can be graded ({found[0][0] if found[0] else 'no rows'}).")
    if len(kept) < len(table):
        row = next(row for row, fault in enumerate(found[0]) if fault is not None)
        warnings.warn(
            f"{len(table) - len(kept)} of {len(table)} prompts are left out, since their answer cannot be graded; the "
            f"first is {table[row]['id']!r}: {found[0][row]}.",
            stacklevel=4,
        )
    return table.select(kept)


def seed_of(*parts: Any) -> int:
    """Return a seed from 0 to 2^63 - 1 that depends on the parts alone."""
    return int(content_hash(*parts), 16) >> 1


def grade_rollouts(rollouts: Sequence[Rollout], golds: Sequence[str], grader: Grader) -> list[GradedRollout]:
    """Grade the last turn of each rollout; what a tool printed is never an answer.

    A last turn that calls a tool has none: its text before the call is no final answer.
    """
    texts = [final_text(r.messages) if r.finish_reason == "stop" else None for r in rollouts]
    grades = grader.grade_many(zip(texts, golds, strict=True))
    return [GradedRollout(rollout, grade) for rollout, grade in zip(rollouts, grades, strict=True)]


def choose_on_correct(group: Sequence[GradedRollout], keep: int, seed: int, extract: Any) -> list[GradedRollout]:
    """Choose `keep` rollouts of a prompt as GRPO-RoC does, see `rl_losses.resample_on_correct`."""
    rollouts = [graded.rollout for graded in group]
    turns = [[m.get("content") or "" for m in r.messages if m["role"] == "assistant"] for r in rollouts]
    answers = [sum(find_answer(text, extract)[0] is not None for text in said) for said in turns]
    penalties = call_penalties(
        np.array([r.n_calls + r.n_malformed for r in rollouts]),
        np.array([r.n_failed + r.n_malformed for r in rollouts]),
        np.array(answers),
        np.array([len(said) for said in turns]),
    )
    correct = np.array([graded.correct for graded in group])
    chosen = resample_on_correct(correct, penalties, keep, np.random.default_rng(seed))
    return [group[index] for index in chosen]


def summarise(measures: torch.Tensor, group: int) -> dict[str, float]:
    """Turn the measures of a global batch into the metrics that are logged.

    Args:
        measures: (rollouts, len(MEASURES)), groups in a row.
        group: rollouts of a prompt.
    """
    of = dict(zip(MEASURES, measures.double().unbind(1), strict=True))
    attempts = of["calls"] + of["malformed"]
    called = attempts > 0
    rates = of["correct"].view(-1, group).mean(1)
    # Of the wrong ones only: right ones are all the same, so that they tell how good a policy is, and not how varied.
    wrong = torch.where(of["correct"] > 0, 0.0, of["answer"]).view(-1, group).tolist()
    distinct, given = sum(len(set(row) - {0.0}) for row in wrong), sum(value != 0 for row in wrong for value in row)
    return {
        "rollouts/truncated": of["truncated"].mean().item(),
        "rollouts/void": of["void"].mean().item(),
        "rollouts/masked": of["masked"].mean().item(),
        "rollouts/interrupted": of["interrupted"].mean().item(),
        "rollouts/calls": attempts.mean().item(),
        "rollouts/with_calls": called.double().mean().item(),
        "rollouts/call_error_rate": ((of["failed"] + of["malformed"]).sum() / attempts.sum().clamp(min=1)).item(),
        "rollouts/first_call": of["first_call"][called].mean().item() if called.any() else 0.0,
        "rollouts/tool_seconds": of["tool_seconds"].mean().item(),
        "groups/all_correct": (rates == 1).double().mean().item(),
        "groups/all_wrong": (rates == 0).double().mean().item(),
        "groups/distinct_wrong": distinct / given if given else 1.0,
    }
