import json

import pytest
import yaml
from huggingface_hub import ModelCard
from launch_recipes import training_recipe, write_recipe, write_rows
from scripted import ScriptedEngine

from afterglow.core.recipe import read_recipe
from afterglow.eval import evaluate
from afterglow.launch import cli
from afterglow.launch.model_card import add_evaluation, base_model, hub_datasets, write_card
from afterglow.launch.train import run
from afterglow.launch.training_recipe import parse


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_folder):
    return run(read_recipe(training_recipe(tmp_path_factory.mktemp("card"), tiny_folder, save_total_limit=2)))


def test_a_card_beside_the_model_and_each_checkpoint(trained):
    manifest = json.loads((trained / "manifest.json").read_text())
    card = ModelCard.load(trained / "README.md")
    assert card.data.library_name == "transformers" and card.data.tags == ["afterglow", "trl", "glow"]
    assert card.data.base_model is None and card.data.datasets is None, "a folder is nothing on the hub"
    assert manifest["data"]["data"] in card.text and manifest["versions"]["trl"] in card.text
    assert "| steps | 15 |" in card.text and "huggingface.co/papers/2601.04992" in card.text
    recipe = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert recipe["learning_rate"] == 0.05 and recipe["method"] == "glow" and "adam_beta1" not in recipe
    last = ModelCard.load(trained / "checkpoint-12" / "README.md")
    assert "| steps | 12 of 15 |" in last.text and last.text.splitlines()[1] == "# checkpoint-12"


def test_a_recipe_over_the_hub_names_its_model_and_data(tmp_path, tiny_folder):
    recipe = training_recipe(tmp_path, "org/base", data="org/chains:part", use_peft=True)
    manifest = {"versions": {"python": "3.11"}, "data": {"data": "1a|b", "model_name_or_path": "c"},
                "code": {"commit": "0123456789abcdef", "diff": "+"}}  # fmt: skip
    write_card(tmp_path, parse(read_recipe(recipe)), manifest, {"steps": 3})
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.datasets) == ("org/base", ["org/chains"])
    assert "(commit 0123456789ab, changed)" in card.text and "`1a\\|b`" in card.text
    assert hub_datasets({"data": ["a/b", "x.jsonl", "a/b:c"], "model_name_or_path": "m/n"}) == ["a/b"]


def test_the_base_is_followed_through_the_runs_that_made_it(tmp_path):
    for name, of in (("first", "org/base"), ("second", str(tmp_path / "first"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"inputs": {"model_name_or_path": of}}))
    assert base_model(str(tmp_path / "second")) == "org/base"
    assert base_model(str(tmp_path)) is None and base_model("made/by/hand") is None
    (tmp_path / "manifest.json").write_text(json.dumps({"stage": "made", "finished": "now"}))
    assert base_model(str(tmp_path)) is None, "made from nothing"


def test_what_cannot_be_written_stops_nothing(tmp_path, tiny_folder, capsys):
    training = parse(read_recipe(training_recipe(tmp_path, tiny_folder)))
    manifest = {"versions": {}, "data": {"data": "1", "model_name_or_path": "2"}}
    write_card(tmp_path / "gone", training, manifest, {})
    assert "no model card" in capsys.readouterr().err


@pytest.fixture
def evaluate_twice(tmp_path, trained, monkeypatch):
    """Evaluate a model with answers that are known."""
    monkeypatch.setattr(ScriptedEngine, "load_weights", lambda self, model: None)
    monkeypatch.setattr(ScriptedEngine, "close", lambda self: None)
    problems = [{"problem_id": f"p{i}", "prompt": f"{i} + 2?", "answer": "4"} for i in range(4)]
    write_rows(tmp_path / "sums.jsonl", problems)

    def work(name: str, model, right: bool, task: str = "sums"):
        answer = "\\boxed{4}" if right else "\\boxed{5}"
        monkeypatch.setattr(evaluate, "open_engine", lambda config: ScriptedEngine(lambda *_: f"{answer}<|im_end|>"))
        keys = {"tasks": [str(tmp_path / f"{task}.jsonl")], "n": 2, "k": [1, 2], "max_tokens": 32, "workers": 1}
        recipe = write_recipe(tmp_path / "eval.yaml", model=str(model), output_dir=str(tmp_path / name), **keys)
        assert cli.main(["eval", str(recipe)]) == 0
        return tmp_path / name

    return work


def test_an_evaluation_puts_its_table_in(trained, tmp_path, evaluate_twice):
    before = (trained / "README.md").read_text()
    write_rows(tmp_path / "more.jsonl", [{"problem_id": "q", "prompt": "2 + 2?", "answer": "4"}])
    folders = [evaluate_twice("one", trained, right=False), evaluate_twice("two", trained, right=True, task="more")]
    text = (trained / "README.md").read_text()
    assert text.count("## Evaluation\n") == 1 and all(f"### {folder}" in text for folder in folders)
    card = ModelCard.load(trained / "README.md")
    found = {r.task_name: r.metric_value for r in card.data.eval_results if r.metric_type == "pass@1"}
    assert found == {"sums": 0.0, "more": 100.0}
    again = evaluate_twice("one", trained, right=False)  # finished before
    assert again == folders[0] and (trained / "README.md").read_text().count("### ") == 2
    other = evaluate_twice("three", trained, right=True)  # the same task again: the newest counts for the hub
    card = ModelCard.load(trained / "README.md")
    assert {r.metric_value for r in card.data.eval_results if r.task_name == "sums"} == {100.0}
    assert f"### {other}" in card.text
    assert card.text.startswith(before.split("---\n", 2)[2].rstrip()), "what stood there stays"


def test_cards_of_others_stay_as_they_are(trained, tmp_path, tiny_folder, evaluate_twice):
    assert add_evaluation(tmp_path) is None, "no run folder"
    folder = evaluate_twice("one", tiny_folder, right=True)
    assert add_evaluation(folder) is None and not (tiny_folder / "README.md").exists()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (tmp_path / "other").mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"model": str(tmp_path / "other")}))
    for text in ("# mine\n", "---\ntags: [mine]\n---\n# mine\n", "---\n: [\n---\n# broken\n"):
        (tmp_path / "other" / "README.md").write_text(text)
        assert add_evaluation(folder) is None
        assert (tmp_path / "other" / "README.md").read_text() == text
