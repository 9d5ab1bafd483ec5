import json
import multiprocessing
import pkgutil
import random
import shutil
import signal
import time

import pytest
from filter_tables import row, write_jsonl
from slow_filter import run_with_slow_filter

from afterglow.core.errors import DataError, RecipeError, RunFolderError
from afterglow.core.recipe import read_recipe
from afterglow.core.trajectory import DataConfig, load_trajectories
from afterglow.data_filters.chain import STEPS, run

PLAIN = "We add the two numbers and get the sum."
BRANCH = "Perhaps there is a shorter way to count."


def ten_rows():
    """r0 to r3 right, r4 to r7 wrong, i of their ten steps branch; one row is cut off, one has no answer."""
    rows = []
    for i in range(8):
        text = "\n\n".join(
            [*[BRANCH] * i, *[PLAIN] * (9 - i), f"The answer is \\boxed{{{4 if i < 4 else 5}}} of course."]
        )
        rows.append(row(f"r{i}", text, source="ab"[i % 2]))
    return [*rows, row("cut", "<think>Still at it", finish_reason="length"), row("silent", "I do not know.")]


def recipe(folder, steps, rows=None, **keys):
    """Write data and recipe; the recipe's lines are numbered from 1: data, output_dir, then the steps from line 4."""
    data = write_jsonl(folder / "data.jsonl", rows or ten_rows())
    text = f"data: {data}\noutput_dir: {folder / 'run'}\nsteps:\n" + "".join(f"  - {step}\n" for step in steps)
    path = folder / "recipe.yaml"
    path.write_text(text + "".join(f"{key}: {value}\n" for key, value in keys.items()))
    return read_recipe(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


CHAIN = ["grade: {extract: boxed}", "branching: {keep_ratio: 0.8}", "negatives: {mode: balanced}"]
RESULTS = ("kept.jsonl", "dropped.jsonl", "steps.json")


def test_the_whole_chain(tmp_path):
    folder = run(recipe(tmp_path, CHAIN))
    kept, dropped = read(folder / "kept.jsonl"), read(folder / "dropped.jsonl")
    # 10 rows, 8 kept by branching (r6 and r7 branch most), of those 4 right and 2 wrong: 2 right are surplus
    gone = {r["id"]: (r["dropped_by"], r["reason"]) for r in dropped}
    branching = ("branching", "among the most branching 20%")
    assert gone.pop("r6") == gone.pop("r7") == branching
    assert gone.pop("cut") == gone.pop("silent") == ("negatives", "not gradable")
    assert set(gone.values()) == {("negatives", "surplus positive")} and len(gone) == 2
    assert [r["correct"] for r in kept] == [True, True, False, False]
    assert sorted(r["id"] for r in kept + dropped) == sorted(r["id"] for r in ten_rows()), "nothing is lost"
    assert {r["id"]: r["branch_ratio"] for r in kept + dropped if r["id"][0] == "r"} == {
        f"r{i}": i / 10 for i in range(8)
    }
    assert kept[0]["prompt"] == ten_rows()[0]["prompt"] and list(kept[0])[:3] == ["id", "problem_id", "prompt"]
    assert set(dropped[0]) == {*kept[0], "dropped_by", "reason"}
    steps = json.loads((folder / "steps.json").read_text())
    assert [(s["step"], s["rows_in"], s["kept"], s["dropped"]) for s in steps["steps"]] == [
        ("grade", 10, 10, 0),
        ("branching", 10, 8, 2),
        ("negatives", 8, 4, 4),
    ]
    assert steps["steps"][2]["reasons"] == {"not gradable": 2, "surplus positive": 2}
    assert steps["steps"][1]["by_source"]["t"] == {"rows_in": 2, "kept": 2}
    assert steps["steps"][0]["report"]["verdicts"]["wrong"] == 4
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["finished"] and manifest["summary"] == {
        "rows_in": 10,
        "rows_invalid": 0,
        "kept": 4,
        "dropped": 6,
    }


def test_kept_rows_are_trajectories_again(tmp_path):
    folder = run(recipe(tmp_path, CHAIN))
    table = load_trajectories(DataConfig(data=str(folder / "kept.jsonl")))
    assert table["branch_ratio"][:] == [r["branch_ratio"] for r in read(folder / "kept.jsonl")]
    again = tmp_path / "again"
    again.mkdir()
    folder = run(recipe(again, ["branching: {keep_ratio: 0.5}"], rows=read(folder / "dropped.jsonl")))
    assert not {"dropped_by", "reason"} & set(read(folder / "kept.jsonl")[0]), "dropped once, kept now"


def test_a_later_step_does_not_touch_what_dropped_rows_had(tmp_path):
    rows = [r | {"correct": True, "n_words": -1} for r in ten_rows()]
    folder = run(recipe(tmp_path, ["branching: {keep_ratio: 0.5}", "grade: {extract: boxed}", "length"], rows=rows))
    kept, dropped = read(folder / "kept.jsonl"), read(folder / "dropped.jsonl")
    assert all(r["correct"] is True and r["n_words"] == -1 and r["grade_reason"] is None for r in dropped)
    assert {r["id"]: r["correct"] for r in kept}["silent"] is None and all(r["n_words"] > 0 for r in kept)
    assert all(r["correct_in_file"] is True for r in kept)


def test_a_chain_with_a_model_keeps_one_row_of_each_problem(tmp_path, tiny_folder):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    rows = [r | {"problem_id": f"p{i % 3}"} for i, r in enumerate(ten_rows())]
    steps = ["grade", f"rsr: {{model: {model}, dtype: float32}}", "branching"]
    folder = run(recipe(tmp_path, steps, rows=rows))
    kept, dropped = read(folder / "kept.jsonl"), read(folder / "dropped.jsonl")
    assert sorted(r["problem_id"] for r in kept) == ["p0", "p1", "p2"] and len(kept + dropped) == 10
    assert all(r["rsr"] > min(k["rsr"] for k in kept if k["problem_id"] == r["problem_id"]) for r in dropped)
    assert list(json.loads((folder / "steps.json").read_text())["steps"][1]["reasons"].values()) == [7]
    (model / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(RunFolderError, match=r"`steps.1-rsr.model` has changed"):
        run(recipe(tmp_path, steps, rows=rows))


def test_a_score_over_a_column_of_another_kind_is_refused(tmp_path):
    rows = [r | {"n_words": "many"} for r in ten_rows()]
    with pytest.raises(DataError, match=r"column `n_words` of type string, and a step writes int64 there.*columns"):
        run(recipe(tmp_path, ["branching: {keep_ratio: 0.5}", "length"], rows=rows))


def test_a_finished_folder_is_only_reported(tmp_path, capsys, monkeypatch):
    section = recipe(tmp_path, CHAIN)
    folder = run(section)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json*") if path.name != "manifest.json"}
    capsys.readouterr()
    monkeypatch.setattr("afterglow.data_filters.chain.load_trajectories", lambda *a, **k: pytest.fail("read again"))
    assert run(section) == folder
    assert {path: path.stat().st_mtime_ns for path in before} == before
    shown = capsys.readouterr().out
    assert "negatives" in shown and "4 of 10 rows kept" in shown


def test_another_recipe_is_refused_but_other_workers_are_not(tmp_path):
    run(recipe(tmp_path, CHAIN))
    assert run(recipe(tmp_path, ["grade: {extract: boxed, workers: 1}", *CHAIN[1:]]))
    other = recipe(tmp_path, ["grade: {extract: last}", *CHAIN[1:]])
    with pytest.raises(RunFolderError, match=r"another config: `steps` was .*--overwrite"):
        run(other)
    assert run(other, overwrite=True)
    write_jsonl(tmp_path / "data.jsonl", ten_rows()[:9])
    with pytest.raises(RunFolderError, match="`data` has changed"):
        run(other)


def test_a_mended_file_finds_no_folder_of_its_broken_self(tmp_path):
    section = recipe(tmp_path, CHAIN, rows=[{**ten_rows()[0], "completion": ""}])
    with pytest.raises(DataError, match=r"data.jsonl:1: empty completion"):
        run(section)
    assert not (tmp_path / "run").exists()
    assert run(recipe(tmp_path, CHAIN))


def test_dry_run_checks_everything_and_writes_nothing(tmp_path, capsys):
    run(recipe(tmp_path, CHAIN), dry_run=True)
    shown = capsys.readouterr().out
    assert "10 rows: 4 a, 4 b, 2 t" in shown and "keep_ratio: 0.8" in shown and "What is 2+2?" in shown
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match="Put `- grade` before"):
        run(recipe(tmp_path, ["negatives: {mode: balanced}"]), dry_run=True)


def test_rows_left_out_by_drop_invalid_are_listed(tmp_path, capsys):
    rows = [*ten_rows(), {**ten_rows()[0], "id": "empty", "completion": ""}]
    folder = run(recipe(tmp_path, ["length"], rows=rows, drop_invalid="true"))
    assert "data.jsonl:11: empty completion" in (folder / "invalid.txt").read_text()
    assert json.loads((folder / "steps.json").read_text())["rows_invalid"] == 1
    assert "1 invalid rows were left out" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# errors


def test_all_errors_of_a_recipe_come_at_once_with_their_lines(tmp_path):
    steps = [
        "grde",
        "branching: {keep_ratoi: 0.8}",
        "negatives",
        "length: {keep_ratio: 2.0}",
        "rsr: {model: 3, r_max: x}",
    ]
    with pytest.raises(RecipeError) as error:
        run(recipe(tmp_path, steps, sead=1))
    message = str(error.value)
    assert "recipe.yaml:9: unknown key `sead`. Did you mean `seed`?" in message
    assert "recipe.yaml:4: unknown step `grde`. Did you mean `grade`? Steps are grade, rsr, branching" in message
    assert "recipe.yaml:5: unknown key `keep_ratoi`. Did you mean `keep_ratio`?" in message
    assert "recipe.yaml:6: `mode` is missing" in message
    assert "recipe.yaml:7: `keep_ratio` must be above 0 and at most 1" in message
    assert "recipe.yaml:8: `r_max`: expected int, got 'x'" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: []", "r.yaml:3: `steps` is empty"),
        ("seed: 1", "`steps` is missing"),
        ("steps: [3]", "r.yaml:3: a step is `- name`"),
        ("steps: [{grade: {}, length: {}}]", "a step is `- name`"),
        ("steps: length_", "unknown step `length_`. Did you mean `length`"),
        ("steps:\n  - length: 3", "r.yaml:4: unknown key `length`"),
    ],
)
def test_malformed_steps(text, message, tmp_path):
    (tmp_path / "r.yaml").write_text(f"data: x.jsonl\noutput_dir: y\n{text}\n")
    with pytest.raises(RecipeError, match=message):
        run(read_recipe(tmp_path / "r.yaml"))


def test_a_step_without_keys_and_a_plain_list_of_names(tmp_path):
    assert run(recipe(tmp_path, ["length", "random:"]))
    assert run(recipe(tmp_path, ["length", "random"]), overwrite=True)


def test_command_line_reaches_into_a_step(tmp_path):
    recipe(tmp_path, CHAIN)
    folder = run(read_recipe(tmp_path / "recipe.yaml", ["--steps.branching.keep_ratio", "0.9"]))
    assert json.loads((folder / "steps.json").read_text())["steps"][1]["kept"] == 9


def test_a_column_that_a_late_step_needs_is_missed_before_the_first_step(tmp_path):
    with pytest.raises(DataError, match=r"`correct`, which is null in every row. Put `- grade` before `- negatives`"):
        run(recipe(tmp_path, ["length", "negatives: {mode: balanced}", "grade"]))
    bad_gold = [r | {"answer": "{{{"} for r in ten_rows()]
    for steps in (["length", "grade"], ["grade"]):
        with pytest.raises(DataError, match=r"10 row\(s\) cannot be graded"):
            run(recipe(tmp_path, steps, rows=bad_gold))
    assert not (tmp_path / "run").exists()


def test_a_chain_that_drops_everything_names_the_step_and_loses_nothing(tmp_path):
    section = recipe(tmp_path, ["random: {keep_ratio: 0.5}", "length: {min_words: 5000}", "grade"])
    for _ in range(2):  # the second time from what the first one stored
        with pytest.raises(
            DataError, match=r"step 2 \(`length`\) dropped the last 5 row\(s\): fewer than 5000 words \(5\)"
        ):
            run(section)
        assert len(read(tmp_path / "run" / "dropped.jsonl")) == 10
        assert not (tmp_path / "run" / "kept.jsonl").exists()


# ---------------------------------------------------------------------------------------------------------------------
# killed at any moment


def many_rows():
    rng = random.Random(0)
    rows = []
    for i in range(150):
        parts = [rng.choice([PLAIN, BRANCH]) for _ in range(rng.randint(1, 8))]
        text = "\n\n".join([*parts, rng.choice(["\\boxed{4}", "\\boxed{5}", "no answer"])])
        rows.append(row(str(i), text, problem_id=f"p{i // 5}", source=rng.choice("abc")))
    return rows


def test_kill_9_at_random_moments_gives_the_same_bytes(tmp_path):
    steps = ["slow", "grade", "slow: {pause: 0.001}", "branching: {keep_ratio: 0.7}", "negatives: {mode: balanced}"]
    recipe(tmp_path, steps, rows=many_rows())
    server = multiprocessing.get_context("forkserver")  # imports once, then every process starts at once
    server.set_forkserver_preload(["afterglow.data_filters.chain"])

    def start():
        child = server.Process(target=run_with_slow_filter, args=(tmp_path / "recipe.yaml",))
        child.start()
        return child

    def finish():
        child = start()
        child.join()
        assert child.exitcode == 0
        return {name: (run_folder / name).read_bytes() for name in RESULTS}

    run_folder = tmp_path / "run"
    undisturbed = finish()
    shutil.rmtree(run_folder)
    rng = random.Random(1)
    for kill in range(5):
        child, written = start(), bytes_of_steps(run_folder)
        while child.is_alive() and bytes_of_steps(run_folder) == written:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.6)
        child.kill()
        child.join()
        assert kill or child.exitcode == -signal.SIGKILL, "the first kill must hit a chain at work"
    assert finish() == undisturbed
    assert not list(run_folder.rglob(".*.partial"))


def bytes_of_steps(folder):
    return sum(path.stat().st_size for path in folder.glob("steps/*/*.jsonl"))


@pytest.mark.parametrize("stop", ["report.json", "dropped.jsonl", "kept.jsonl", "finish"])
def test_killed_between_two_files(stop, tmp_path, monkeypatch):
    folder = run(recipe(tmp_path, CHAIN))
    undisturbed = {name: (folder / name).read_bytes() for name in RESULTS}

    class Killed(BaseException):
        pass

    def at(name, original):
        def wrapped(*args, **kwargs):
            if any(stop in str(arg) for arg in (name, *args)):
                raise Killed
            return original(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        for target in ("chain.write_trajectories", "chain.write_atomic", "flow.write_atomic", "chain.RunFolder.finish"):
            name = f"afterglow.data_filters.{target}"
            patch.setattr(name, at(target, pkgutil.resolve_name(name)))
        with pytest.raises(Killed):
            run(recipe(tmp_path, CHAIN), overwrite=True)
    assert run(recipe(tmp_path, CHAIN)) == folder
    assert {name: (folder / name).read_bytes() for name in RESULTS} == undisturbed


def test_finished_steps_are_not_computed_again(tmp_path, monkeypatch):
    folder = run(recipe(tmp_path, CHAIN))
    (folder / "kept.jsonl").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"finished": None}))
    for name, step in STEPS.items():
        monkeypatch.setitem(STEPS, name, step._replace(apply=lambda *a, **k: pytest.fail("computed again")))
    assert len(read(run(recipe(tmp_path, CHAIN)) / "kept.jsonl")) == 4
