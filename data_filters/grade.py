"""Label every row: does its final answer equal the gold answer?

    - grade: {extract: marked}

Fills `correct` (true, false, null for not gradable), `grade_reason` and `extracted_answer`. A label that came with the
file moves to `correct_in_file`; every row where it differs from ours is listed in `disagreements.jsonl` beside the
grades.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from datasets import Dataset

from ..core.answer_extraction import Extract
from ..core.errors import DataError
from ..core.grading import Grade, Grader
from ..core.run_folder import JsonlLog, write_atomic
from ..core.trajectory import MAX_ERRORS_SHOWN, final_text
from .columns import source_names, values_of
from .result import FilterResult, ShowProgress, bar_of
from .selection import count_by

FILLS = ("correct", "correct_in_file", "grade_reason", "extracted_answer")
READ_ROWS = 512


@dataclass
class GradeConfig:
    """How answers are found and compared; see `core/grading.py`."""

    kind: Literal["math", "choice", "numeric"] = field(
        default="math", metadata={"help": "math: exact, then symbolic. choice: a letter. numeric: within tolerance."}
    )
    extract: Extract = field(
        default="boxed",
        metadata={
            "help": "Where the answer stands: boxed; marked (also <answer>, ####, 'the answer is'); last (or a number)."
        },
    )
    workers: int = field(default=2, metadata={"help": "Processes for symbolic comparison."})
    timeout: float = field(default=5.0, metadata={"help": "Seconds for one symbolic comparison."})
    rel_tol: float = field(default=1e-2, metadata={"help": "Largest distance relative to gold, for `numeric`."})
    abs_tol: float = field(default=0.0, metadata={"help": "Largest distance to gold, for `numeric`."})
    drop_ungradable: bool = field(default=False, metadata={"help": "Drop rows without a verdict."})

    def __post_init__(self):
        self.grader().close()  # checks the values; starts no process

    def grader(self) -> Grader:
        """Return a new grader of this configuration."""
        return Grader(
            self.kind, extract=self.extract, workers=self.workers, timeout=self.timeout, rel_tol=self.rel_tol,
            abs_tol=self.abs_tol,
        )  # fmt: skip


def check(table: Dataset, config: GradeConfig, filled: Iterable[str] = ()) -> None:
    """Refuse gold answers that nothing can be graded against.

    Raises:
        DataError: names up to 20 rows and what is wrong with their `answer`.
    """
    rows: dict[str | None, list[str]] = {}
    for row_id, gold in zip(values_of(table, "id"), values_of(table, "answer"), strict=True):
        rows.setdefault(gold, []).append(row_id)
    with config.grader() as grader:
        faults = [(gold, fault) for gold in rows if (fault := grader.check_gold(gold))]
    if not faults:
        return
    shown = "\n  ".join(f"id {rows[gold][0]}: {gold!r}: {fault}" for gold, fault in faults[:MAX_ERRORS_SHOWN])
    more = f"\n  ... and {len(faults) - MAX_ERRORS_SHOWN} more gold answers" if len(faults) > MAX_ERRORS_SHOWN else ""
    raise DataError(
        f"{sum(len(rows[gold]) for gold, _ in faults)} row(s) cannot be graded by their `answer`:\n  {shown}{more}\n"
        "Mend the file, map another column with `columns: {answer: <your column>}`, or choose another `kind`."
    )


def apply(
    table: Dataset, config: GradeConfig, *, seed: int, cache_folder: Path, progress: ShowProgress | None
) -> FilterResult:
    """Grade all rows. Grades are appended to `grades.jsonl` as they are made, so a killed run goes on.

    Raises:
        DataError: a gold answer cannot be parsed; raised before the first row is graded.
    """
    check(table, config)
    cache_folder.mkdir(parents=True, exist_ok=True)
    log = JsonlLog(cache_folder / "grades.jsonl")
    done = {row["id"]: (row["correct"], sys.intern(row["reason"]), row["extracted"]) for row in log.rows()}
    with config.grader() as grader, bar_of(progress, "grade", len(table)) as bar:
        bar.advance(len(done))
        for batch in _batches(table):
            todo = [row for row in batch if row["id"] not in done]

            def keep(index: int, grade: Grade, todo: list[dict] = todo) -> None:
                row_id = todo[index]["id"]
                done[row_id] = (grade.correct, sys.intern(grade.reason), grade.extracted)
                log.append(
                    {"id": row_id, "correct": grade.correct, "reason": grade.reason, "extracted": grade.extracted}
                )
                bar.advance()

            grader.grade_many([(final_text(row["completion"]), row["answer"]) for row in todo], keep)
    log.close()
    grades = (done[row_id] for row_id in values_of(table, "id"))
    correct, reasons, extracted = (list(column) for column in zip(*grades, strict=True))
    scores = {"correct": correct, "grade_reason": reasons, "extracted_answer": extracted}
    labels = values_of(table, "correct_in_file" if "correct_in_file" in table.column_names else "correct")
    if any(label is not None for label in labels):
        scores["correct_in_file"] = labels
    dropped = {row: f"not gradable: {reasons[row]}" for row, label in enumerate(correct) if label is None}
    report = _report(table, scores)
    _write_disagreements(table, scores, cache_folder / "disagreements.jsonl")
    return FilterResult(scores, dropped if config.drop_ungradable else {}, report)


def _batches(table: Dataset) -> Iterator[list[dict]]:
    columns = table.select_columns(["id", "answer", "completion"])
    for start in range(0, len(table), READ_ROWS):
        batch = columns[start : start + READ_ROWS]
        yield [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _report(table: Dataset, scores: dict[str, list]) -> dict:
    by_source: dict[str, list[bool | None]] = {}
    for source, label in zip(source_names(table), scores["correct"], strict=True):
        by_source.setdefault(source, []).append(label)
    return {
        "verdicts": _verdicts(scores["correct"]),
        "reasons": count_by(scores["grade_reason"]),
        "by_source": {
            source: {
                "rows": len(labels),
                "accuracy": labels.count(True) / len(labels),
                **_verdicts(labels),
            }
            for source, labels in sorted(by_source.items())
        },
        "agreement": agreement(scores["correct"], scores["correct_in_file"]) if "correct_in_file" in scores else None,
    }


def _verdicts(labels: list[bool | None]) -> dict[str, int]:
    return {"correct": labels.count(True), "wrong": labels.count(False), "not_gradable": labels.count(None)}


def agreement(ours: list[bool | None], file: list[bool | None]) -> dict:
    """Compare our labels with the file's, over the rows that the file labels.

    Returns:
        `rows` labelled in the file; `agree` where both say right, or the file says wrong and we do not say right (most
        files cannot say "not gradable"); the `share` of these; and the `table` of all combinations.
    """
    pairs = [(mine, theirs) for mine, theirs in zip(ours, file, strict=True) if theirs is not None]
    agree = sum((mine is True) == theirs for mine, theirs in pairs)
    names = {True: "correct", False: "wrong", None: "not_gradable"}
    table = Counter(f"{names[mine]}, file says {names[theirs]}" for mine, theirs in pairs)
    return {"rows": len(pairs), "agree": agree, "share": agree / len(pairs), "table": dict(sorted(table.items()))}


def _write_disagreements(table: Dataset, scores: dict[str, list], path: Path) -> None:
    if "correct_in_file" not in scores:
        return
    lines, facts = [], table.select_columns(["id", "problem_id", "source", "answer"])
    for row, (ours, theirs) in enumerate(zip(scores["correct"], scores["correct_in_file"], strict=True)):
        if theirs is not None and ours != theirs:
            record = {name: facts[row][name] for name in facts.column_names}
            record |= {name: column[row] for name, column in scores.items()}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_atomic(path, "".join(lines))
