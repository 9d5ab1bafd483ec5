"""From graded samples to the table of scores: pass@k, pass^k, maj@k with intervals, truncated and ungradable counts.

docs/results_schema.md describes what is written; `SCHEMA` goes up when a reader of the old files would misread the new.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..core.answer_comparison import normalise, parse_number, text_key
from ..core.code_grading import CodeGrader
from ..core.errors import RunFolderError
from ..core.grading import Grader
from ..core.pass_at_k import check_complete, check_k, g_pass_at_k, majority_at_k, pass_at_k
from ..core.progress import progress
from ..core.run_folder import write_atomic
from .tool_use import TOOL_FACTS
from .uncertainty import mean_interval, new_problems_error, resolvable, run_to_run_error

# An answer is compared by symbolic mathematics with this many more frequent answers of its problem at most.
SYMBOLIC_COMPARISONS = 8
SCORES_FILE, PROBLEMS_FILE = "scores.json", "problems.jsonl"
SCHEMA = 2
GENERAL_TAU = 0.5  # of G-pass@k: at least half of the k samples are right

Equal = Callable[[str, str], bool]


class Sample(NamedTuple):
    """What the scores need of one graded row. `truncated` and `tokens` are None where the source does not say."""

    sample_index: int
    correct: bool | None
    truncated: bool | None
    extracted: str | None
    reason: str | None
    tokens: int | None


def sample_of(row: Mapping[str, Any]) -> Sample:
    """Read a row of samples.jsonl, or of a foreign table of trajectories."""
    finish = row.get("finish_reason")
    return Sample(
        row["sample_index"], row.get("correct"), None if finish is None else finish != "stop",
        row.get("extracted") or None, row.get("reason"), row.get("n_tokens"),
    )  # fmt: skip


def default_k(n: int) -> list[int]:
    """Return 1, 2, 4, ... up to n, and n."""
    return sorted({1 << power for power in range(n.bit_length())} | {n})


def score(
    problems: Mapping[str, Sequence[Sample]],
    n: int,
    k: Sequence[int],
    where: str,
    equal: Equal | None = None,
    workers: int = 1,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score the samples of one task.

    A sample without a verdict counts as wrong, and is counted by its reason besides. A truncated one is graded as far
    as it goes: base models often run on after their answer. Where a problem has more than n samples, its first n are
    used.

    Args:
        problems: problem id -> its samples.
        n: samples per problem.
        k: sizes of draws, each at most n.
        where: what is scored, for messages.
        equal: whether two wrong answers are the same mathematics, asked for maj@k; None compares numbers and spelling.
        workers: threads that ask `equal`.

    Returns:
        The scores, and one row per problem with the counts that everything else can be computed from.

    Raises:
        RecipeError: a k above n.
        DataError: a problem has fewer than n samples.
    """
    check_k(k, n)
    check_complete({name: len(samples) for name, samples in problems.items()}, n, where)
    used = {name: sorted(samples, key=lambda sample: sample.sample_index)[:n] for name, samples in problems.items()}
    correct = [sum(sample.correct is True for sample in samples) for samples in used.values()]
    votes = _votes(used, equal, workers, where)
    scores: dict[str, Any] = {"schema": SCHEMA, "n": n, "n_problems": len(used)}
    sizes = sorted(set(k))
    for size in sizes:
        scores[f"pass@{size}"] = _metric(n, correct, pass_at_k(n, range(n + 1), size))
    scores[f"avg@{n}"] = _metric(n, correct, pass_at_k(n, range(n + 1), 1))
    for size in (size for size in sizes if size > 1):
        scores[f"pass^{size}"] = _metric(n, correct, g_pass_at_k(n, range(n + 1), size, 1.0))
        scores[f"g-pass@{size}_{GENERAL_TAU}"] = _metric(n, correct, g_pass_at_k(n, range(n + 1), size, GENERAL_TAU))
    if votes:
        for size in sorted({size for size in k if size > 2} | ({n} if n > 2 else set())):  # maj@1, maj@2 equal pass@1
            values = [majority_at_k(classes, none, size) for classes, none in votes]
            scores[f"maj@{size}"] = vars(mean_interval(values)) | {"se_new_problems": new_problems_error(values)}
    scores["resolvable"] = _resolvable(scores[f"avg@{n}"])
    scores["answer_entropy"] = float(np.mean([_entropy(classes) for classes, _ in votes])) if votes else None
    scores |= _counts([sample for samples in used.values() for sample in samples])
    unused = sum(map(len, problems.values())) - n * len(used)
    if unused:
        scores["unused_samples"] = unused
    rows = [_problem_row(name, samples) for name, samples in used.items()]
    for row, (classes, none) in zip(rows, votes, strict=bool(votes)):
        row |= {"answers": [list(answer) for answer in classes], "no_answer": none}
    return scores, rows


def _metric(n: int, correct: Sequence[int], by_count: np.ndarray) -> dict[str, Any]:
    """Mean over problems of a score that depends on the number of correct samples, with both standard errors.

    Args:
        n: samples per problem.
        correct: correct samples of each problem, (problems,).
        by_count: the score of a problem with 0, 1, ..., n correct samples, (n + 1,).
    """
    values = by_count[np.asarray(correct)]
    return vars(mean_interval(values)) | {
        "se_new_problems": new_problems_error(values),
        "se_run_to_run": run_to_run_error(n, correct, by_count),
    }


def _resolvable(accuracy: Mapping[str, Any]) -> dict[str, float | None]:
    """Differences in accuracy that 80% of comparisons with another model of as many samples would find.

    `same_problems`: on these very problems. `unpaired`: on this kind of problem, from two separate scores. A paired
    comparison (`afterglow compare`) lies between the two. None where all samples agree, or all problems: an error of 0
    is not known to be one.
    """
    errors = {"same_problems": accuracy["se_run_to_run"], "unpaired": accuracy["se_new_problems"]}
    return {name: resolvable(2**0.5 * error) if error else None for name, error in errors.items()}


def _votes(
    used: Mapping[str, Sequence[Sample]], equal: Equal | None, workers: int, where: str
) -> list[tuple[list[tuple[int, float]], int]]:
    """The answer classes of every problem; none where there is nothing to compare."""
    several = any(len(samples) > 1 for samples in used.values())
    if several and any(sample.extracted for samples in used.values() for sample in samples):
        return _classes_of_all(used, equal, workers, where)
    return []


def _entropy(classes: Sequence[tuple[int, float]]) -> float:
    """Entropy in nats of the answers to one problem, samples without an answer left out; 0 where none has one."""
    shares = np.array([count for count, _ in classes], dtype=float)
    shares = shares / shares.sum() if len(shares) else shares
    return float(-(shares * np.log(shares)).sum()) + 0.0


def _counts(samples: list[Sample]) -> dict[str, Any]:
    ungradable = Counter(sample.reason or "no reason stored" for sample in samples if sample.correct is None)
    known = [sample for sample in samples if sample.truncated is not None]
    cut = [sample for sample in known if sample.truncated]
    lengths = [sample.tokens for sample in samples if sample.tokens is not None]
    return {
        "truncated": {
            "count": len(cut), "share": len(cut) / len(known), "correct": sum(s.correct is True for s in cut)
        } if known else None,
        "ungradable": {
            "count": ungradable.total(), "share": ungradable.total() / len(samples),
            "reasons": dict(sorted(ungradable.items(), key=lambda item: (-item[1], item[0]))),
        },
        "mean_tokens": sum(lengths) / len(lengths) if lengths else None,
    }  # fmt: skip


def _problem_row(name: str, samples: Sequence[Sample]) -> dict[str, Any]:
    lengths = [sample.tokens for sample in samples if sample.tokens is not None]
    return {
        "problem_id": name,
        "n": len(samples),
        "correct": sum(sample.correct is True for sample in samples),
        "ungradable": sum(sample.correct is None for sample in samples),
        "truncated": sum(sample.truncated is True for sample in samples),
        "mean_tokens": sum(lengths) / len(lengths) if lengths else None,
    }


# ---------------------------------------------------------------------------------------------------------------------
# answers that are the same


def _classes_of_all(
    used: Mapping[str, Sequence[Sample]], equal: Equal | None, workers: int, where: str
) -> list[tuple[list[tuple[int, float]], int]]:
    with (
        ThreadPoolExecutor(workers, thread_name_prefix="voting") as threads,
        progress(f"count votes, {where}", len(used)) as bar,
    ):
        votes = []
        for found in threads.map(lambda samples: answer_classes(samples, equal), used.values()):
            votes.append(found)
            bar.advance()
    return votes


def answer_classes(samples: Sequence[Sample], equal: Equal | None = None) -> tuple[list[tuple[int, float]], int]:
    """Group the answers to one problem into classes of equal ones.

    Right answers are one class: they all equal gold. Wrong ones are compared as numbers or by their spelling, and where
    they are not both numbers also by `equal`, with the most frequent others first.

    Returns:
        For each class (samples, share of them that is right), and the number of samples without an answer.
    """
    answers: dict[object, _Answer] = {}
    without = 0
    for sample in samples:
        if not sample.extracted:
            without += 1
            continue
        text = normalise(sample.extracted)
        number = parse_number(text)
        if number and number.percent:  # "50%" may be read as 0.5
            number = None
        key = number.value if number else text_key(text)
        answers.setdefault(key, _Answer(text, number is not None, [])).labels.append(sample.correct is True)
    right: list[bool] = []
    wrong: list[_Answer] = []
    for answer in sorted(answers.values(), key=lambda answer: (-len(answer.labels), answer.text)):
        if any(answer.labels):
            right += answer.labels
        elif (same := _same_answer(answer, wrong, equal)) is not None:
            same.labels.extend(answer.labels)
        else:
            wrong.append(answer)
    groups = ([right] if right else []) + [answer.labels for answer in wrong]
    return [(len(labels), sum(labels) / len(labels)) for labels in groups], without


def same_mathematics(grader: Grader | CodeGrader) -> Equal | None:
    """Return the `equal` of a grader that compares symbolically: one answer in a box, the other as gold."""
    if not isinstance(grader, Grader) or grader.kind != "math":
        return None
    return lambda one, other: grader.grade(f"\\boxed{{{one}}}", other).correct is True


class _Answer(NamedTuple):
    text: str
    is_number: bool
    labels: list[bool]


def _same_answer(answer: _Answer, wrong: list[_Answer], equal: Equal | None) -> _Answer | None:
    if equal is not None:
        for other in wrong[:SYMBOLIC_COMPARISONS]:
            # Two numbers with different values are different; that needs no algebra.
            if not (answer.is_number and other.is_number) and equal(answer.text, other.text):
                return other
    return None


# ---------------------------------------------------------------------------------------------------------------------
# what a person sees


CAPTION = (
    "%, 95% interval over new problems of this kind. resolves: the difference between two models that 80% of "
    "comparisons on these problems would find, in points."
)


def show_scores(scores: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Print the table of scores in percent, with their intervals."""
    from rich.console import Console
    from rich.table import Table

    names = shown_metrics(scores.values())
    table = Table(title=f"eval: {folder}", title_justify="left", caption=CAPTION)
    table.add_column("")
    for task in scores:
        table.add_column(task, justify="right", overflow="fold")
    facts: dict[str, Callable[[Mapping[str, Any]], str]] = {
        name: lambda task, name=name: percent(task[name]) if name in task else "" for name in names
    }
    facts["resolves"] = lambda task: points(task["resolvable"]["same_problems"])
    facts["problems x samples"] = lambda task: f"{task['n_problems']:,} x {task['n']}"
    facts["truncated"] = lambda task: _count(task["truncated"])
    facts["ungradable"] = lambda task: _count(task["ungradable"])
    facts["answer entropy (nats)"] = lambda task: _number(task["answer_entropy"])
    if any("tools" in task for task in scores.values()):
        facts |= {name: lambda task, show=show: show(task.get("tools")) for name, show in TOOL_FACTS.items()}
    facts["tokens per sample"] = lambda task: f"{task['mean_tokens']:,.0f}" if task["mean_tokens"] is not None else "?"
    for label, show in facts.items():
        table.add_row(label, *(show(task) for task in scores.values()))
    console = Console()
    console.print(table)
    for task, of in scores.items():
        if reasons := of["ungradable"]["reasons"]:
            listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
            console.print(f"{task}, ungradable: {listed}", soft_wrap=True, markup=False)


def shown_metrics(tasks: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the metrics of a table: every pass@k, and pass^k and maj@k of the largest k."""
    names = list(dict.fromkeys(name for task in tasks for name in task))
    kinds = {kind: [name for name in names if name.startswith(kind)] for kind in ("pass@", "pass^", "maj@")}
    return kinds["pass@"] + [
        max(kinds[kind], key=lambda name: int(name[len(kind) :])) for kind in ("pass^", "maj@") if kinds[kind]
    ]


def points(share: float | None) -> str:
    """Return a share in points, `?` where it is not known."""
    return "?" if share is None else f"{100 * share:.1f}"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"


def percent(interval: Mapping[str, Any]) -> str:
    """Return `58.3 [51.2, 65.1]`."""
    value, low, high = (100 * interval[key] for key in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _count(found: Mapping[str, Any] | None) -> str:
    return f"{found['count']:,} ({100 * found['share']:.1f}%)" if found else "?"


def group_samples(rows: Iterable[Mapping[str, Any]], by: str = "group") -> dict[str, dict[str, list[Sample]]]:
    """Collect rows as value of the column `by` -> problem id -> samples."""
    groups: dict[str, dict[str, list[Sample]]] = {}
    for row in rows:
        groups.setdefault(row[by], {}).setdefault(row["problem_id"], []).append(sample_of(row))
    return groups


def write_scores(folder: Path, scores: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write problems.jsonl, then scores.json, each whole or not at all."""
    write_atomic(folder / PROBLEMS_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_atomic(folder / SCORES_FILE, json.dumps(scores, indent=1, ensure_ascii=False) + "\n")


def read_scores(folder: Path) -> dict[str, Any]:
    """Return what `write_scores` wrote.

    Raises:
        RunFolderError: another version of the package wrote them, in another schema.
    """
    scores = json.loads((folder / SCORES_FILE).read_text(encoding="utf-8"))
    if any(not isinstance(of, dict) or of.get("schema") != SCHEMA for of in scores.values()):
        raise RunFolderError(
            f"{folder / SCORES_FILE}: written in another schema than {SCHEMA}, by another version of afterglow. Run "
            "the evaluation again with --overwrite, or score its samples anew with `samples:`."
        )
    return scores
