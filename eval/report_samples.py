"""What the report says of single samples: lengths and calls by outcome, and some to read, in one pass over the rows."""

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core.row_sources import read_rows
from ..core.trajectory import prompt_text
from . import report_figures as figures
from .report_ledger import cut

EXAMPLES = 3  # of each kind, per run and task
KINDS = ("right", "wrong", "cut off", "no verdict")
BINS = 24
FOLDED = 400  # characters of working before the answer that stay open


@dataclass
class TaskSamples:
    """The samples of one run and task, by their kind.

    Attributes:
        tokens: kind -> tokens of each sample.
        calls: kind -> calls of each sample; empty without tools.
        first_calls: kind -> position of the first call in tokens, of each sample that calls.
        chosen: kind -> a few samples to read, with the hash that chose them.
    """

    tokens: dict[str, list[int]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    calls: dict[str, list[int]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    first_calls: dict[str, list[int]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    chosen: dict[str, list[tuple[int, dict[str, Any]]]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def add(self, row: dict[str, Any]) -> None:
        """Count one row of samples.jsonl."""
        kind = kind_of(row)
        for name, kept in (
            ("n_tokens", self.tokens),
            ("n_calls", self.calls),
            ("first_call_position", self.first_calls),
        ):
            if row.get(name) is not None:
                kept[kind].append(row[name])
        found = self.chosen[kind]
        found.append((zlib.crc32(row["id"].encode()), row))
        found.sort(key=lambda item: item[0])
        del found[EXAMPLES:]


def kind_of(row: Mapping[str, Any]) -> str:
    """Return how a sample ended: a right one is right even where it was cut off after its answer."""
    if row["correct"]:
        return "right"
    if row.get("finish_reason") == "length":
        return "cut off"
    return "wrong" if row["correct"] is False else "no verdict"


def read_samples(path: Path) -> dict[str, TaskSamples]:
    """Return task -> its samples of a samples.jsonl, nothing where there is no file."""
    tasks: dict[str, TaskSamples] = {}
    if path.exists():
        for _, row in read_rows(path):
            tasks.setdefault(row.get("task") or row.get("group") or "samples", TaskSamples()).add(row)
    return tasks


# ---------------------------------------------------------------------------------------------------------------------
# lengths and calls


def sample_figures(runs: Mapping[str, TaskSamples]) -> list[str]:
    """Draw how long the samples of each run are, and how often and how early they call, by outcome."""
    several = len(runs) > 1
    drawn = []
    for what, xlabel in (("tokens", "tokens"), ("calls", "calls"), ("first_calls", "first call at token")):
        values = {name: getattr(of, what) for name, of in runs.items()}
        found = [value for by_kind in values.values() for of_kind in by_kind.values() for value in of_kind]
        if not found:
            continue
        edges = _edges(found)
        for name, by_kind in list(values.items())[: figures.SERIES_SHOWN]:
            counts = {kind: np.histogram(of_kind, edges)[0].tolist() for kind, of_kind in by_kind.items() if of_kind}
            if counts:
                title = f"{xlabel}: {name}" if several else xlabel
                drawn.append(figures.outcomes(title, edges, counts, f"{xlabel}, each sample"))
    return drawn


def _edges(values: list[int]) -> list[float]:
    """Bins of whole numbers, as wide as it takes to need at most 24."""
    low, high = min(values), max(values)
    step = max(1, -(-(high - low + 1) // BINS))
    return [low - 0.5 + step * place for place in range((high - low) // step + 2)]


# ---------------------------------------------------------------------------------------------------------------------
# samples to read


def examples(samples: TaskSamples) -> Iterator[dict[str, Any]]:
    """Yield a few samples of each kind."""
    for kind in KINDS:
        for _, row in samples.chosen[kind]:
            yield {"kind": kind, **_example(row)}


def _example(row: Mapping[str, Any]) -> dict[str, Any]:
    said = row["completion"]
    last = max((place for place, message in enumerate(said) if message["role"] == "assistant"), default=-1)
    read = [row.get("extracted") if place == last else None for place in range(len(said))]
    return {
        "problem_id": row["problem_id"], "problem": cut(prompt_text(row["prompt"])),
        "turns": [_turn(message, answer) for message, answer in zip(said, read, strict=True)],
        "gold": row.get("answer"), "extracted": row.get("extracted"), "reason": row.get("reason"),
        "tokens": row.get("n_tokens"), "sample_index": row.get("sample_index"),
    }  # fmt: skip


def _turn(message: Mapping[str, Any], answer: str | None) -> dict[str, Any]:
    thought, closed, rest = (message.get("content") or "").rpartition("</think>")
    text = (rest if closed else thought or rest).strip()
    thought = thought.replace("<think>", "").strip() if closed else ""
    text = cut(text)
    before, found, after = mark_answer(text, answer)
    if not thought and found and len(before) > FOLDED:
        line = before.rfind("\n") + 1  # a chain without a think block: all but the line of its answer is working
        thought, before = before[:line].rstrip(), before[line:]
    calls = [call["function"]["arguments"] for call in message.get("tool_calls") or []]
    return {
        "role": message["role"], "thought": cut(thought), "before": before, "answer": found, "after": after,
        "calls": [cut(str(of.get("code", of)) if isinstance(of, dict) else str(of)) for of in calls],
    }  # fmt: skip


def mark_answer(text: str, answer: str | None) -> tuple[str, str, str]:
    r"""Split a text into what stands before its graded answer, the answer, and what follows; in a box where it has one.

    Where the answer is not found as it was read, all is before.
    """
    if answer:
        place = text.rfind(f"boxed{{{answer}}}")
        if place >= 0:
            place += len("boxed{")
        elif found := list(re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", text)):
            place = found[-1].start()
        if place >= 0:
            return text[:place], answer, text[place + len(answer) :]
    return text, "", ""
