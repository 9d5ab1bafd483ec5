"""The numbers of RSR's report: teachers with intervals, what was chosen, and that it is no proxy for something else."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from .columns import source_names, values_of
from .rank_surprisal import RSRScore, bootstrap_teachers, dataset_rsr, rank_teachers
from .selection import mean

if TYPE_CHECKING:
    from datasets import Dataset

# Column of the table -> its mean's name in the teacher table. `branch_ratio` is there after a `branching` step.
_COMPARED = {
    "rsr_tokens": "mean_tokens",
    "rsr_mean_rank": "mean_rank",
    "rsr_entropy": "entropy",
    "rsr_local_surprisal": "local_surprisal",
    "rsr_limo": "limo",
    "branch_ratio": "branch_ratio",
}


def report_student(
    table: "Dataset",
    scores: Mapping[int, RSRScore],
    rows: Sequence[int],
    columns: Mapping[str, list],
    dropped: Mapping[int, str],
    seed: int,
) -> dict[str, Any]:
    """Return the teacher table, histograms and summaries of one student.

    Args:
        table: Trajectories.
        scores: Row -> its score, for the rows that were scored.
        rows: These rows.
        columns: Score columns of the whole table.
        dropped: Rows that were dropped.
        seed: Of the bootstrap.
    """
    teachers = source_names(table)
    labels, problems = values_of(table, "correct"), values_of(table, "problem_id")
    kept = [i for i in range(len(table)) if i not in dropped]
    compared = dict(columns)
    if "branch_ratio" in table.column_names:
        compared["branch_ratio"] = values_of(table, "branch_ratio")
    of_rows = [scores[i] for i in rows]
    sure = bootstrap_teachers([problems[i] for i in rows], [teachers[i] for i in rows], of_rows, seed)
    by_teacher: dict[str, list[int]] = {}
    for i in rows:
        by_teacher.setdefault(teachers[i], []).append(i)
    chosen = Counter(teachers[i] for i in kept)
    table_of_teachers = []
    for name, of in rank_teachers({name: [scores[i] for i in own] for name, own in by_teacher.items()}):
        entry = {"source": name} | asdict(of) | asdict(sure[name])
        entry["accuracy"] = _accuracy([labels[i] for i in by_teacher[name]])
        for column, title in _COMPARED.items():
            if column in compared:
                entry[title] = mean(compared[column][i] for i in by_teacher[name])
        table_of_teachers.append(_without_nan(entry | {"kept": chosen[name]}))
    ratios = np.array([scores[i].rsr if i in scores else math.nan for i in range(len(table))])
    finite = ratios[np.isfinite(ratios)]
    edges = np.histogram_bin_edges(finite, bins=30)
    scored = set(rows)
    return {
        "teachers": table_of_teachers,
        "histogram": {
            "edges": edges.tolist(),
            "pool": np.histogram(finite, edges)[0].tolist(),
            "kept": np.histogram(ratios[kept][np.isfinite(ratios[kept])], edges)[0].tolist(),
        },
        "pool": _summary(of_rows, [labels[i] for i in rows]),
        "kept": _summary([scores[i] for i in kept if i in scored], [labels[i] for i in kept if i in scored]),
        "problems": _problems(problems, labels, kept),
    }


def _problems(problems: list[str], labels: list[bool | None], kept: list[int]) -> dict[str, int]:
    """Count the problems at which a choice by ratio alone is no choice, or one between wrong answers."""
    candidates = Counter(problems)
    gradable = {problem for problem, label in zip(problems, labels, strict=True) if label is not None}
    solved = {problem for problem, label in zip(problems, labels, strict=True) if label}
    chosen = {problems[i] for i in kept}
    return {
        "all": len(candidates),
        "kept": len(chosen),
        "kept_with_one_candidate": sum(candidates[problem] == 1 for problem in chosen),
        "kept_with_all_wrong": sum(problem in gradable and problem not in solved for problem in chosen),
    }


def _summary(scores: list[RSRScore], labels: list[bool | None]) -> dict[str, Any]:
    of = dataset_rsr(scores)
    return _without_nan(
        {
            "rows": len(scores),
            "invalid": of.n_invalid,
            "rsr": of.rsr,
            "simple_mean": of.simple_mean,
            "mean_tokens": mean([float(score.n_tokens) for score in scores]),
            "accuracy": _accuracy(labels),
        }
    )


def _accuracy(labels: list[bool | None]) -> float | None:
    return mean(None if label is None else float(label) for label in labels)


def _without_nan(values: dict) -> dict:
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}
