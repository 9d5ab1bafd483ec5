import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from launch_recipes import training_recipe, training_rows, write_recipe, write_rows

from afterglow.core.errors import RecipeError
from afterglow.core.run_folder import RunFolder
from afterglow.launch import pipeline
from afterglow.launch.cli import main
from afterglow.launch.pipeline_recipe import check_stages, parse_pipeline

# A stage of one's own: writes its arguments, waits where it is told to, and can be killed meanwhile.
MAKER = """
import os, sys, time
from pathlib import Path
keys = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:] if "=" in word)
folder = Path(keys["output_dir"]); folder.mkdir(exist_ok=True)
with open(folder / "pids", "a") as log: log.write(f"{os.getpid()}\\n")
if keys.get("fail") == "true": sys.exit(3)
while (folder / "wait").exists(): time.sleep(0.01)
(folder / "data.jsonl").write_bytes(Path(keys["source"]).read_bytes())
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A pipeline of two stages: a program that makes data, and a filter that reads it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "maker.py").write_text(textwrap.dedent(MAKER))
    write_rows(tmp_path / "source.jsonl", training_rows())
    write_recipe(tmp_path / "one.yaml", data="made/data.jsonl", output_dir="runs/one", steps=["length"])
    stages = [
        {"make": {"module": "maker", "output_dir": "made", "source": "source.jsonl"}},
        {"filter": {"recipe": "one.yaml", "seed": 5}},
    ]
    return write_recipe(tmp_path / "pipeline.yaml", output_dir="runs", stages=stages)


@pytest.fixture
def checked_here(monkeypatch):
    """Check the recipes in this process instead of a new one, which costs seconds of imports."""
    run_child = pipeline.run_child

    def here(command, *rest):
        return main(command[3:]) if command[-1] == "--dry_run" else run_child(command, *rest)

    monkeypatch.setattr(pipeline, "run_child", here)


def stages_file() -> dict:
    return json.loads(Path("runs/stages.json").read_text())


def test_finished_stages_are_skipped_and_a_changed_input_stops(world, checked_here, capfd):
    assert main(["run", str(world)]) == 0
    first = stages_file()
    assert list(first["stages"]) == ["make maker", "filter one"]
    assert all(entry["finished"] and entry["seconds"] > 0 for entry in first["stages"].values())
    assert "seed: 5" in Path("runs/one/config.yaml").read_text()
    summary = json.loads(Path("runs/summary.json").read_text())
    assert summary["seconds"] >= sum(entry["seconds"] for entry in first["stages"].values()) - 0.1
    assert 0.01 < summary["peak_memory_gb"] < 8
    capfd.readouterr()

    assert main(["run", str(world)]) == 0
    assert "2/2 filter one: finished before" in capfd.readouterr().out
    again = stages_file()
    assert again["stages"]["filter one"] == first["stages"]["filter one"]
    assert again["seconds"] > first["seconds"], "time that was spent twice counts twice"

    # Upstream changes: the filter says which folder to overwrite.
    write_rows(Path("source.jsonl"), training_rows(20))
    assert main(["run", str(world)]) == 2
    err = capfd.readouterr().err
    assert "runs/one: `data` has changed since this run started" in err
    assert f"afterglow filter {world.parent / 'one.yaml'} --seed=5 --overwrite" in err and f"run {world}" in err
    assert not stages_file()["stages"]["filter one"]["finished"]

    # --overwrite makes all of it anew.
    assert main(["run", str(world), "--overwrite"]) == 0
    assert len(Path("runs/one/kept.jsonl").read_text().splitlines()) == 20


def test_what_was_begun_after_overwrite_is_continued(world):
    _, (make, filters) = parse_pipeline(str(world), [])
    record = pipeline.Record(Path("runs"), time.monotonic())
    with RunFolder.open("runs/one", "filter", {}):
        assert "--overwrite" not in filters.command(record._must_overwrite(filters))
        record.overwrite_since = "2000-01-01T00:00:00+00:00"
        assert not record._must_overwrite(filters), "it was started since"
        record.overwrite_since = "2999-01-01T00:00:00+00:00"
        assert record._must_overwrite(filters) and record._must_overwrite(make)
        record.stages = {make.name: {"finished": True}}
        assert not record._must_overwrite(make)


def test_kill_9_of_the_pipeline_ends_its_stage_and_the_same_command_goes_on(world, checked_here):
    made = {"module": "maker", "output_dir": "made", "source": "source.jsonl"}
    write_recipe(world, output_dir="runs", stages=[{"make": made}])
    Path("made").mkdir()
    wait, pids = Path("made/wait"), Path("made/pids")
    wait.touch()
    process = subprocess.Popen([sys.executable, "-m", "afterglow.launch.cli", "run", str(world)])
    while not pids.exists() or not pids.read_text().endswith("\n"):
        assert process.poll() is None
        time.sleep(0.01)
    stage = int(pids.read_text())
    time.sleep(0.7)  # so long that the time of the stage is on the disk when the pipeline dies
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{stage}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{stage}").exists(), "the stage outlived its pipeline"
    assert not stages_file()["stages"]["make maker"]["finished"]
    killed_after = stages_file()["seconds"]
    wait.unlink()
    assert main(["run", str(world)]) == 0
    assert len(pids.read_text().splitlines()) == 2 and Path("made/data.jsonl").exists()
    assert stages_file()["seconds"] > killed_after > 0.5


def test_a_stage_that_fails_stops_the_pipeline(world, checked_here, capfd):
    text = world.read_text().replace("output_dir: made", "output_dir: made\n    fail: true")
    world.write_text(text)
    assert main(["run", str(world)]) == 3
    err = capfd.readouterr().err
    assert "stage `make maker` (maker) ended with code 3" in err and f"Continue with: afterglow run {world}" in err
    assert not Path("runs/one").exists()


def test_all_recipes_are_checked_before_the_first_stage_starts(world, capfd):
    world.write_text(world.read_text() + "- filter: three.yaml\n- evall: x.yaml\n")
    assert main(["run", str(world), "--dry_run"]) == 2
    assert "unknown verb `evall`. Did you mean `eval`?" in capfd.readouterr().err
    world.write_text(world.read_text().replace("- evall: x.yaml\n", "- filter: two.yaml\n"))
    write_recipe(Path("two.yaml"), data="runs/one/kept.jsonl", output_dir="runs/two", stepps=[], steps=["lenth"])
    write_recipe(Path("three.yaml"), data="runs/none/kept.jsonl", output_dir="runs/one", steps=["grade"])
    assert main(["run", str(world)]) == 2
    err = capfd.readouterr().err.replace("\n", " ")
    assert "unknown key `stepps`. Did you mean `steps`?" in err and "unknown step `lenth`" in err
    assert "`data: runs/none/kept.jsonl` is not here, and no earlier stage writes it" in err
    assert "`output_dir: runs/one` is that of stage `filter one` already" in err
    assert not Path("made").exists() and not Path("runs").exists(), "nothing was started"


def test_stages_of_training_and_evaluation_are_checked_too(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training_recipe(tmp_path, tiny_folder)
    write_recipe(tmp_path / "eval.yaml", model="run", tasks=["problems.jsonl"], output_dir="e", n=2, k=[1])
    stages = [
        {"train": {"recipe": "run.yaml", "accelerate_config": "ddp", "num_processes": 2, "learning_rate": 1e-3}},
        {"eval": {"recipe": "eval.yaml", "label": "glow", "stop": ["a", "true"], "system_prompt": "12"}},
        {"report": "runs"},
    ]
    path = write_recipe(tmp_path / "p.yaml", output_dir="runs", stages=stages)
    _, (train, evaluation, report) = parse_pipeline(str(path), [])
    assert (train.name, evaluation.name, report.name) == ("train run", "eval glow", "report")
    assert train.command(False)[-2:] == ["--accelerate_config=ddp", "--num_processes=2"]
    assert train.section().values["learning_rate"] == 1e-3
    values = evaluation.section().values
    assert values["stop"] == ["a", "true"] and values["system_prompt"] == "12", "words stay words"
    assert report.command(True)[3:] == ["report", "runs"]
    with pytest.raises(RecipeError, match=r"`tasks: problems.jsonl` is not here"):
        check_stages([train, evaluation, report])
    write_rows(tmp_path / "problems.jsonl", [{"problem": "1+1", "answer": "2"}])
    check_stages([train, evaluation, report])


@pytest.mark.parametrize(
    "stages, says",
    [
        ([{"train": {"label": "x"}}], "`recipe` is missing"),
        ([{"report": "a"}, {"report": "b"}], "the label `report` is taken"),
        ([{"report": {"folder": "a", "label": "seconds"}}], "the label `seconds` is taken"),
        ([{"report": {"folder": "a", "seed": 3}}], "a report has no key `seed`"),
        ([], "`stages` is empty"),
    ],
)
def test_malformed_stages(tmp_path, stages, says):
    path = write_recipe(tmp_path / "p.yaml", output_dir="runs", stages=stages)
    with pytest.raises(RecipeError, match=says):
        parse_pipeline(str(path), [])


def test_the_summary_holds_scores_by_label(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in (("base", 0.1), ("glow", 0.5)):
        score = {"value": value, "low": value - 0.05, "high": value + 0.05}
        tasks = {"id": {"n": 8, "pass@1": score, "pass@8": score, "truncated": {"count": 1}}, "ood": {"pass@1": score}}
        with RunFolder.open(f"e-{name}", "eval", {}) as run:
            run.finish(tasks if name == "glow" else {"id": tasks["id"]})
        write_recipe(tmp_path / f"{name}.yaml", output_dir=f"e-{name}")
    path = write_recipe(tmp_path / "p.yaml", output_dir="runs", stages=[{"eval": "base.yaml"}, {"eval": "glow.yaml"}])
    folder, stages = parse_pipeline(str(path), [])
    record = pipeline.Record(folder, time.monotonic())
    record.stages = {"eval base": {"peak_memory_gb": 1.5}, "eval glow": {"peak_memory_gb": 2.25}}
    pipeline.write_summary(folder, stages, record)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["base"]["pass@1"] == {"value": 0.1, "low": 0.05, "high": pytest.approx(0.15)}
    assert set(summary["base"]) == {"pass@1", "pass@8"}
    assert summary["glow"]["pass@8"]["value"] == 0.5 and set(summary["glow"]["tasks"]) == {"id", "ood"}
    assert summary["peak_memory_gb"] == 2.25 and summary["seconds"] >= 0


def test_memory_is_that_of_the_whole_tree():
    child = subprocess.Popen([sys.executable, "-c", "x = b'1' * 300_000_000; print(1, flush=True); input()"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert child.stdout and child.stdin
    child.stdout.readline()
    with_child = pipeline.tree_memory_gb()
    child.communicate(b"\n")
    assert with_child - pipeline.tree_memory_gb() > 0.25


def test_seeds_are_as_many_stages_and_stand_in_the_summary_as_one(world, checked_here):
    keys = {"recipe": "one.yaml", "label": "few", "each_seed": [0, 7], "output_dir": "runs/few-{seed}"}
    rows = {"data": ["made/data.jsonl", "more-{seed}.jsonl"]}
    write_recipe(world, output_dir="runs", stages=[{"make": {"module": "maker", "output_dir": "made"}},
                                                   {"filter": keys | rows}])  # fmt: skip
    _, (_, first, second) = parse_pipeline(str(world), [])
    assert (first.name, second.name, second.group) == ("filter few-0", "filter few-7", "few")
    assert second.keys == {"seed": 7, "output_dir": "runs/few-7", "data": ["made/data.jsonl", "more-7.jsonl"]}

    for wrong in ([], 3, ["a"], [True]):
        write_recipe(world, output_dir="runs", stages=[{"filter": keys | {"each_seed": wrong}}])
        with pytest.raises(RecipeError, match="`each_seed` is a list of whole numbers"):
            parse_pipeline(str(world), [])
    same_folder = [{"filter": keys | {"output_dir": "runs/few"}}]
    write_recipe(world, output_dir="runs", stages=same_folder)
    _, stages = parse_pipeline(str(world), [])
    with pytest.raises(RecipeError, match=r"that of stage `filter few-0` already"):
        check_stages(stages)
    write_recipe(
        world, output_dir="runs", stages=[{"filter": keys}, {"filter": {"recipe": "one.yaml", "label": "few"}}]
    )
    with pytest.raises(RecipeError, match="label `few` is taken"):
        parse_pipeline(str(world), [])

    # Scores of two seeds, 0.2 and 0.4: Student's t with one degree of freedom, 12.706 x 0.1 either way.
    stages = [pipeline.Stage("eval", f"npo-{seed}", "x", {"output_dir": f"runs/npo-{seed}"}, "", group="npo")
              for seed in (0, 1)]  # fmt: skip
    for stage, value in zip(stages, (0.2, 0.4), strict=True):
        folder = Path(f"runs/npo-{stage.label[-1]}")
        folder.mkdir(parents=True)
        score = {"value": value, "low": 0.0, "high": 1.0}
        (folder / "manifest.json").write_text(json.dumps({"summary": {"forget": {"probability": score, "rows": 3}}}))
        write_recipe(folder / "r.yaml", output_dir=str(folder))
        stage.target = str(folder / "r.yaml")
        stage.keys = {}
    record = pipeline.Record(Path("runs"), time.monotonic())
    pipeline.write_summary(Path("runs"), stages[:1], record)
    assert json.loads(Path("runs/summary.json").read_text())["npo"] == {"probability": score | {"value": 0.2}}
    pipeline.write_summary(Path("runs"), stages, record)
    (mean,) = json.loads(Path("runs/summary.json").read_text())["npo"].values()
    assert mean["seeds"] == [0.2, 0.4] and mean["value"] == pytest.approx(0.3)
    assert mean["low"] == pytest.approx(0.3 - 1.2706, abs=1e-3) and mean["high"] == pytest.approx(
        0.3 + 1.2706, abs=1e-3
    )
