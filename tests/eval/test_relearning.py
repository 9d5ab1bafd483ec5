import json
import math

import pytest
from tiny import save_tiny
from unlearning_world import PEOPLE, curve_rows, fact, write_recipe, write_rows

from afterglow.core.errors import DataError, RecipeError
from afterglow.core.recipe import read_recipe
from afterglow.eval import relearning
from afterglow.eval.evaluate import run
from afterglow.eval.relearning_curve import (
    area_over_log_steps,
    curve_points,
    recovery,
    relearning_scores,
    robustness,
    steps_to_reach,
)


def test_recovery_by_hand():
    assert recovery([0.2, 0.4, 0.6], full=0.6).tolist() == pytest.approx([0, 0.5, 1])
    assert recovery([0.2, 0.1, 0.9], full=0.6).tolist() == pytest.approx([0, -0.25, 1.75]), "neither end is a wall"
    with pytest.raises(DataError, match="nothing was forgotten"):
        recovery([0.6, 0.7], full=0.6)


def test_area_weighs_the_first_steps_most():
    # log(1 + k) at 0, 1, 3 is 0, 1, 2 times log 2
    assert area_over_log_steps([0, 1, 3], [0, 1, 1]) == pytest.approx(0.75)
    assert area_over_log_steps([0, 1, 3], [0, 0, 1]) == pytest.approx(0.25)
    assert area_over_log_steps([0, 1, 2, 5, 100], [0.3] * 5) == pytest.approx(0.3)


def test_steps_to_half():
    assert steps_to_reach([0, 1, 3], [0, 0, 1], 0.5) == pytest.approx(2**1.5 - 1)
    assert steps_to_reach([0, 1, 3], [0, 0.5, 1], 0.5) == pytest.approx(1)
    assert steps_to_reach([0, 1], [0.7, 1], 0.5) == 0
    assert steps_to_reach([0, 1, 3], [0, 0.2, 0.4], 0.5) == math.inf


def test_robustness():
    assert robustness(0.4, 0.1) == 0.25 and robustness(0.1, 0.4) == 1
    assert robustness(-0.1, 0.2) == robustness(0.0, 0.2) == 1 and robustness(0.3, -0.1) == 0


def test_scores_are_read_beside_the_control():
    """The unlearned model comes half-way back at once, the control learns a quarter by the end."""
    original = [{"arm": "original", "step": 0, "probability": 0.9}]
    unlearned = curve_rows("unlearned", [[0.1, 0.5, 0.9], [0.1, 0.5, 0.5]])
    control = curve_rows("retrained", [[0.1, 0.1, 0.3], [0.1, 0.1, 0.3]])
    scores = relearning_scores(original + unlearned + control, [0, 1, 3], "probability")
    assert scores["unlearned_forget_full_recovery"]["value"] == pytest.approx(0.75)
    assert scores["unlearned_forget_full_steps_to_half"] == pytest.approx([1, 1])
    assert scores["retrained_forget_full_steps_to_half"] == [None, None]
    assert scores["retrained_forget_full_area"]["value"] == pytest.approx(0.0625)
    assert scores["unlearned_forget_full_area"]["value"] == pytest.approx((0.5 + 0.375) / 2)
    assert scores["unlearned_forget_full_area_above_control"]["value"] == pytest.approx(0.4375 - 0.0625)
    assert scores["unlearned_forget_full_robustness"]["value"] == pytest.approx((0.25 + 0.5) / 2)
    assert curve_points(unlearned, "probability")["unlearned/forget/full"][1] == pytest.approx((1, 0.5, 0.5, 0.5))

    nothing_lost = curve_rows("unlearned", [[0.9, 0.9, 0.9]] * 2)
    scores = relearning_scores(original + nothing_lost, [0, 1, 3], "probability")
    assert "nothing can be relearned" in scores["unlearned_forget_full_note"]
    assert "unlearned_forget_full_recovery" not in scores, "reported, not divided by zero"


@pytest.fixture
def recipe(tmp_path, tiny_folder, tmp_path_factory):
    save_tiny(tmp_path / "other", seed=3)
    facts = write_rows(tmp_path / "forget.jsonl", [fact(name, i) for i, name in enumerate(PEOPLE)])
    benign = write_rows(tmp_path / "benign.jsonl", [{"text": f"The {name} of the hills."} for name in PEOPLE])

    def write(name="run", **changes):
        keys = {
            "suite": "relearning", "model": str(tiny_folder), "original": str(tmp_path / "other"), "samples": 2,
            "retrained": "none", "forget": str(facts), "benign": str(benign), "steps": [0, 1, 4], "seeds": [0, 1],
            "learning_rate": 1e-2, "batch_size": 2, "output_dir": str(tmp_path / name),
        }  # fmt: skip
        return write_recipe(tmp_path / f"{name}.yaml", **(keys | changes))

    return write


def read(folder):
    return [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]


def test_end_to_end_and_killed_in_the_middle_of_an_arm(recipe, tiny_folder, monkeypatch, capsys):
    path = recipe(retrained=str(tiny_folder), benign=None)
    folder = run(read_recipe(path))
    rows = read(folder)
    assert len(rows) == 1 + 2 * 2 * 3
    arms = {}
    for row in rows[1:]:
        arms.setdefault(row["arm"], []).append(row["probability"])
    assert list(arms) == [f"{model}/forget/full/{seed}" for model in ("unlearned", "retrained") for seed in (0, 1)]
    for seed in (0, 1):
        assert arms[f"unlearned/forget/full/{seed}"] == arms[f"retrained/forget/full/{seed}"], (
            "the same weights and seed"
        )
    assert arms["unlearned/forget/full/0"][0] == arms["unlearned/forget/full/1"][0]
    assert arms["unlearned/forget/full/0"][1:] != arms["unlearned/forget/full/1"][1:]
    assert all(curve[-1] > curve[0] for curve in arms.values()), "fine-tuning on forget rows teaches them"
    assert all("unseen_probability" in row for row in rows[1:])
    scores = json.loads((folder / "scores.json").read_text())["relearning"]
    assert scores["unlearned_forget_full_robustness"]["value"] == 1

    whole = (folder / "curves.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (folder / "curves.jsonl").write_bytes(b"".join(lines[:9]) + lines[9][:20])  # a third arm of which a part is there
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"finished": None}))
    trained = []
    fine_tune = relearning.fine_tune

    def counted(*arguments):
        trained.append(arguments[4].name)
        fine_tune(*arguments)

    monkeypatch.setattr(relearning, "fine_tune", counted)
    run(read_recipe(path))
    assert trained == ["retrained/forget/full/0", "retrained/forget/full/1"]
    assert (folder / "curves.jsonl").read_bytes() == whole


def test_several_models_lora_benign_data_and_no_control(recipe, tiny_folder, capsys):
    both = {"npo": str(tiny_folder), "ga": str(tiny_folder)}
    folder = run(read_recipe(recipe(model=both, tuning=["lora"], lora_r=4, steps=[0, 3])))
    rows = read(folder)
    by_arm = {(row["arm"], row["step"]): row["probability"] for row in rows}
    assert {arm for arm, _ in by_arm} == {
        "original",
        *(f"{m}/{data}/lora/{seed}" for m in both for data in ("forget", "benign") for seed in (0, 1)),
    }  # fmt: skip
    assert by_arm["npo/benign/lora/1", 3] == by_arm["ga/benign/lora/1", 3]
    for arm in ("npo/forget/lora/0", "npo/benign/lora/0"):
        assert by_arm[arm, 0] == by_arm["npo/forget/lora/1", 0], "a fresh adapter changes nothing"
        assert by_arm[arm, 3] != by_arm[arm, 0]
    assert "No control" in capsys.readouterr().out


def test_wrong_recipes(recipe, tmp_path, capsys):
    for changes, says in (
        ({"steps": [1, 2]}, r"steps is \[1, 2\]: use increasing whole numbers from 0"),
        ({"samples": 7}, "samples is 7, but `forget` has 6 rows"),
        ({"seeds": [0]}, "name at least 2"),
        ({"original": None}, "`original` is missing. The model before it unlearned"),
        ({"metric": "rouge"}, "'rouge' is none of probability"),
        ({"model": {"retrained": "x"}}, "'retrained' cannot be the name of a model"),
    ):
        with pytest.raises(RecipeError, match=says):
            run(read_recipe(recipe(**changes)))
    run(read_recipe(recipe()), dry_run=True)
    assert "unlearned/benign/full/1: 4 steps of 2 rows" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
