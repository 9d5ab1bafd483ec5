import pytest

from afterglow.core.errors import RecipeError
from afterglow.core.recipe import read_recipe
from afterglow.launch import cli
from afterglow.launch.pipeline_recipe import parse_pipeline
from afterglow.launch.recipe_shelf import copy_recipe, describe, packaged_recipes, verb_of


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AFTERGLOW_DATA", raising=False)


def test_the_list_names_every_recipe_with_its_verb(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    assert cli.main(["recipes"]) == 0
    out = capsys.readouterr().out
    shown = {line.split()[0] for line in out.splitlines()[1:]}
    tasks = {name for name, path in packaged_recipes().items() if "\nname: " in path.read_text()}
    assert shown >= set(packaged_recipes()) - tasks and not shown & tasks


def test_a_word_narrows_the_list(capsys):
    assert cli.main(["recipes", "list", "llama"]) == 0
    assert "llama3.1-8b" in (out := capsys.readouterr().out) and "qwen3-4b-base-openmath" not in out
    assert cli.main(["recipes", "list", "no such word"]) == 2
    assert "no such word" in capsys.readouterr().err


def test_show_prints_the_file_as_it_is(capsys):
    assert cli.main(["recipes", "show", "demo/glow.yaml"]) == 0
    assert capsys.readouterr().out == packaged_recipes()["demo/glow.yaml"].read_text()


def test_a_copy_is_the_users_own_and_is_never_overwritten(tmp_path):
    (path,) = copy_recipe("demo/glow.yaml", "mine/first.yaml")
    assert path.read_text() == packaged_recipes()["demo/glow.yaml"].read_text()
    path.write_text("changed")
    with pytest.raises(RecipeError, match=r"mine/first.yaml: there already"):
        copy_recipe("demo/glow.yaml", "mine/first.yaml")
    assert path.read_text() == "changed"
    assert [p.name for p in copy_recipe("demo/glow.yaml", "mine")] == ["glow.yaml"]


def test_a_pipeline_brings_the_recipes_beside_it_and_still_parses(tmp_path):
    copied = copy_recipe("demo/pipeline.yaml", "my_demo")
    assert {path.name for path in copied} == {
        "pipeline.yaml", "base.yaml", "eval_base.yaml", "filter.yaml", "glow.yaml", "eval_glow.yaml",
    }  # fmt: skip
    _, stages = parse_pipeline("my_demo/pipeline.yaml", [])
    assert all(stage.target.startswith("my_demo/") for stage in stages if stage.takes == "recipe")


@pytest.mark.parametrize(
    "words, error", [(["copy", "demo/glo.yaml"], "Did you mean"), (["burn"], "usage"), (["copy"], "usage")]
)
def test_what_is_no_recipe_or_command_is_one_message(capsys, words, error):
    assert cli.main(["recipes", *words]) == 2
    assert error in capsys.readouterr().err


def test_every_recipe_has_a_verb_and_a_first_sentence(monkeypatch):
    monkeypatch.setenv("AFTERGLOW_DATA", "/data")
    for name, path in packaged_recipes().items():
        assert len(describe(path)) > 15, name
        if "\nname: " not in path.read_text():
            assert verb_of(read_recipe(path)) in cli.VERBS, name
