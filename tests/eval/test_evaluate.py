import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from stub_engine import StubEngine
from vllm_server import free_port, start_server

from afterglow.core.errors import DataError, ModelError, RecipeError, RunFolderError
from afterglow.core.recipe import read_recipe
from afterglow.core.trajectory import DataConfig, load_trajectories
from afterglow.eval import evaluate
from afterglow.eval.sampling import sample_seed


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    """Write a recipe over 12 problems, n = 5; keyword arguments change it."""
    rows = [{"problem": f"What is {i}+{4 - i}?", "answer": "4", "id": f"p{i:02d}"} for i in range(12)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(name="run", **changes):
        keys = {
            "model": str(tiny_folder), "tasks": [str(tmp_path / "sums.jsonl")], "n": 5, "seed": 7,
            "columns": {"prompt": "problem", "problem_id": "id"}, "output_dir": str(tmp_path / name),
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in (keys | changes).items() if v is not None}))
        return path

    return write


@pytest.fixture
def engines(monkeypatch):
    """Evaluate with stub engines; the list holds those that were opened."""
    opened = []

    def open_stub(config):
        opened.append(StubEngine(config))
        return opened[-1]

    monkeypatch.setattr(evaluate, "open_engine", open_stub)
    return opened


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def results(folder):
    return {name: (Path(folder) / name).read_bytes() for name in ("samples.jsonl", "problems.jsonl", "scores.json")}


def test_scores_and_rows(recipe, engines, capsys):
    folder = evaluate.run(read_recipe(recipe(logprobs=True)))
    rows = read(folder / "samples.jsonl")
    assert [(row["problem_id"], row["sample_index"]) for row in rows] == [
        (f"p{i:02d}", j) for i in range(12) for j in range(5)
    ], "in the order of the problems, though the engine shuffles"
    row = rows[0]
    assert row["seed"] == sample_seed(7, "sums", "p00", 0) and row["mean_logprob"] == -0.5 and row["task"] == "sums"
    for row in rows:
        text = row["completion"][0]["content"]
        expected = None if "give up" in text else "5" not in text.rpartition("boxed")[2] and "7" not in text[-4:]
        assert row["correct"] is expected, (text, row["reason"])

    scores = json.loads((folder / "scores.json").read_text())["sums"]
    assert list(scores)[:8] == ["schema", "n", "n_problems", "pass@1", "pass@2", "pass@4", "pass@5", "avg@5"]
    right = sum(row["correct"] is True for row in rows) / 60
    assert scores["pass@1"]["value"] == scores["avg@5"]["value"] == pytest.approx(right)
    assert scores["pass@1"]["low"] < right < scores["pass@1"]["high"] and 0 < scores["maj@5"]["value"] <= 1
    cut = [row for row in rows if row["finish_reason"] == "length"]
    assert scores["truncated"] == {
        "count": len(cut), "share": len(cut) / 60, "correct": sum(row["correct"] is True for row in cut)
    }  # fmt: skip
    none = sum(row["correct"] is None for row in rows)
    assert scores["ungradable"]["count"] == none and scores["ungradable"]["reasons"] == {"no boxed answer": none}
    assert scores["mean_tokens"] == pytest.approx(sum(row["n_tokens"] for row in rows) / 60)
    problems = read(folder / "problems.jsonl")
    assert sum(problem["correct"] for problem in problems) == sum(row["correct"] is True for row in rows)
    assert "pass@5" in capsys.readouterr().out and engines[0].closed


def test_rows_are_trajectories_again(recipe, engines):
    folder = evaluate.run(read_recipe(recipe()))
    table = load_trajectories(
        DataConfig(data=str(folder / "samples.jsonl")), require=("prompt", "completion", "answer")
    )
    assert len(table) == 60 and set(table["source"]) == {engines[0].tokenizer.name_or_path}
    assert len(set(table["id"])) == 60


def test_seeds_do_not_depend_on_what_else_is_drawn(recipe, engines):
    few = evaluate.run(read_recipe(recipe("few", n=2, max_problems=3)))
    many = evaluate.run(read_recipe(recipe("many")))
    texts = {}
    for folder in (few, many):
        for row in read(folder / "samples.jsonl"):
            texts.setdefault((row["problem_id"], row["sample_index"]), set()).add(row["completion"][0]["content"])
    assert len(texts) == 60 and all(len(found) == 1 for found in texts.values())
    assert sample_seed(0, "a", "b", 1) != sample_seed(0, "a", "b", 2) < 2**63


def test_a_finished_folder_is_only_shown(recipe, engines, capsys):
    path = recipe()
    evaluate.run(read_recipe(path))
    before = results(Path(path).with_suffix(""))
    evaluate.run(read_recipe(path))
    assert len(engines) == 1 and results(Path(path).with_suffix("")) == before
    assert capsys.readouterr().out.count("maj@5") == 2
    with pytest.raises(RunFolderError, match=r"`n` was 5, is 6"):
        evaluate.run(read_recipe(path, ["--n", "6"]))
    evaluate.run(read_recipe(path, ["--n", "6"]), overwrite=True)
    assert len(engines) == 2


def undo(folder, keep):
    """Leave a folder as a kill would, with these rows and the beginning of another."""
    (folder / "samples.jsonl").write_bytes(b"".join(keep) + b'{"id": "cut o')
    (folder / "scores.json").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"finished": None}))


@pytest.mark.parametrize("kept", [0, 33, 60])
def test_resume_draws_only_what_is_missing(recipe, engines, kept, tmp_path):
    """Whatever rows a kill leaves, in whatever order, the end is the same and nothing is drawn twice."""
    whole = evaluate.run(read_recipe(recipe("whole")))
    path = recipe("killed")
    folder = evaluate.run(read_recipe(path))
    lines = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)
    random.Random(kept).shuffle(lines)
    undo(folder, keep=lines[:kept])
    evaluate.run(read_recipe(path))
    assert results(folder) == results(whole)
    assert len(engines) == (3 if kept < 60 else 2), "no model is loaded when every sample is there"


def start(path, drawn, pause):
    """Evaluate with the stub engine in a process of its own."""
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).parents[1] / "stub_engine.py"), str(path), str(pause), str(drawn)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_by_force_three_times_and_started_again(recipe, engines, tmp_path):
    whole = evaluate.run(read_recipe(recipe("whole", n=20)))
    path, drawn = recipe("killed", n=20), tmp_path / "drawn.txt"
    samples, before = tmp_path / "killed" / "samples.jsonl", 0
    for most in (60, 120, 180):
        process, wanted = start(path, drawn, 0.01), random.randrange(before, most) + 1
        while process.poll() is None and (not samples.exists() or samples.read_bytes().count(b"\n") < wanted):
            time.sleep(0.002)
        kill(process)
        kept, asked = samples.read_bytes().count(b"\n"), len(drawn.read_text().split("\n")) - 1
        assert before < kept < 240, "it was killed on the way"
        assert asked - kept <= 8, "all but the last few samples were on the disk"
        drawn.write_text("\n" * kept)
        before = kept
    evaluate.run(read_recipe(path))
    assert results(tmp_path / "killed") == results(whole)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_twenty_random_moments(recipe, engines, tmp_path):
    """At any time from its start to its end, also while it imports, sorts its rows or writes its scores.

    Half of them at a random time, half when a random number of rows is there: most of the time passes with imports.
    """
    whole = evaluate.run(read_recipe(recipe("whole", n=20)))
    path, begun = recipe("timed", n=20), time.monotonic()
    assert start(path, tmp_path / "drawn.txt", 0.01).wait() == 0
    seconds, rows = time.monotonic() - begun, set()
    for moment in range(20):
        path = recipe(f"killed{moment}", n=20)
        process = start(path, tmp_path / "drawn.txt", 0.01)
        samples = tmp_path / f"killed{moment}" / "samples.jsonl"
        if moment % 2:
            time.sleep(random.uniform(0, 1.1 * seconds))
        else:
            wanted = random.randrange(1, 240)
            while process.poll() is None and (not samples.exists() or samples.read_bytes().count(b"\n") < wanted):
                time.sleep(0.002)
        kill(process)
        rows.add(samples.read_bytes().count(b"\n") if samples.exists() else -1)
        evaluate.run(read_recipe(path))
        assert results(tmp_path / f"killed{moment}") == results(whole), moment
    assert len(rows) > 4, "the moments were different ones"


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_real_server_killed_and_restarted_in_mid_evaluation(recipe, tiny_folder, tmp_path):
    port = free_port()
    changes = {"n": 8, "max_tokens": 100, "engine": "server", "server_url": f"http://127.0.0.1:{port}"}
    server = start_server(tiny_folder, port)
    try:
        whole = evaluate.run(read_recipe(recipe("whole", **changes)))
        path, samples = recipe("killed", max_num_seqs=2, **changes), tmp_path / "killed" / "samples.jsonl"
        with ThreadPoolExecutor(1) as thread, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = thread.submit(evaluate.run, read_recipe(path))
            while not run.done() and (not samples.exists() or samples.read_bytes().count(b"\n") < 10):
                time.sleep(0.01)
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            kept = samples.read_bytes().count(b"\n")
            server = start_server(tiny_folder, port)
            run.result()
        assert 10 <= kept < 96, "it was killed on the way"
        assert results(tmp_path / "killed") == results(whole)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def test_sample_keeps_rows_without_grading(recipe, engines):
    folder = evaluate.run_sample(read_recipe(recipe()))
    rows = read(folder / "samples.jsonl")
    assert len(rows) == 60 and all(row["correct"] is None and "verdict" not in row for row in rows)
    assert not (folder / "scores.json").exists()
    with pytest.raises(RecipeError, match="unknown key `k`"):
        evaluate.run_sample(read_recipe(recipe("other", k=[1])))


def test_a_think_block_that_the_template_opened_is_put_back(recipe, engines, tiny_folder, tmp_path):
    model = tmp_path / "thinker"
    shutil.copytree(tiny_folder, model)
    template = model / "chat_template.jinja"
    template.write_text(
        template.read_text().replace("<|im_start|>assistant\\n' }}", "<|im_start|>assistant\\n<think>\\n' }}")
    )
    folder = evaluate.run(read_recipe(recipe(model=str(model), max_problems=2)))
    rows = read(folder / "samples.jsonl")
    assert all(row["completion"][0]["content"].startswith("<think>\nLet me") for row in rows)
    assert {row["reason"] for row in rows} == {"truncated think block"}, "the chain never closed"


def test_bad_input_is_refused_before_a_model_is_loaded(recipe, engines, tiny_folder, tmp_path):
    with pytest.raises(RecipeError, match=r"`k` is 8, but there are only 5 samples"):
        evaluate.run(read_recipe(recipe(k=[1, 8])))
    with pytest.raises(RecipeError, match=r"unknown key `temprature`. Did you mean `temperature`\?"):
        evaluate.run(read_recipe(recipe(temprature=1)))
    with pytest.raises(RecipeError, match=r"`tasks` is missing"):
        evaluate.run(read_recipe(recipe(tasks=None)))
    (tmp_path / "bad.jsonl").write_text('{"problem": "x?", "answer": "$t(0,4]$", "id": "b1"}\n')
    with pytest.raises(
        DataError, match=r"bad.jsonl \(task bad\): 1 problem.*\n  problem 'b1': .*gold cannot be parsed"
    ):
        evaluate.run(read_recipe(recipe(tasks=str(tmp_path / "bad.jsonl"))))
    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder, bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"bare: the tokenizer has no chat template"):
        evaluate.run(read_recipe(recipe(model=str(bare))))
    assert not engines and not (tmp_path / "run").exists()


def test_another_model_at_the_same_path_is_another_run(recipe, engines, tiny_folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    path = recipe(model=str(model))
    evaluate.run(read_recipe(path))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(RunFolderError, match="`model` has changed"):
        evaluate.run(read_recipe(path))


def test_dry_run_writes_nothing(recipe, engines, tmp_path, capsys):
    path = recipe()
    before = sorted(tmp_path.iterdir())
    evaluate.run(read_recipe(path), dry_run=True)
    assert sorted(tmp_path.iterdir()) == before and not engines
    out = capsys.readouterr().out
    assert "What is 0+4?" in out and "60" in out and "Nothing was written." in out


@pytest.mark.vllm
def test_vllm_end_to_end(recipe, tiny_folder):
    """The untrained model says nothing of use, but each sample is drawn, graded as such, and drawn again alike."""
    changes = {"n": 4, "max_tokens": 24, "max_problems": 6, "dtype": "float32", "max_model_len": 512, "k": [1, 4]}
    path = recipe(**changes)
    folder = evaluate.run(read_recipe(path))
    rows = read(folder / "samples.jsonl")
    assert len(rows) == 24 and len({row["completion"][0]["content"] for row in rows}) == 24
    assert all(0 < row["n_tokens"] <= 24 and row["source"] == str(tiny_folder) for row in rows)
    scores = json.loads((folder / "scores.json").read_text())["sums"]
    assert scores["pass@4"]["value"] == 0 < scores["pass@4"]["high"] and scores["truncated"]["count"] > 0

    whole = results(folder)
    undo(folder, keep=whole["samples.jsonl"].splitlines(keepends=True)[::3])
    evaluate.run(read_recipe(path))
    assert results(folder) == whole
