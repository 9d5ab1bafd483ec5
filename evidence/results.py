"""The raw rows of a study, small enough for the repository: what the pages are made from, and nothing else.

evidence/results/<study>/problems.parquet   one row per arm, seed, task and problem: samples, right ones, tokens
evidence/results/<study>/runs.json          of every run: other scores, losses, seconds; code, versions and machine
"""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from ..core.errors import DataError, RunFolderError
from ..core.pass_at_k import pass_at_k
from ..core.recipe import find_recipe
from ..core.run_folder import write_atomic
from ..eval.report_ledger import LEDGER_FILE
from ..eval.scores import PROBLEMS_FILE, read_scores
from ..launch.pipeline import STAGES_FILE
from ..launch.pipeline_recipe import Stage, parse_pipeline

FOLDER = Path("evidence/results")
PROBLEMS, RUNS = "problems.parquet", "runs.json"
COLUMNS = ("n", "correct", "truncated", "ungradable", "mean_tokens")
KEPT_SCORES = ("answer_entropy", "mean_tokens")


@dataclass(frozen=True)
class Results:
    """What a study's runs came to."""

    problems: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    about: dict[str, Any]

    @cached_property
    def _index(self) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
        found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
        for row in self.problems:
            found.setdefault((row["arm"], row["task"], row["seed"]), []).append(row)
        return found

    def seeds(self, arm: str) -> list[int]:
        """Return the seeds of an arm."""
        return sorted(run["seed"] for run in self.runs if run["arm"] == arm)

    def check_same_seeds(self, *arms: str) -> None:
        """Refuse arms that were run with other seeds.

        Raises:
            DataError: names the arm and its seeds.
        """
        for arm in arms[1:]:
            if self.seeds(arm) != self.seeds(arms[0]):
                raise DataError(f"`{arms[0]}` has seeds {self.seeds(arms[0])}, `{arm}` has {self.seeds(arm)}.")

    def by_seed(self, arm: str, task: str, metric: str) -> dict[int, float]:
        """Return seed -> score of an arm: pass@k from the rows, another metric as the evaluation stored it.

        Raises:
            DataError: the arm was not run, or has no such score.
        """
        if not (seeds := self.seeds(arm)):
            raise DataError(f"no run of the arm `{arm}`: without it there is no comparison and no verdict.")
        if metric.startswith("pass@"):
            return {seed: _mean(list(self._solved(arm, task, seed, metric).values())) for seed in seeds}
        stored = {run["seed"]: run["scores"].get(task, {}).get(metric) for run in self.runs if run["arm"] == arm}
        if missing := [seed for seed, value in stored.items() if value is None]:
            raise DataError(f"`{arm}`, seed {missing[0]}: no score `{metric}` of {task}.")
        return stored

    def by_problem(self, arm: str, task: str, metric: str) -> dict[str, float] | None:
        """Return problem -> mean over the seeds of its pass@k; None for a metric that problems do not have."""
        if not metric.startswith("pass@"):
            return None
        of_seeds = [self._solved(arm, task, seed, metric) for seed in self.seeds(arm)]
        return {problem: _mean([solved[problem] for solved in of_seeds]) for problem in of_seeds[0]}

    def _solved(self, arm: str, task: str, seed: int, metric: str) -> dict[str, float]:
        k = int(metric.removeprefix("pass@"))
        rows = self._index.get((arm, task, seed), [])
        if not rows:
            raise DataError(f"`{arm}`, seed {seed}: no rows of {task}.")
        return {row["problem_id"]: float(pass_at_k(row["n"], [row["correct"]], k)[0]) for row in rows}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def read_results(name: str) -> Results | None:
    """Read the raw rows of a study; None where there are none."""
    import pandas as pd

    folder = FOLDER / name
    if not (folder / RUNS).is_file():
        return None
    stored = json.loads((folder / RUNS).read_text(encoding="utf-8"))
    table = pd.read_parquet(folder / PROBLEMS)
    return Results(table.to_dict("records"), stored["runs"], stored["about"])


# ---------------------------------------------------------------------------------------------------------------------
# from the run folders


def collect(name: str, pipeline: str, arms: Mapping[str, str]) -> None:
    """Copy what the pages need from the finished run folders of a study's pipeline.

    An arm that was not begun is left out; where the verdict rests on it, there is no page.

    Raises:
        RunFolderError: an evaluation has not finished, or the study ran in another folder.
    """
    import pandas as pd

    output_dir, stages = parse_pipeline(pipeline, [])
    if not (output_dir / STAGES_FILE).is_file():
        raise RunFolderError(f"{output_dir}: no {STAGES_FILE}. Run the study first: make evidence-{name}")
    took = json.loads((output_dir / STAGES_FILE).read_text(encoding="utf-8"))["stages"]
    trained = {stage.output_dir: stage for stage in stages if stage.verb == "train"}
    evaluations = [stage for stage in stages if stage.verb == "eval"]
    begun = {_arm(stage) for stage in evaluations if Path(str(stage.output_dir)).is_dir()}
    problems, runs, manifests = [], [], []
    for stage in evaluations:
        arm = _arm(stage)
        if arm not in arms or arm not in begun:
            continue
        manifest = _finished(Path(str(stage.output_dir)), name)
        run = {"arm": arm, "seed": stage.keys.get("seed", 0)}
        problems += [run | row for row in _problem_rows(Path(str(stage.output_dir)))]
        scores = read_scores(Path(str(stage.output_dir)))
        kept = {task: {key: of[key] for key in KEPT_SCORES} for task, of in scores.items()}
        learned = trained.get(stage.section().values.get("model", ""))
        runs.append(run | {"scores": kept, "training": _training(learned)})
        manifests.append(manifest)
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{PROBLEMS}.partial"
    pd.DataFrame(problems).to_parquet(partial, index=False, compression="zstd")
    os.replace(partial, folder / PROBLEMS)
    stated = all(_same_statement(pipeline, manifest["code"]["commit"]) for manifest in manifests)
    seconds = {stage.name: took[stage.name]["seconds"] for stage in stages if stage.name in took}
    about = _code(stages) | _about(manifests) | {"stated_before": stated, "seconds": seconds}
    text = json.dumps({"about": about, "runs": runs}, indent=1, ensure_ascii=False)
    write_atomic(folder / RUNS, text + "\n")


def _arm(stage: Stage) -> str:
    return stage.group or stage.label


def _finished(folder: Path, name: str) -> dict[str, Any]:
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"finished": None}
    if manifest["finished"] is None:
        raise RunFolderError(f"{folder}: this evaluation has not finished. Go on with: make evidence-{name}")
    return manifest


@cache
def _same_statement(pipeline: str, commit: str | None) -> bool:
    """Whether the statement of the study is still what it was in the commit that a run was made with."""
    file = find_recipe(pipeline)
    if commit is None:
        return False
    shown = ["git", "-C", str(file.parent), "show", f"{commit}:./{file.name}"]
    then = subprocess.run(shown, capture_output=True, text=True, check=False)
    if then.returncode:
        return False
    texts = (then.stdout, file.read_text(encoding="utf-8"))
    before, now = (yaml.safe_load(text).get("study") for text in texts)
    return before is not None and before == now


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    with open(file, encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _problem_rows(folder: Path) -> Iterator[dict[str, Any]]:
    for row in _json_lines(folder / PROBLEMS_FILE):
        yield {"task": row["task"], "problem_id": row["problem_id"]} | {column: row[column] for column in COLUMNS}


def _training(stage: Stage | None) -> dict[str, Any]:
    """Return rows, tokens, and the mean loss of right and of wrong chains in each epoch; nothing without a ledger."""
    import pandas as pd

    if stage is None or not (folder := Path(str(stage.output_dir))).joinpath(LEDGER_FILE).is_file():
        return {}
    labels = {row["id"]: row["correct"] for row in _json_lines(Path(stage.section().values["data"]))}
    ledger = pd.read_parquet(folder / LEDGER_FILE)
    epochs = [column for column in ledger if str(column).startswith("epoch_")]
    names: dict[bool | None, str] = {True: "right", False: "wrong"}
    kinds = pd.Series([names.get(labels.get(row)) for row in ledger["id"]])
    losses = {kind: of_kind[epochs].mean() for kind, of_kind in ledger.groupby(kinds)}
    tokens = [row["num_tokens"] for row in _json_lines(folder / "metrics.jsonl") if "num_tokens" in row]
    return {
        "rows": len(ledger),
        "tokens": int(tokens[-1]),
        "loss_by_epoch": {str(kind): [round(float(loss), 5) for loss in found] for kind, found in losses.items()},
    }


def _code(stages: Sequence[Stage]) -> dict[str, Any]:
    """Return every commit that a stage was made with, that of a base model which was there before too."""
    files = [Path(str(stage.output_dir)) / "manifest.json" for stage in stages]
    codes = [json.loads(file.read_text(encoding="utf-8"))["code"] for file in files if file.is_file()]
    return {
        "commits": sorted({str(code["commit"]) for code in codes}),
        "uncommitted_changes": any(code["diff"] for code in codes),
    }


def _about(manifests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the evaluations have in common."""
    return {
        "started": min(manifest["started"] for manifest in manifests),
        "finished": max(manifest["finished"] for manifest in manifests),
        "versions": manifests[-1]["versions"],
        "machine": manifests[-1]["machine"],
        "data": {key: value for key, value in manifests[-1]["data"].items() if key != "model"},
    }
