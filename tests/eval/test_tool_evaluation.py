"""Evaluation of both modes: the same tasks with and without Python, from a scripted model in a real sandbox."""

import json

import pytest
import yaml
from scripted import ScriptedEngine, answer, call

from afterglow.core.errors import ModelError, RecipeError, SandboxError
from afterglow.core.recipe import read_recipe
from afterglow.core.trajectory import DataConfig, load_trajectories
from afterglow.eval import evaluate


def policy(prompt, seed):
    """Asked with tools it multiplies in two cells, the second of which needs the first; without, it guesses 4."""
    if "<tools>" not in prompt:
        return answer("4")
    done = prompt.count("<tool_response>\n")
    if done == 0:
        return "<tool_call>\nnonsense\n</tool_call><|im_end|>" if seed % 2 else call("x = 2")
    if done == 1:
        return call("x = 2; x * 3" if "was not run" in prompt else "x * 3")
    return answer(prompt.rpartition("<tool_response>\n")[2].split("\n")[0])


@pytest.fixture
def recipe(tmp_path, tiny_folder, monkeypatch):
    """Write a recipe of two problems whose answers are 6 and 4."""
    problems = tmp_path / "sums.jsonl"
    rows = [
        {"problem_id": name, "prompt": f"Problem {name}", "answer": gold} for name, gold in (("a", "6"), ("b", "4"))
    ]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = []

    def engine(config):
        opened.append(ScriptedEngine(policy))
        return opened[-1]

    monkeypatch.setattr(evaluate, "open_engine", engine)
    monkeypatch.setattr(ScriptedEngine, "load_weights", lambda self, model: None)
    monkeypatch.setattr(ScriptedEngine, "close", lambda self: None)

    def write(name, **changes):
        values = {
            "model": str(tiny_folder), "tasks": [str(problems)], "n": 4, "k": [1], "tools": ["none", "python"],
            "output_dir": str(tmp_path / name), "max_tokens": 2000, "answer_tokens": 50,
        }  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values | changes))
        return tmp_path / f"{name}.yaml"

    write.opened = opened
    return write


def run(path, **options):
    return evaluate.run(read_recipe(path), **options)


@pytest.fixture
def walls():
    from afterglow.core.sandbox import SandboxConfig, open_sandbox

    try:
        open_sandbox(SandboxConfig()).close()
    except SandboxError as error:
        pytest.skip(f"no isolation here: {error}")


def test_both_modes_stand_side_by_side_and_a_killed_run_goes_on(recipe, walls, tmp_path, capsys):
    folder = run(recipe("both"))
    scores = json.loads((folder / "scores.json").read_text())
    assert list(scores) == ["sums", "sums+python"]
    assert (scores["sums"]["pass@1"]["value"], scores["sums+python"]["pass@1"]["value"]) == (0.5, 0.5)
    use = scores["sums+python"]["tools"]
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    with_tool = [row for row in rows if row["task"] == "sums+python"]
    odd = sum(row["seed"] % 2 for row in with_tool)
    assert use["calls_per_sample"] == (odd + 2 * (8 - odd)) / 8 and use["called"] == 1 and use["failed"] == 0
    assert use["malformed"] == odd / (odd + odd + 2 * (8 - odd)) and "tools" not in scores["sums"]
    assert all(row["completion"][-1]["content"] == "So \\boxed{6}." for row in with_tool)
    assert [row["correct"] for row in with_tool] == [True] * 4 + [False] * 4
    assert "calls per sample" in capsys.readouterr().out
    # The rows are trajectories again, with their tools, and no two share an id.
    table = load_trajectories(DataConfig(data=str(folder / "samples.jsonl")))
    assert len(table) == 16 and table[8]["tools"][0]["function"]["name"] == "python"
    # Any half of the rows is enough to go on from, to the same bytes.
    killed = tmp_path / "killed"
    run(recipe("killed"))
    lines = (killed / "samples.jsonl").read_text().splitlines(keepends=True)
    (killed / "samples.jsonl").write_text("".join(lines[1::2]))
    (killed / "scores.json").unlink()
    manifest = json.loads((killed / "manifest.json").read_text())
    (killed / "manifest.json").write_text(json.dumps(manifest | {"finished": None}))
    run(recipe("killed"))
    assert (killed / "samples.jsonl").read_bytes() == (folder / "samples.jsonl").read_bytes()


def test_refused_before_a_model_is_loaded(recipe, tmp_path, monkeypatch):
    def none(config):
        raise SandboxError("this machine allows no isolation")

    monkeypatch.setattr(evaluate, "open_sandbox", none)
    with pytest.raises(SandboxError, match="no isolation"):
        run(recipe("unwalled"))
    assert not recipe.opened and not (tmp_path / "unwalled").exists()
    with pytest.raises(RecipeError, match="tools"):
        run(recipe("typo", tools=["bash"]))
    with pytest.raises(RecipeError, match=r"use none, python, or \[none, python\]"):
        run(recipe("twice", tools=["none", "none"]))
    monkeypatch.setattr(
        evaluate, "open_protocol", lambda *_: (_ for _ in ()).throw(ModelError("its chat template refuses tools"))
    )
    with pytest.raises(ModelError, match="refuses tools"):
        run(recipe("template"))
    assert not recipe.opened


def test_text_only_needs_no_sandbox_and_its_rows_say_nothing_of_tools(recipe, monkeypatch):
    monkeypatch.setattr(evaluate, "open_sandbox", lambda config: pytest.fail("opened"))
    folder = run(recipe("text", tools="none", think_tokens=3))
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and not any("n_calls" in row or "tools" in row for row in rows)


def test_programs_are_graded_in_the_sandbox(walls, recipe, tmp_path, monkeypatch):
    """A task of programs: half of the samples double their input, the others print 4."""

    def program(prompt, seed):
        return f"```python\nprint({'2 * int(input())' if seed % 2 else '4'})\n```<|im_end|>"

    monkeypatch.setattr(evaluate, "open_engine", lambda config: ScriptedEngine(program))
    tests = {
        name: json.dumps([{"input": given, "output": "4" if name == "a" else "6"}]) for name, given in ("a2", "b3")
    }
    rows = [{"problem_id": name, "prompt": "Double it.", "answer": gold} for name, gold in tests.items()]
    (tmp_path / "double.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "double", "data": str(tmp_path / "double.jsonl"), "grader": "code", "test_seconds": 5}
    (tmp_path / "double.yaml").write_text(yaml.safe_dump(task))
    folder = run(recipe("run", tasks=[str(tmp_path / "double.yaml")], tools=["none"]))
    found = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["correct"] for row in found] == [row["problem_id"] == "a" or row["seed"] % 2 == 1 for row in found]
    assert {row["reason"] for row in found} <= {"all tests pass", "wrong output"}
    assert json.loads((folder / "scores.json").read_text())["double"]["ungradable"]["count"] == 0
