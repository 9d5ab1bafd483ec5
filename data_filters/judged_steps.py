"""Let a language model label reasoning steps, to see what the keywords of `branching` are worth. Drops no row.

    - judge_steps: {server_url: http://localhost:8000, judge_model: Qwen/Qwen3-32B, rows: 200}

A sample of rows is cut into steps as `branching` cuts them, and each step gets one of five labels. The branch paper
(2604.01702) labelled with DeepSeek-V3.2; of its classes two are known, Propose and Deduce (33.3 % and 62.0 % of the
steps of DeepSeek-R1, 22.5 % and 74.6 % of those of gpt-oss-120b; a step after a proposal is one with probability 0.53
and 0.34). The other labels and the prompt are ours.

The report holds these shares by source, and precision and recall of the keyword classes against the judge. A judge
errs too: read some of `labels.jsonl` before you mend keywords by it.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from ..core.run_folder import write_atomic
from .branching import BACKTRACK_KEYWORDS, BRANCH_KEYWORDS, VERIFY_KEYWORDS, keyword_matcher
from .columns import source_names, values_of
from .judge import Judge, Outcome, default_folder
from .reasoning_steps import Segmentation, reasoning_text, split_steps
from .result import FilterResult, ShowProgress
from .selection import mean, seeded_order

LABELS = ("propose", "deduce", "verify", "backtrack", "conclude")
KEYWORD_CLASSES = {"propose": "branch_keywords", "backtrack": "backtrack_keywords", "verify": "verify_keywords"}
STEP_CHARS = 1200  # of a step shown to the judge: its head and tail
_JSON_LIST = re.compile(r"\[[^\[\]]*\]")

PROMPT = """You label the steps of someone's reasoning about a problem. Labels:

propose: starts a new idea, approach, case or hypothesis that differs from the line of thought before it
deduce: carries the current line of thought on: computes, derives, restates, applies
verify: checks a result or a step that was made before
backtrack: recognises that something before is wrong or leads nowhere, and takes it back
conclude: states the result

A step that does several of these gets the label of its main purpose. Judge each step by its meaning, never by single
words such as "wait" or "maybe".

{before}Steps to label:
{steps}

Reply with a JSON list of {count} labels, one for each step in order, and nothing else."""


@dataclass
class JudgedStepsConfig:
    """Which judge, and how many rows."""

    server_url: str = field(metadata={"help": "OpenAI-compatible server; its key stands in OPENAI_API_KEY."})
    judge_model: str = field(metadata={"help": "The judge's name at that server."})
    rows: int = field(default=200, metadata={"help": "Rows to label, drawn by `seed`."})
    steps_per_request: int = field(default=20, metadata={"help": "Steps that one question shows."})
    timeout: float = field(default=120.0, metadata={"help": "Seconds for one try."})
    tries: int = field(default=3, metadata={"help": "How often a question is asked before its steps go unlabelled."})
    concurrency: int = field(default=16, metadata={"help": "Questions in flight at once."})
    max_tokens: int = field(default=2048, metadata={"help": "Tokens of a reply, thinking included."})
    judge_cache: str | None = field(
        default=None, metadata={"help": "Folder of judgements that runs share; default: `judge` in AFTERGLOW_CACHE."}
    )
    segmentation: Segmentation = field(
        default="paragraph", metadata={"help": "How reasoning is cut into steps: paragraph, sentence or lcot2tree."}
    )
    min_step_chars: int = field(default=30, metadata={"help": "A shorter piece joins the step before it."})
    branch_keywords: list[str] = field(
        default_factory=lambda: list(BRANCH_KEYWORDS), metadata={"help": "Compared with `propose`."}
    )
    backtrack_keywords: list[str] = field(
        default_factory=lambda: list(BACKTRACK_KEYWORDS), metadata={"help": "Compared with `backtrack`."}
    )
    verify_keywords: list[str] = field(
        default_factory=lambda: list(VERIFY_KEYWORDS), metadata={"help": "Compared with `verify`."}
    )

    def __post_init__(self):
        for key in ("rows", "steps_per_request", "tries", "concurrency", "max_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"`{key}` must be at least 1, got {getattr(self, key)}")
        if not self.timeout > 0:
            raise ValueError(f"`timeout` is in seconds, above 0, got {self.timeout}")
        if not self.server_url.startswith(("http://", "https://")):
            raise ValueError(f"`server_url` must start with http:// or https://, got {self.server_url!r}")


class Question(NamedTuple):
    """Some successive steps of a row: steps `start` to `start + size`."""

    row: int
    start: int
    size: int
    prompt: str


def questions_of(row: int, steps: Sequence[str], per_request: int) -> list[Question]:
    """Cut a row's steps into questions; each shows the step before its first, unlabelled."""
    made = []
    for start in range(0, len(steps), per_request):
        part = steps[start : start + per_request]
        before = f"The step before:\n{_shown(steps[start - 1])}\n\n" if start else ""
        listed = "\n".join(f"{n}. {_shown(step)}" for n, step in enumerate(part, 1))
        made.append(Question(row, start, len(part), PROMPT.format(before=before, steps=listed, count=len(part))))
    return made


def _shown(step: str) -> str:
    text = " ".join(step.split())
    return text if len(text) <= STEP_CHARS else f"{text[: STEP_CHARS // 2]} [...] {text[-STEP_CHARS // 2 :]}"


def read_labels(reply: str, count: int) -> list[str] | None:
    """Return the labels of a reply: its last JSON list, if that holds `count` known labels; else None."""
    for found in reversed(_JSON_LIST.findall(reply)):
        try:
            labels = json.loads(found)
        except json.JSONDecodeError:
            continue
        labels = [str(label).strip().lower() for label in labels]
        return labels if len(labels) == count and all(label in LABELS for label in labels) else None
    return None


def precision_recall(found: Sequence[bool], true: Sequence[bool]) -> dict[str, float | int | None]:
    """Return `precision`, `recall` (None where they are not defined) and the counts they come from."""
    both = sum(f and t for f, t in zip(found, true, strict=True))
    return {
        "precision": both / sum(found) if any(found) else None,
        "recall": both / sum(true) if any(true) else None,
        "found": sum(found),
        "true": sum(true),
        "both": both,
    }


def apply(
    table: Dataset, config: JudgedStepsConfig, *, seed: int, cache_folder: Path, progress: ShowProgress | None
) -> FilterResult:
    """Label the steps of a sample of rows; adds `judged_propose_ratio`, writes `labels.jsonl`, drops nothing.

    Raises:
        GenerationError: the judge cannot be reached, refuses, or answers nothing.
    """
    ids = values_of(table, "id")
    sample = sorted(seeded_order(range(len(table)), ids, seed, "judge_steps")[: config.rows])
    chosen = table.select(sample)
    steps = {
        row: split_steps(reasoning_text(completion), config.segmentation, config.min_step_chars)
        for row, completion in zip(sample, chosen["completion"], strict=True)
    }
    questions = [question for row in sample for question in questions_of(row, steps[row], config.steps_per_request)]
    judge = Judge(
        config.server_url, config.judge_model, Path(config.judge_cache) if config.judge_cache else default_folder(),
        config.timeout, config.tries, config.concurrency, config.max_tokens,
    )  # fmt: skip
    verdicts = judge.ask(
        [question.prompt for question in questions],
        lambda i, reply: read_labels(reply, questions[i].size),
        progress,
    )
    labels: dict[int, list[str | None]] = {row: [None] * len(steps[row]) for row in sample}
    for question, verdict in zip(questions, verdicts, strict=True):
        if verdict.value is not None:
            labels[question.row][question.start : question.start + question.size] = verdict.value
    lines = [
        json.dumps({"id": ids[row], "step": n, "label": label, "text": text}, ensure_ascii=False) + "\n"
        for row in sample
        for n, (label, text) in enumerate(zip(labels[row], steps[row], strict=True))
    ]
    write_atomic(cache_folder / "labels.jsonl", "".join(lines))
    ratios: list[float | None] = [None] * len(table)
    for row, own in labels.items():
        ratios[row] = mean(float(label == "propose") for label in own if label is not None)
    sources = dict(zip(sample, source_names(chosen), strict=True))
    outcomes: Counter[Outcome] = Counter(verdict.outcome for verdict in verdicts)
    return FilterResult({"judged_propose_ratio": ratios}, {}, _report(steps, labels, sources, outcomes, config))


def _report(
    steps: dict[int, list[str]],
    labels: dict[int, list[str | None]],
    sources: dict[int, str],
    outcomes: "Counter[Outcome]",
    config: JudgedStepsConfig,
) -> dict[str, Any]:
    pairs = [
        (label, step.lower())
        for row, own in labels.items()
        for label, step in zip(own, steps[row], strict=True)
        if label is not None
    ]
    against = {}
    for label, key in KEYWORD_CLASSES.items():
        matches = keyword_matcher(getattr(config, key))
        against[key] = precision_recall([matches(step) for _, step in pairs], [own == label for own, _ in pairs])
    return {
        "judge": config.judge_model,
        "rows": len(labels),
        "questions": dict(sorted(outcomes.items())),
        "steps": sum(map(len, steps.values())),
        "steps_labelled": len(pairs),
        "keywords_against_the_judge": against,
        "by_source": {
            name: _shares([labels[row] for row in labels if sources[row] == name])
            for name in sorted(set(sources.values()))
        },
    }


def _shares(rows: list[list[str | None]]) -> dict[str, Any]:
    """Shares of the labels, and how often a proposal follows a proposal."""
    counts = Counter(label for row in rows for label in row if label is not None)
    after = [
        follower == "propose"
        for row in rows
        for label, follower in pairwise(row)
        if label == "propose" and follower is not None
    ]
    total = counts.total()
    return {
        "steps": total,
        "shares": {label: counts[label] / total if total else None for label in LABELS},
        "propose_after_propose": sum(after) / len(after) if after else None,
    }
