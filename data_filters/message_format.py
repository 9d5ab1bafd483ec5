"""Drop rows whose form would teach a bad habit: no reasoning where it is wanted, no answer, no end, endless repetition.

    - format: {reasoning: required, answer: boxed, max_repetition: 0.3}

Every rule has its own reason, the first that fails is given. Whether the answer is right is for `grade` to say.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from ..core.answer_extraction import after_think, last_boxed
from ..core.trajectory import final_text
from .columns import source_names
from .reasoning_steps import reasoning_text
from .result import FilterResult, ShowProgress, bar_of
from .selection import histogram, mean
from .text_match import assistant_text

READ_ROWS = 512
REPEATED_WORDS = 20  # shorter runs come back in sound reasoning: "the number of ways to choose"
THOUGHT_MARKS = ("<think>", "</think>", "<|channel|>analysis")
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")


@dataclass
class FormatConfig:
    """What a sound row looks like."""

    reasoning: Literal["any", "required", "forbidden"] = field(
        default="any",
        metadata={"help": "Marked reasoning (a think block or a field of its own) in the last turn. required: it is "
                          "there, closed and not empty. forbidden: there is none."},
    )  # fmt: skip
    answer: Literal["any", "text", "boxed"] = field(
        default="text",
        metadata={"help": "What follows the reasoning in the last turn. text: something. boxed: a \\boxed{...}."},
    )
    finished: bool = field(
        default=True,
        metadata={"help": "Drop what was cut off (`finish_reason` is not stop or null), a call without its result, "
                          "and a conversation that does not end with the assistant."},
    )  # fmt: skip
    max_repetition: float | None = field(
        default=None,
        metadata={"help": "Largest share of 20-word runs that stood before (`repetition`); loops are above 0.5."},
    )

    def __post_init__(self):
        if self.max_repetition is not None and not 0 <= self.max_repetition < 1:
            raise ValueError(f"`max_repetition` must be from 0 to below 1, got {self.max_repetition}")


def repetition(text: str, n: int = REPEATED_WORDS) -> float:
    """Return the share of the runs of n words that stood before; 0 for a text of fewer words."""
    words = text.split()
    runs = [hash(tuple(words[start : start + n])) for start in range(len(words) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def fault(completion: list[dict[str, Any]], finish_reason: str | None, config: FormatConfig) -> str | None:
    """Say which rule a row breaks, or None."""
    if config.finished and (broken := _unfinished(completion, finish_reason)):
        return broken
    last = next((m for m in reversed(completion) if m["role"] == "assistant"), {"role": "assistant", "content": ""})
    text = final_text(completion)
    own = next((last[key] for key in THOUGHT_KEYS if isinstance(last.get(key), str)), None)
    in_text = any(mark in text for mark in THOUGHT_MARKS)
    marked = own is not None or in_text
    rest = after_think(text)
    if config.reasoning == "required":
        if not marked:
            return "no marked reasoning"
        if rest is None:
            return "reasoning never closes"
        if not (own or (reasoning_text([last]) if in_text else "")).strip():
            return "empty reasoning"
    if config.reasoning == "forbidden" and marked:
        return "marked reasoning"
    if config.answer != "any" and not (rest or "").strip():
        return "no answer after the reasoning" if marked else "no answer"
    if config.answer == "boxed" and last_boxed(rest or "") is None:
        return "no boxed answer"
    return None


def _unfinished(completion: list[dict[str, Any]], finish_reason: str | None) -> str | None:
    if finish_reason not in (None, "stop"):
        return f"finish_reason is {finish_reason}"
    calls = sum(len(message.get("tool_calls") or ()) for message in completion)
    if calls > sum(message["role"] == "tool" for message in completion):
        return "a tool call without its result"
    return None if completion[-1]["role"] == "assistant" else f"ends with a message of the {completion[-1]['role']}"


def apply(
    table: Dataset, config: FormatConfig, *, seed: int, cache_folder: Path, progress: ShowProgress | None
) -> FilterResult:
    """Drop rows that break a rule; adds `repetition` where `max_repetition` is set."""
    dropped: dict[int, str] = {}
    repeated: list[float] = []
    columns = table.select_columns(["completion", "finish_reason"])
    with bar_of(progress, "format", len(table)) as bar:
        for start in range(0, len(table), READ_ROWS):
            batch = columns[start : start + READ_ROWS]
            for row, (completion, end) in enumerate(
                zip(batch["completion"], batch["finish_reason"], strict=True), start
            ):
                found = fault(completion, end, config)
                if config.max_repetition is not None:
                    repeated.append(repetition(assistant_text(completion)))
                    if found is None and repeated[-1] > config.max_repetition:
                        found = f"repeats itself (repetition {repeated[-1]:.3f})"
                if found:
                    dropped[row] = found
            bar.advance(len(batch["completion"]))
    if not repeated:
        return FilterResult({}, dropped, {})
    report = {"mean_repetition": mean(repeated), "histogram": histogram(repeated, source_names(table))}
    return FilterResult({"repetition": repeated}, dropped, report)
