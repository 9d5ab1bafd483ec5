"""Rows are collected from finished run folders, and from no others."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from afterglow.core.errors import RunFolderError
from afterglow.evidence.results import collect, read_results

MANIFEST = {
    "finished": "2026-01-01T11:00:00", "started": "2026-01-01T10:00:00", "code": {"commit": None, "diff": None},
    "versions": {"torch": "2.0"}, "machine": {"cores": 2}, "data": {"model": "m", "task t": "d"},
}  # fmt: skip


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """The run folders of a pipeline of one training with two seeds, each evaluated on one problem."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs")
    for seed in (0, 1):
        evaluation, training = folder / f"eval-{seed}", folder / f"model-{seed}"
        evaluation.mkdir(parents=True)
        training.mkdir()
        (evaluation / "manifest.json").write_text(json.dumps(MANIFEST))
        row = {"task": "t", "problem_id": "p", "n": 4, "correct": 1 + seed, "truncated": 0, "ungradable": 0}
        (evaluation / "problems.jsonl").write_text(json.dumps(row | {"mean_tokens": 9.0, "answers": []}) + "\n")
        scores = {"t": {"schema": 2, "answer_entropy": 0.5, "mean_tokens": 9.0}}
        (evaluation / "scores.json").write_text(json.dumps(scores))
        pd.DataFrame(
            {"id": ["x", "y"], "epoch_1": [0.5, 1.5], "epoch_2": [0.25, 1.0], "weight": [1.0, 1.0]}
        ).to_parquet(training / "loss_ledger.parquet")
        (training / "metrics.jsonl").write_text('{"step": 1, "num_tokens": 7.0}\n{"step": 2, "num_tokens": 9.0}\n')
    Path("data.jsonl").write_text('{"id": "x", "correct": true}\n{"id": "y", "correct": false}\n')
    (folder / "stages.json").write_text(json.dumps({"stages": {"eval a-0": {"seconds": 3.0}}}))
    Path("train.yaml").write_text("method: glow\ndata: data.jsonl\n")
    Path("eval.yaml").write_text("k: [1]\n")
    stages = [
        {"train": {"recipe": "train.yaml", "label": "a", "each_seed": [0, 1], "output_dir": "runs/model-{seed}"}},
        {"eval": {"recipe": "eval.yaml", "label": "a", "each_seed": [0, 1], "model": "runs/model-{seed}",
                  "output_dir": "runs/eval-{seed}"}},
        {"train": {"recipe": "train.yaml", "label": "base", "output_dir": "runs/base"}},
        {"eval": {"recipe": "eval.yaml", "label": "b", "model": "runs/base", "output_dir": "runs/eval-base"}},
        {"eval": {"recipe": "eval.yaml", "label": "other", "output_dir": "runs/other"}},
    ]  # fmt: skip
    Path("study.yaml").write_text(yaml.safe_dump({"output_dir": "runs", "stages": stages, "study": {"arms": ["a"]}}))
    return folder


def test_rows_scores_losses_and_seconds_are_kept(runs):
    shutil.copytree(runs / "eval-0", runs / "eval-base")
    collect("mine", "study.yaml", {"a": "the method", "b": "a base model"})
    found = read_results("mine")
    assert found is not None
    assert found.by_seed("a", "t", "pass@1") == {0: 0.25, 1: 0.5}
    assert found.by_problem("a", "t", "pass@1") == {"p": 0.375}
    assert found.by_seed("a", "t", "answer_entropy") == {0: 0.5, 1: 0.5}
    training = {"rows": 2, "tokens": 9, "loss_by_epoch": {"right": [0.5, 0.25], "wrong": [1.5, 1.0]}}
    assert [run["training"] for run in found.runs[:2]] == [training, training]
    assert found.by_seed("b", "t", "pass@1") == {0: 0.25} and found.runs[-1]["training"] == {}  # no ledger
    assert found.about["seconds"] == {"eval a-0": 3.0} and found.about["data"] == {"task t": "d"}
    assert found.about["stated_before"] is False  # no commit is known


def test_an_arm_that_was_not_begun_is_left_out(runs):
    collect("mine", "study.yaml", {"a": "the method", "other": "not run"})
    found = read_results("mine")
    assert found is not None and found.seeds("a") == [0, 1] and found.seeds("other") == []


def test_a_study_that_is_not_finished_is_refused(runs):
    (runs / "eval-1" / "manifest.json").write_text(json.dumps(MANIFEST | {"finished": None}))
    with pytest.raises(RunFolderError, match=r"runs/eval-1: this evaluation has not finished. .*make evidence-mine"):
        collect("mine", "study.yaml", {"a": "the method"})
    assert read_results("mine") is None


def test_a_study_that_was_never_run_is_refused(runs):
    (runs / "stages.json").unlink()
    with pytest.raises(RunFolderError, match="Run the study first: make evidence-mine"):
        collect("mine", "study.yaml", {"a": "the method"})
