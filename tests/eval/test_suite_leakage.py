import json

import pytest
from unlearning_world import fact, write_recipe, write_rows

from afterglow.core.errors import RecipeError
from afterglow.core.recipe import read_recipe
from afterglow.eval.evaluate import run
from afterglow.eval.suite_base import Measured
from afterglow.eval.suite_leakage import LeakageConfig, LeakageSuite


def test_one_sample_in_k_gives_the_answer_away(tmp_path):
    """Three questions, four samples: none, one and all leak. leak@2 of one in four is 1 - C(3,2) / C(4,2) = 1/2."""
    path = write_rows(tmp_path / "f.jsonl", [fact(name, i) for i, name in enumerate(("Ada", "Bo", "Cy"))])
    suite = LeakageSuite(LeakageConfig(output_dir="x", suite="leakage", forget=str(path), n=4, k=[1, 2, 4]))
    suite.read()
    told = [f"Well: {name} was born in town {i}, I think." for i, name in enumerate(("Ada", "Bo", "Cy"))]
    leaking = {0: set(), 1: {2}, 2: {0, 1, 2, 3}}
    answers = {
        f"forget/{i}/{sample}": {"text": told[i] if sample in leaking[i] else "Ada was never born."}
        for i in range(3)
        for sample in range(4)
    }
    rows = suite.rows(Measured(answers=answers))
    assert [row["leaks"] for row in rows] == [0, 1, 4] and rows[1]["best"] == told[1]
    scores = suite.scores(rows, None)
    assert [scores[f"leak@{k}"]["value"] for k in (1, 2, 4)] == pytest.approx([5 / 12, 0.5, 2 / 3])


def test_samples_differ_and_are_drawn_again_alike(tmp_path, tiny_folder):
    path = write_rows(tmp_path / "f.jsonl", [fact("Ada", 0)])
    keys = {"suite": "leakage", "forget": str(path), "n": 3, "k": [3], "max_tokens": 8, "engine": "transformers"}
    said = []
    for name in ("one", "two"):
        recipe = write_recipe(
            tmp_path / f"{name}.yaml", model=str(tiny_folder), output_dir=str(tmp_path / name), **keys
        )
        lines = (run(read_recipe(recipe)) / "generations.jsonl").read_text().splitlines()
        said.append([json.loads(line)["text"] for line in lines])
    assert said[0] == said[1] and len(set(said[0])) == 3
    for changes, says in (
        ({"k": [4]}, "only 3 samples"),
        ({"temperature": 0}, "temperature is 0"),
        ({"threshold": 0}, "above 0"),
    ):
        with pytest.raises(RecipeError, match=says):
            run(read_recipe(write_recipe(tmp_path / "bad.yaml", model="m", output_dir="o", **(keys | changes))))
