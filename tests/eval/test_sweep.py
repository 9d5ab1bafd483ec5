import json
import shutil

import pytest
import yaml
from stub_engine import StubEngine

from afterglow.core.errors import ModelError, RecipeError
from afterglow.core.recipe import read_recipe
from afterglow.eval import evaluate
from afterglow.eval.report import run_report
from afterglow.eval.sweep import find_checkpoints


class SweptEngine(StubEngine):
    opened, loaded = [], []

    def __init__(self, config):
        super().__init__(config)
        self.opened.append(config.model)

    def load_weights(self, model):
        self.loaded.append(model)


@pytest.fixture
def recipe(tmp_path, tiny_folder, monkeypatch):
    for step in (5, 10, 20):
        shutil.copytree(tiny_folder, tmp_path / "train" / f"checkpoint-{step}")
    rows = [{"prompt": f"What is {i}+{4 - i}?", "answer": "4"} for i in range(6)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(evaluate, "open_engine", SweptEngine)
    SweptEngine.opened, SweptEngine.loaded = [], []

    def write(**changes):
        keys = {
            "checkpoints": str(tmp_path / "train" / "checkpoint-*"), "tasks": [str(tmp_path / "sums.jsonl")], "n": 4,
            "output_dir": str(tmp_path / "sweep"),
        }  # fmt: skip
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in (keys | changes).items() if value is not None}))
        return path

    return write


def test_one_engine_for_all_checkpoints_and_a_folder_each(recipe, tmp_path, capsys):
    folder = evaluate.run(read_recipe(recipe()))
    names = [f"checkpoint-{step}" for step in (5, 10, 20)]
    models = [str(tmp_path / "train" / name) for name in names]
    assert (SweptEngine.opened, SweptEngine.loaded) == (models[:1], models[1:])
    curve = json.loads((folder / "sweep.json").read_text())["checkpoints"]
    assert [(point["name"], point["model"]) for point in curve] == list(zip(names, models, strict=True))
    for point in curve:
        assert point["scores"] == json.loads((folder / point["name"] / "scores.json").read_text())
    chosen = json.loads((folder / "selection.json").read_text())
    assert chosen["k"] == 4 and [one["name"] for one in chosen["checkpoints"]] == names
    assert "truncated" in chosen["checkpoints"][0]["reason"], "a fifth of what the stub says is cut off"
    assert chosen["selected"] is None and chosen["model"] is None
    page = run_report(folder).read_text()
    assert "over checkpoints" in page and "None is selected" in page

    before = (folder / "sweep.json").read_bytes()
    shutil.rmtree(folder / "checkpoint-10")
    evaluate.run(read_recipe(recipe()))
    assert SweptEngine.opened == [models[0], models[1]], "only what is missing is drawn again"
    assert (folder / "sweep.json").read_bytes() == before


def test_wrong_sweeps_are_refused_before_a_model_is_loaded(recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"`checkpoints`: no folder matches .*nowhere-\*"):
        evaluate.run(read_recipe(recipe(checkpoints=str(tmp_path / "nowhere-*"))))
    with pytest.raises(RecipeError, match=r"`model` stands beside `checkpoints`"):
        evaluate.run(read_recipe(recipe(model="x")))
    with pytest.raises(RecipeError, match=r"unknown key `temprature`"):
        evaluate.run(read_recipe(recipe(temprature=1)))
    with pytest.raises(ModelError):
        evaluate.run(read_recipe(recipe(checkpoints=[str(tmp_path / "nothing")])))
    assert not SweptEngine.opened
    evaluate.run(read_recipe(recipe()), dry_run=True)
    assert not (tmp_path / "sweep").exists()


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("a/checkpoint-900", "a/checkpoint-1000", "b/checkpoint-20"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a" / "checkpoint-1.log").touch()
    assert list(find_checkpoints([str(tmp_path / "a" / "checkpoint-*")], "")) == ["checkpoint-900", "checkpoint-1000"]
    (tmp_path / "b" / "checkpoint-900").mkdir()
    names = list(find_checkpoints([str(tmp_path / "?" / "checkpoint-*")], ""))
    assert len(set(names)) == 4 and all("--checkpoint-" in name for name in names)
