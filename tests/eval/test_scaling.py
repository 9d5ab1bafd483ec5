import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from afterglow.core.errors import DataError, RecipeError, RunFolderError
from afterglow.core.recipe import read_recipe
from afterglow.eval.evaluate import run
from afterglow.eval.report import run_report
from afterglow.eval.scaling import SCALING_FILE, SCALING_SCHEMA


def rows_of(ceiling, seed, count=30, start=True):
    steps = np.arange(1, count + 1) * 10
    scores = 0.3 + (ceiling - 0.3) / (1 + (60 / steps) ** 1.8)
    scores = scores + np.random.default_rng(seed).normal(0, 0.004, count)
    first = [{"step": 0, "acc": 0.3, "loss": 1.0}] if start else []
    return first + [{"step": int(s), "acc": float(a)} for s, a in zip(steps, scores, strict=True)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe(tmp_path, **keys):
    path = tmp_path / "recipe.yaml"
    base = {"suite": "scaling", "output_dir": str(tmp_path / "out"), "score": "acc", "draws": 20}
    path.write_text(yaml.safe_dump(base | keys))
    return read_recipe(path)


def test_two_runs_their_forecast_and_the_report(tmp_path, capsys):
    curves = {name: write(tmp_path / f"{name}.jsonl", rows_of(a, a > 0.65)) for name, a in (("one", 0.6), ("two", 0.7))}
    out = run(recipe(tmp_path, curves=curves, extrapolate_to=600))
    found = json.loads((out / SCALING_FILE).read_text())
    one = found["curves"]["one"]
    assert one["start"] == 0.3 and one["dropped"] == 3 and len(one["points"]) == 27
    law = one["laws"]["sigmoid"]
    truth = 0.3 + 0.3 / (1 + (60 / 600) ** 1.8)
    assert law["forecast"]["low"] - 0.003 < truth < law["forecast"]["high"] + 0.003 and not law["refused"]
    assert law["band"][-1][0] == pytest.approx(600)
    assert one["laws"]["power"]["band"][-1][0] == pytest.approx(600 if one["laws"]["power"]["forecast"] else 300)
    assert [(w["from"], w["to"], w["points"]) for w in law["windows"]] == [
        (40, 300, 27), (40, 150, 12), (10, 300, 30), (10, 150, 15)]  # fmt: skip
    common = found["common_ceiling"]
    assert not common["same"] and common["A"] == pytest.approx(0.65, abs=0.01) and set(common["runs"]) == {"one", "two"}
    scores = json.loads((out / "scores.json").read_text())["scaling"]
    assert scores["one sigmoid A"]["value"] == law["parameters"]["A"]["value"] and "one sigmoid at 600" in scores
    page = run_report(out).read_text()
    assert 'id="scaling"' in page and "C_mid" in page and page.count('aria-label="one"') == 1
    before = (out / SCALING_FILE).read_bytes()
    capsys.readouterr()
    run(recipe(tmp_path, curves=curves, extrapolate_to=600))  # finished: shown again, not made again
    assert (out / SCALING_FILE).read_bytes() == before and "sigmoid" in capsys.readouterr().out
    write(tmp_path / "one.jsonl", rows_of(0.6, 5))
    with pytest.raises(RunFolderError, match="changed"):
        run(recipe(tmp_path, curves=curves, extrapolate_to=600))


def test_groups_in_one_file_and_steps_logged_twice(tmp_path):
    rows = [row | {"seed": name} for name in ("a", "b") for row in rows_of(0.6, 0)]
    rows += [
        {"step": 300, "acc": 0.5, "seed": "b"},
        {"step": 310, "acc": None, "seed": "b"},
    ]  # a resumed run logs again
    out = run(recipe(tmp_path, curves={"x": write(tmp_path / "x.jsonl", rows)}, group="seed", law=["power"]))
    curves = json.loads((out / SCALING_FILE).read_text())["curves"]
    assert set(curves) == {"a", "b"}
    assert curves["b"]["points"][-1] == [300, 0.5] and curves["a"]["points"][-1][1] != 0.5
    assert curves["a"]["points"][:-1] == curves["b"]["points"][:-1]


def test_a_refused_forecast_says_why(tmp_path, capsys):
    file = write(tmp_path / "x.jsonl", rows_of(0.6, 0))
    out = run(recipe(tmp_path, curves={"x": file}, extrapolate_to=3_000, law=["sigmoid"]))
    law = json.loads((out / SCALING_FILE).read_text())["curves"]["x"]["laws"]["sigmoid"]
    assert law["forecast"] is None and "10.0 times the largest compute" in law["refused"][0]
    assert law["band"][-1][0] == pytest.approx(300)  # the band ends with the points
    assert "refused" in capsys.readouterr().out


def test_a_loss_has_no_highest(tmp_path):
    rows = [{"step": s, "loss": 1.5 + 8 * s**-0.5} for s in range(5, 45)]
    keys = {"curves": {"x": write(tmp_path / "x.jsonl", rows)}, "score": "loss", "law": ["power"]}
    with pytest.raises(DataError, match=r"x.jsonl:1: `loss` is 5.0\d+, above `highest: 1`"):
        run(recipe(tmp_path, **keys))
    out = run(recipe(tmp_path, **keys, highest=None))
    found = json.loads((out / SCALING_FILE).read_text())["curves"]["x"]["laws"]["power"]["parameters"]
    assert found["a"]["value"] == pytest.approx(1.5, abs=1e-3) and found["c"]["value"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    "rows, keys, message",
    [
        (rows_of(0.6, 0, start=False), {}, "no row at `step` 0"),
        (rows_of(0.6, 0, 10), {}, "9 points .* after the cut of 1; a fit needs 10"),
        (rows_of(0.6, 0), {"score": "accuracy"}, "no column 'accuracy'. Columns: acc, loss, step"),
        (rows_of(0.6, 0), {"start": 1.0}, "nothing to gain"),
        ([{"step": -1, "acc": 0.2}], {}, "x.jsonl:1: `step` is -1"),
        ([{"step": 1, "acc": "0.2"}], {}, "x.jsonl:1: `acc` is '0.2', not a finite number"),
        ([{"step": 1, "acc": float("nan")}], {}, "not a finite number"),
        ([], {}, "Columns: none"),
    ],
)
def test_points_that_cannot_be_used(tmp_path, rows, keys, message):
    with pytest.raises(DataError, match=message):
        run(recipe(tmp_path, curves={"x": write(tmp_path / "x.jsonl", rows)}, **keys))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"highest": None}, "a sigmoid needs a largest score"),
        ({"draws": 5}, "at least 20"),
        ({"law": ["logistic"]}, "none of sigmoid, power"),
        ({"extrapolate_to": -1}, "positive"),
        ({"curves": {}}, "at least one"),
    ],
)
def test_keys_that_are_refused(tmp_path, keys, message):
    with pytest.raises(RecipeError, match=message):
        run(recipe(tmp_path, **{"curves": {"x": write(tmp_path / "x.jsonl", rows_of(0.6, 0))}} | keys))


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    file = write(tmp_path / "x.jsonl", rows_of(0.6, 0))
    run(recipe(tmp_path, curves={"x": file}), dry_run=True)
    assert "27 points, 3 before the cut" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_every_key_of_the_file_is_documented(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "results_schema.md").read_text()
    section = text.split(f"## scaling.json (schema {SCALING_SCHEMA})")[1].split("\n## ")[0]
    known = {word for quoted in re.findall(r"`([^`]+)`", section) for word in re.split(r"[ ,]+", quoted)}
    out = run(recipe(tmp_path, curves={"x": write(tmp_path / "x.jsonl", rows_of(0.6, 0))}, extrapolate_to=400))
    found = json.loads((out / SCALING_FILE).read_text())
    curve = found["curves"]["x"]
    law = curve["laws"]["sigmoid"]
    keys = {*found, *curve, *curve["laws"], *law, *law["backtest"], *law["forecast"]} | {"from", "to"}
    assert keys - {"schema"} <= known, keys - known
