from dataclasses import dataclass, field
from typing import Literal

import pytest

from afterglow.core.errors import RecipeError
from afterglow.core.recipe import Section, build, coerce, find_recipe, plain, read_recipe


@dataclass
class Training:
    output_dir: str = field(metadata={"help": "Where to write."})
    learning_rate: float = 1e-5
    epochs: int = 3
    packing: bool = False
    form: Literal["scaled", "one_plus"] = "scaled"
    kwargs: dict | None = None
    ks: list[int] = field(default_factory=lambda: [1])
    dtype: str = field(default="auto", metadata={"choices": ["auto", "float32"]})

    def __post_init__(self):
        if self.epochs < 1:
            raise ValueError("epochs must be at least 1")


@dataclass
class Data:
    data: str = "x"


def recipe(tmp_path, text, *overrides):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return read_recipe(path, list(overrides))


def test_values_arrive_with_their_types(tmp_path):
    section = recipe(
        tmp_path, "output_dir: o\nlearning_rate: 3e-4\nks: [1, 4]\nkwargs: {a: 1}\ndata: y\n", "--packing", "--epochs=5"
    )
    training, data = build(section, Training, Data)
    assert training == Training("o", 3e-4, 5, True, "scaled", {"a": 1}, [1, 4]) and data == Data("y")


@pytest.mark.parametrize("text, number", [("1e-5", 1e-5), ("2E3", 2000.0), ("1.5e-3", 1.5e-3), (".5e1", 5.0)])
def test_scientific_notation_is_a_number(tmp_path, text, number):
    assert build(recipe(tmp_path, f"output_dir: o\nlearning_rate: {text}\n"), Training)[0].learning_rate == number


def test_every_error_at_once_with_file_and_line(tmp_path):
    text = "learning_rat: 1\nepochs: three\npacking: 1\nform: scald\ntorch_dtype: x\ndtype: float23\n"
    with pytest.raises(RecipeError) as error:
        build(recipe(tmp_path, text, "--zzz", "1"), Training)
    message = str(error.value)
    assert "r.yaml:1: unknown key `learning_rat`. Did you mean `learning_rate`?" in message
    assert "r.yaml:2: `epochs`: expected int, got 'three'" in message
    assert "r.yaml:3: `packing`: expected bool, got 1" in message
    assert "r.yaml:4: `form`: 'scald' is none of scaled, one_plus; did you mean scaled?" in message
    assert "r.yaml:5: unknown key `torch_dtype`: it is called `dtype` now." in message
    assert "r.yaml:6: `dtype`: 'float23' is none of auto, float32" in message
    assert "--zzz: unknown key `zzz`." in message
    assert "`output_dir` is missing. Where to write." in message


def test_what_a_class_refuses_names_the_line(tmp_path):
    with pytest.raises(RecipeError, match=r"r.yaml:2: epochs must be at least 1"):
        build(recipe(tmp_path, "output_dir: o\nepochs: 0\n"), Training)


def test_broken_yaml_duplicate_keys_and_wrong_shape(tmp_path):
    with pytest.raises(RecipeError, match=r"r.yaml:2: not valid YAML"):
        recipe(tmp_path, "a: 1\nb: @x\n")
    with pytest.raises(RecipeError, match=r"r.yaml:2: `a` stands twice"):
        recipe(tmp_path, "a: 1\na: 2\n")
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        recipe(tmp_path, "- 1\n")


def test_environment_variables_are_expanded_or_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("AFTERGLOW_TEST", "/data")
    assert recipe(tmp_path, "data: ${AFTERGLOW_TEST}/x\n").values["data"] == "/data/x"
    with pytest.raises(RecipeError, match=r"r.yaml:1: the environment variable NOT_SET_AT_ALL is not set"):
        recipe(tmp_path, "data: ${NOT_SET_AT_ALL}/x\n")


def test_steps_keep_their_lines_and_can_be_overridden_by_name(tmp_path):
    text = "steps:\n  - grade\n  - branching: {keep_ratio: 0.9}\n  - rsr:\n      model: m\n"
    section = recipe(tmp_path, text, "--steps.branching.keep_ratio", "0.5", "--steps.grade.workers", "3")
    grade, branching, rsr = section.values["steps"]
    assert plain(section)["steps"] == [
        {"grade": {"workers": 3}},
        {"branching": {"keep_ratio": 0.5}},
        {"rsr": {"model": "m"}},
    ]
    assert isinstance(grade, Section) and branching.where.endswith("r.yaml:3")
    assert rsr.values["rsr"].lines["model"].endswith("r.yaml:5")
    with pytest.raises(RecipeError, match="no step called `rsrr`"):
        recipe(tmp_path, text, "--steps.rsrr.model", "x")


def test_a_word_after_a_step_is_its_key_of_the_same_name(tmp_path):
    section = recipe(tmp_path, "stages:\n  - train: base.yaml\n  - eval: {recipe: e.yaml}\n")
    assert plain(section)["stages"] == [{"train": {"train": "base.yaml"}}, {"eval": {"recipe": "e.yaml"}}]


def test_mapping_keys_can_be_overridden(tmp_path):
    section = recipe(tmp_path, "kwargs: {a: 1}\noutput_dir: o\n", "--kwargs.b", "2")
    assert build(section, Training)[0].kwargs == {"a": 1, "b": 2}


def test_the_steps_of_a_chain_can_be_given_on_the_command_line(tmp_path):
    steps = "[length, grade: {extract: boxed}, train: base.yaml]"
    in_file = recipe(tmp_path, f"steps: {steps}\n")
    given = recipe(tmp_path, "steps: [random]\n", "--steps", steps, "--steps.grade.workers", "2")
    assert plain(given)["steps"][1] == {"grade": {"extract": "boxed", "workers": 2}}
    given.values["steps"][1].values["grade"].values.pop("workers")
    assert plain(given) == plain(in_file)
    with pytest.raises(RecipeError, match=r"--steps:1: a step is"):
        recipe(tmp_path, "steps: [random]\n", "--steps", "[length: {}, [1, 2]]")
    assert recipe(tmp_path, "steps: [random]\n", "--steps", "[1, {").values["steps"] == "[1, {", "no YAML is text"


def test_coercion_does_not_guess():
    assert coerce(3, float) == 3.0 and isinstance(coerce(3, float), float)
    assert coerce(2.0, int) == 2
    assert coerce(None, int | None) is None
    assert coerce(7, str) == "7"
    for value, hint in [(True, int), (1, bool), ("1", int), (2.5, int), ("x", list[int]), (None, int)]:
        with pytest.raises(ValueError):
            coerce(value, hint)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match="no such recipe"):
        find_recipe("glow/nothing-like-this.yaml")


def test_every_key_of_trl_configs_can_be_parsed():
    from trl import ModelConfig, SFTConfig

    section = Section({"output_dir": "o", "model_name_or_path": "m", "use_cpu": True, "bf16": False})
    model, sft = build(section, ModelConfig, SFTConfig)
    assert model.model_name_or_path == "m" and sft.use_cpu


@pytest.mark.parametrize("word", ["no", "yes", "on", "off"])
def test_no_is_a_word_as_in_save_strategy(tmp_path, word):
    assert recipe(tmp_path, f"output_dir: {word}\n").values["output_dir"] == word
    assert recipe(tmp_path, "output_dir: o\n", "--dtype", word).values["dtype"] == word
