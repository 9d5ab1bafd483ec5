import json

import pytest
import yaml
from stub_engine import StubEngine

from afterglow.core.errors import RunFolderError
from afterglow.core.recipe import read_recipe
from afterglow.eval import evaluate
from afterglow.eval.export import export_runs
from afterglow.eval.report import find_runs


@pytest.fixture
def folder(tmp_path, tiny_folder, monkeypatch):
    rows = [{"problem_id": f"p{i}", "prompt": f"{i}+{4 - i}?", "answer": "4"} for i in range(5)]
    (tmp_path / "su|ms.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"model": str(tiny_folder), "tasks": [str(tmp_path / "su|ms.jsonl")], "n": 4, "max_tokens": 99, "seed": 3}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(keys | {"output_dir": str(tmp_path / "runs" / "base")}))
    monkeypatch.setattr(evaluate, "open_engine", StubEngine)
    return evaluate.run(read_recipe(tmp_path / "eval.yaml"))


def test_the_layout_of_lm_eval(folder, tiny_folder):
    samples, results = export_runs(find_runs(folder.parent), "lm_eval")
    name = str(tiny_folder).replace("/", "__")
    assert results.parent == folder / "lm_eval" / name
    assert samples.name.startswith("samples_su_ms_20") and results.name.startswith("results_20")
    assert ":" not in results.name
    found, scores = json.loads(results.read_text()), json.loads((folder / "scores.json").read_text())["su|ms"]
    of = found["results"]["su|ms"]
    assert of["alias"] == "su|ms" and of["pass@4,none"] == scores["pass@4"]["value"]
    assert of["pass@4_stderr,none"] == scores["pass@4"]["se_new_problems"] and "maj@4,none" in of
    assert found["n-samples"]["su|ms"] == {"original": 5, "effective": 5} and found["versions"] == {"su|ms": 1}
    assert found["config"]["random_seed"] == 3 and found["config"]["gen_kwargs"]["max_tokens"] == 99
    assert found["higher_is_better"]["su|ms"]["pass@1"] is True and found["model_name_sanitized"] == name
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [row["doc"]["problem_id"] for row in rows] == [f"p{i}" for i in range(5)]
    assert all(len(row["resps"][0]) == len(row["filtered_resps"][0]) == 4 and row["target"] == "4" for row in rows)
    assert sum(row["pass@1"] for row in rows) / 5 == pytest.approx(scores["pass@1"]["value"])
    assert json.loads(rows[0]["arguments"]["gen_args_0"]["arg_0"])[-1]["role"] == "user"
    before = results.read_bytes()
    assert export_runs(find_runs(folder), "lm_eval")[1].read_bytes() == before, "made from the run's files alone"


def test_the_model_card(folder):
    (path,) = export_runs(find_runs(folder), "model_card")
    _, front, text = path.read_text().split("---\n", 2)
    (model,) = yaml.safe_load(front)["model-index"]
    scores = json.loads((folder / "scores.json").read_text())["su|ms"]
    metrics = {metric["type"]: metric["value"] for metric in model["results"][0]["metrics"]}
    assert metrics["pass@4"] == round(100 * scores["pass@4"]["value"], 2)
    head, rule, row = [line for line in text.splitlines() if line.startswith("|")]
    assert head.count("|") == rule.count("|") == row.replace("\\|", "").count("|")
    assert f"{100 * scores['pass@1']['value']:.1f} [" in row and "5 × 4" in row and "max_tokens 99, seed 3" in text


def test_nothing_to_export(folder, tmp_path):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"finished": None}))
    with pytest.raises(RunFolderError, match="no finished evaluation"):
        export_runs(find_runs(folder), "model_card")
