r"""Redundancy probe (2604.01702): delete a share of the reasoning steps at random, and train on what is left.

    - delete_steps: {share: 0.1}

No row is dropped. Chains that lose a tenth of their steps without loss for the student held redundant ones: the paper
reports a clear drop for gpt-oss-120b's chains and little or none for DeepSeek-R1's. How it drew the steps is not
published; drawing them by (seed, id, place) and the protection of the answer are choices of this project.

Control: the same chain of filters without this step, and `share: 0.1` on another teacher's data.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

from ..core.trajectory import content_hash
from .columns import source_names
from .reasoning_steps import Segmentation, reasoning_spans, step_spans
from .result import FilterResult, ShowProgress, bar_of
from .selection import mean

ANSWER_MARKS = ("\\boxed", "####", "<answer>")
READ_ROWS = 512


@dataclass
class StepDeletionConfig:
    """How much goes, and how steps are cut."""

    share: float = field(default=0.1, metadata={"help": "Share of the steps of each row, on average over rows."})
    segmentation: Segmentation = field(
        default="paragraph", metadata={"help": "How reasoning is cut into steps: paragraph, sentence or lcot2tree."}
    )
    min_step_chars: int = field(default=30, metadata={"help": "A shorter piece joins the step before it."})

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"`share` must be above 0 and below 1, got {self.share}")


def delete_steps(
    completion: list[dict], row_id: str, config: StepDeletionConfig, seed: int
) -> tuple[list[dict], int, int]:
    """Return the completion without some of its reasoning steps, how many it had, and how many are gone.

    The number deleted is share x steps rounded up or down at random, so that short chains lose their share on average
    too. Never deleted: the last step of all, and a step that holds a mark of the final answer.
    """
    spans = reasoning_spans(completion)
    steps: list[tuple[int, int, int]] = []  # (span, start, end)
    for number, span in enumerate(spans):
        text = (completion[span.message].get(span.key) or "")[span.start : span.end]
        cuts = step_spans(text, config.segmentation, config.min_step_chars)
        steps += [(number, span.start + start, span.start + end) for start, end in cuts]

    def text_of(step: tuple[int, int, int]) -> str:
        span = spans[step[0]]
        return completion[span.message][span.key][step[1] : step[2]]

    free = [i for i, step in enumerate(steps[:-1]) if not any(mark in text_of(step) for mark in ANSWER_MARKS)]
    chance = int(content_hash(seed, "delete_steps", row_id), 16) / 16**16
    count = math.floor(config.share * len(steps) + chance)
    gone = sorted(sorted(free, key=lambda i: content_hash(seed, "delete_steps", row_id, i))[:count])
    left = [dict(message) for message in completion]
    for i in reversed(gone):  # from the end, so that earlier places stay where they are
        number, start, _ = steps[i]
        span = spans[number]
        following = steps[i + 1]
        end = following[1] if following[0] == number else steps[i][2]
        text = left[span.message][span.key]
        left[span.message][span.key] = text[:start] + text[end:]
    return left, len(steps), len(gone)


def apply(
    table: Dataset, config: StepDeletionConfig, *, seed: int, cache_folder: Path, progress: ShowProgress | None
) -> FilterResult:
    """Replace `completion`; adds `n_steps_before` and `n_steps_deleted`. Ids stay, so that runs can be compared."""
    offsets, messages = [0], []
    before: list[int] = []
    deleted: list[int] = []
    columns = table.select_columns(["id", "completion"])
    with bar_of(progress, "delete_steps", len(table)) as bar:
        for start in range(0, len(table), READ_ROWS):
            batch = columns[start : start + READ_ROWS]
            for row_id, completion in zip(batch["id"], batch["completion"], strict=True):
                left, steps, gone = delete_steps(completion, row_id, config, seed)
                messages += [json.dumps(message, ensure_ascii=False) for message in left]
                offsets.append(len(messages))
                before.append(steps)
                deleted.append(gone)
            bar.advance(len(batch["id"]))
    completions = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(messages, pa.json_(pa.string())))
    sources = source_names(table)
    report = {
        "steps": sum(before),
        "deleted": sum(deleted),
        "share_deleted": sum(deleted) / sum(before) if sum(before) else None,
        "rows_untouched": deleted.count(0),
        "by_source": {
            name: {
                "rows": sources.count(name),
                "mean_steps": mean(n for n, source in zip(before, sources, strict=True) if source == name),
                "mean_deleted": mean(n for n, source in zip(deleted, sources, strict=True) if source == name),
            }
            for name in sorted(set(sources))
        },
    }
    scores = {"completion": completions, "n_steps_before": before, "n_steps_deleted": deleted}
    return FilterResult(scores, {}, report)
