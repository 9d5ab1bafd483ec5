import gzip
import json
import math
import os
from pathlib import Path

import pytest
from unlearning_world import write_recipe

from afterglow.core.errors import DataError
from afterglow.core.recipe import read_recipe
from afterglow.eval.evaluate import run
from afterglow.eval.suite_base import Retrained
from afterglow.eval.suite_tofu import tofu_scores
from afterglow.eval.tofu_logs import LOGS, read_logs
from afterglow.eval.unlearning_metrics import rouge_l


def log(losses, wrong, paraphrased, rouge):
    keys = [str(i) for i in range(len(losses))]
    return {
        "avg_gt_loss": dict(zip(keys, losses, strict=True)),
        "average_perturb_loss": dict.fromkeys(keys, wrong),
        "avg_paraphrased_loss": dict.fromkeys(keys, paraphrased),
        "rougeL_recall": dict.fromkeys(keys, rouge),
        "generated_text": {key: [f"Q{key}", "text", "gold"] for key in keys},
    }


def logs():
    """Losses of 0 and ln 2: probabilities 1 and 1/2; truth ratio exp(ln 2 - 2 ln 2) = 1/2."""
    half = math.log(2)
    return {name: log([0.0, half], [2 * half, 2 * half], half, 0.5) for name in LOGS.values()}


def test_scores_of_logs_by_hand(tmp_path):
    (tmp_path / "eval_log_aggregated.json").write_text(json.dumps(logs()))
    path = write_recipe(
        tmp_path / "r.yaml", suite="tofu_logs", output_dir=str(tmp_path / "run"),
        logs=str(tmp_path / "eval_log_aggregated.json"), retrained=str(tmp_path / "eval_log_aggregated.json"),
    )  # fmt: skip
    folder = run(read_recipe(path))
    scores = json.loads((folder / "scores.json").read_text())["tofu"]
    assert scores["retain_probability"]["value"] == pytest.approx(0.75)
    # of real authors: 1 / (1 + 1/4 + 1/4) and 0.5 / (0.5 + 1/4 + 1/4)
    assert scores["real_authors_probability"]["value"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores["forget_truth_ratio"]["value"] == scores["world_facts_truth_ratio"]["value"] == pytest.approx(0.5)
    parts = [0.75, 0.5, 0.5, *[7 / 12, 0.5, 0.5] * 2]
    assert scores["model_utility"]["value"] == pytest.approx(9 / sum(1 / part for part in parts))
    assert scores["forget_quality"]["value"] == 1


def test_files_that_are_no_logs(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_logs(tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"x": 1}')
    with pytest.raises(DataError, match=r"has no eval_log_forget.json"):
        read_logs(tmp_path / "other.json")
    broken = logs()
    broken["eval_log.json"]["rougeL_recall"]["1"] = None
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    with pytest.raises(DataError, match=r"eval_log.json: question 1 has no rougeL_recall"):
        read_logs(tmp_path / "broken.json")


@pytest.mark.skipif("AFTERGLOW_DATA" not in os.environ, reason="AFTERGLOW_DATA does not name the folder of real data")
def test_real_logs_of_a_full_and_a_retrained_phi():
    """Every stored truth ratio and ROUGE-L of 2 x 817 answers is ours; the two models are told apart."""
    folder = Path(os.environ["AFTERGLOW_DATA"]) / "unlearning" / "tofu_eval_logs"
    files = {name: folder / f"ft_epoch5_lr2e-05_phi_{name}_wd0.01.json.gz" for name in ("full", "retain90")}
    rows = {name: read_logs(path) for name, path in files.items()}
    for name, path in files.items():
        with gzip.open(path) as file:
            stored = json.load(file)
        ratios = [value for of in LOGS.values() for value in stored[of]["truth_ratio"].values()]
        assert [row["truth_ratio"] for row in rows[name]] == pytest.approx(ratios, abs=1e-5)
        assert all(rouge_l(row["generation"], row["gold"])[0] == row["rouge_l_recall"] for row in rows[name])
    scores = tofu_scores(rows["full"], Retrained(files["retain90"], rows["retain90"], {}))
    assert scores["model_utility"]["value"] == pytest.approx(0.5221, abs=1e-4)
    assert scores["forget_quality"]["value"] == pytest.approx(2.194e-16, rel=1e-3)
    itself = tofu_scores(rows["retain90"], Retrained(files["retain90"], rows["retain90"], {}))
    assert itself["forget_quality"]["value"] == 1 and itself["model_utility"]["value"] == pytest.approx(
        0.5320, abs=1e-4
    )
