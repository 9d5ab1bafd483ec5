import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from launch_recipes import read_jsonl, training_recipe, training_rows, write_rows
from safetensors.torch import load_file
from transformers.training_args import OptimizerNames

from afterglow.core import checkpoint_selection
from afterglow.core.errors import RecipeError, RunFolderError
from afterglow.core.recipe import read_recipe
from afterglow.launch import training_recipe as recipes
from afterglow.launch.train import main, run
from afterglow.trainers.checkpoints import last_complete_checkpoint

OFFLOAD = "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"
LOGGED = [3, 4, 6, 8, 9, 12, 15]  # every third step, every checkpoint


def train(path, *overrides, overwrite=False):
    return run(read_recipe(path, list(overrides)), overwrite)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_folder):
    """A GLOW run that nothing disturbed."""
    return train(training_recipe(tmp_path_factory.mktemp("undisturbed"), tiny_folder))


def test_the_run_folder_is_a_model_and_a_record(undisturbed, tiny_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(undisturbed)
    assert not same(weights(undisturbed), weights(tiny_folder))
    assert model.generation_config.eos_token_id is not None
    template = AutoTokenizer.from_pretrained(tiny_folder).chat_template
    assert AutoTokenizer.from_pretrained(undisturbed).chat_template == template
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert manifest["stage"] == "train" and manifest["summary"]["steps"] == 15
    assert (manifest["world_size"], manifest["distributed_type"], manifest["effective_batch"]) == (1, "NO", 4)
    assert manifest["seeds"]["seed"] == 42 and manifest["rows"] == 19
    assert set(manifest["data"]) == {"data", "model_name_or_path"} and len(manifest["chat_template"]) == 16
    rows = read_jsonl(undisturbed / "metrics.jsonl")
    assert [row["step"] for row in rows] == LOGGED
    assert {"loss", "learning_rate", "glow/weight_mean", "epoch"} <= set(rows[-1])


def test_the_resolved_config_is_a_recipe_of_the_same_run(undisturbed, tmp_path):
    config = yaml.safe_load((undisturbed / "config.yaml").read_text())
    assert config["glow_beta"] == 20.0 and config["bf16"] is False
    assert not {"use_cpu", "hub_token"} & set(config)
    shutil.copy(undisturbed / "config.yaml", tmp_path / "again.yaml")
    assert recipes.parse(read_recipe(tmp_path / "again.yaml")).config.keys() == config.keys()
    assert train(tmp_path / "again.yaml") == undisturbed, "finished before: nothing is trained"


def test_a_finished_run_is_only_reported(undisturbed, capsys):
    before = (undisturbed / "model.safetensors").stat().st_mtime_ns
    train(undisturbed.with_suffix(".yaml"))
    assert "finished before" in capsys.readouterr().out
    assert (undisturbed / "model.safetensors").stat().st_mtime_ns == before


def start(recipe) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "afterglow.launch.train", str(recipe)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for_row(child: subprocess.Popen, path, row: int) -> None:
    while not path.exists() or len(path.read_bytes().splitlines()) < row:
        if child.poll() is not None:
            raise AssertionError(f"ended with {child.returncode}: {child.stderr.read().decode()}")
        time.sleep(0.002)


def test_kill_9_and_the_same_command_give_the_undisturbed_weights(tmp_path, tiny_folder, undisturbed):
    recipe = training_recipe(tmp_path, tiny_folder)
    child = start(recipe)
    row = random.randint(1, len(LOGGED))
    wait_for_row(child, tmp_path / "run" / "metrics.jsonl", row)
    child.send_signal(signal.SIGKILL)
    child.wait()
    killed_at = last_complete_checkpoint(tmp_path / "run")
    folder = train(recipe)
    assert same(weights(folder), weights(undisturbed)), f"killed after row {row}, continued from {killed_at}"
    assert (folder / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    assert len(json.loads((folder / "manifest.json").read_text())["resumed"]) == 1


def unfinish(folder) -> None:
    """Make a finished run look as if it had been killed before its end."""
    manifest = json.loads((folder / "manifest.json").read_text()) | {"finished": None}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("method", ["glow", "sft"])
def test_a_half_written_checkpoint_is_skipped(tmp_path, tiny_folder, method, undisturbed):
    glow_keys = {"method": method}
    whole = undisturbed if method == "glow" else train(training_recipe(tmp_path, tiny_folder, "whole", **glow_keys))
    recipe = training_recipe(tmp_path, tiny_folder, **glow_keys)
    folder = train(recipe)
    for name in ("checkpoint-15", "checkpoint-12"):
        (folder / name / "complete").unlink()
    (folder / "checkpoint-12" / "optimizer.pt").write_bytes(b"half of it")
    (folder / "checkpoint-15" / "trainer_state.json").unlink()
    (folder / "model.safetensors").write_bytes(b"half of it")
    unfinish(folder)
    assert last_complete_checkpoint(folder) == folder / "checkpoint-8"
    train(recipe)
    assert same(weights(folder), weights(whole))
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert (folder / "checkpoint-15" / "complete").exists()


def test_killed_after_the_last_step_only_the_model_is_written_again(tmp_path, tiny_folder, undisturbed):
    recipe = training_recipe(tmp_path, tiny_folder)
    folder = train(recipe)
    (folder / "model.safetensors").unlink()
    unfinish(folder)
    train(recipe)
    assert same(weights(folder), weights(undisturbed))
    assert (folder / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()


def test_the_newest_checkpoints_are_kept_and_one_is_always_whole(tmp_path, tiny_folder, monkeypatch):
    from afterglow.launch import training_run

    seen = []
    rotate = training_run.rotate_checkpoints

    def watched(folder, limit, best):
        seen.append(last_complete_checkpoint(folder).name)
        rotate(folder, limit, best)

    monkeypatch.setattr(training_run, "rotate_checkpoints", watched)
    folder = train(training_recipe(tmp_path, tiny_folder, save_total_limit=1))
    assert seen == ["checkpoint-4", "checkpoint-8", "checkpoint-12", "checkpoint-15"], (
        "marked before others are deleted"
    )
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-15"]


def test_another_config_other_data_and_another_world_are_refused(tmp_path, tiny_folder):
    recipe = training_recipe(tmp_path, tiny_folder)
    folder = train(recipe)
    with pytest.raises(RunFolderError, match=r"`seed` was 42, is 3.*--overwrite"):
        train(recipe, "--seed", "3")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"world_size": 8, "distributed_type": "FSDP"}))
    with pytest.raises(RunFolderError, match=r"started with 8 process\(es\) \(FSDP\), this is 1 \(NO\)"):
        train(recipe)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_rows(tmp_path / "data.jsonl", training_rows(20))
    with pytest.raises(RunFolderError, match="`data` has changed"):
        train(recipe)
    assert train(recipe, overwrite=True) == folder
    assert json.loads((folder / "manifest.json").read_text())["rows"] == 20


def test_a_run_goes_on_under_a_version_that_has_more_keys(tmp_path, tiny_folder):
    recipe = training_recipe(tmp_path, tiny_folder)
    folder = train(recipe)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    older = {key: value for key, value in config.items() if key not in ("glow_form", "neftune_noise_alpha")}
    (folder / "config.yaml").write_text(yaml.safe_dump(older))
    with pytest.raises(RunFolderError, match="`glow_form` was 'scaled', is 'one_plus'"):
        train(recipe, "--glow_form", "one_plus")
    assert train(recipe) == folder


def test_a_run_is_spread_otherwise_only_where_the_result_is_the_same(tmp_path, tiny_folder):
    from afterglow.launch.spread import check_spread, describe_spread

    def training(**changes):
        return recipes.parse(read_recipe(training_recipe(tmp_path, tiny_folder, **changes)))

    spread = {"world_size": 2, "distributed_type": "MULTI_CPU", "effective_batch": 4, "split": [1, 2]}
    check_spread(training(), describe_spread(training()))
    check_spread(training(), spread)
    dropout = tmp_path / "dropout"
    shutil.copytree(tiny_folder, dropout)
    config = json.loads((dropout / "config.json").read_text()) | {"attention_dropout": 0.1}
    (dropout / "config.json").write_text(json.dumps(config))
    for changes, before, says in [
        ({}, {"effective_batch": 8}, "the global batch would be 4 instead of 8 rows"),
        (
            {},
            {"distributed_type": "DEEPSPEED"},
            "checkpoints of DEEPSPEED are not known to fit another number of processes",
        ),
        ({"method": "sft"}, {}, "the batches of `method: sft` depend on how they are spread"),
        ({"train_sampling_strategy": "group_by_length"}, {}, "`train_sampling_strategy: group_by_length` orders rows"),
        ({"dataloader_drop_last": True}, {}, "`dataloader_drop_last` drops other rows"),
        ({"neftune_noise_alpha": 5.0}, {}, "noise for neftune_noise_alpha"),
        ({"use_peft": True, "lora_dropout": 0.1}, {}, "noise for lora_dropout"),
        ({"model_name_or_path": str(dropout)}, {}, "noise for attention_dropout"),
    ]:
        with pytest.raises(RunFolderError, match=f"started with 2 process.*{says}"):
            check_spread(training(**changes), spread | before)


def test_the_model_that_remains_is_the_selected_checkpoint(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(checkpoint_selection, "MOST_TRUNCATED", 1.0)  # an untrained model never ends a sample
    problems = write_rows(
        tmp_path / "problems.jsonl", [{"problem_id": f"p{i}", "prompt": f"{i}?", "answer": "2"} for i in range(2)]
    )
    heldout = {"heldout_problems": str(problems), "heldout_samples": 2, "heldout_k": 1, "heldout_max_tokens": 4}
    folder = train(training_recipe(tmp_path, tiny_folder, **heldout))
    manifest = json.loads((folder / "manifest.json").read_text())
    selected = manifest["summary"]["selected"]
    assert selected == "checkpoint-4", "of equally bad and equally long ones, the first"
    assert same(weights(folder), weights(folder / selected))
    assert not same(weights(folder), weights(folder / "checkpoint-15"))
    assert [row["step"] for row in read_jsonl(folder / "heldout.jsonl")] == [4, 8, 12, 15]
    assert manifest["inputs"]["heldout_problems"] == str(problems)


def test_lora_leaves_a_merged_model_and_its_adapter(tmp_path, tiny_folder):
    from transformers import AutoModelForCausalLM

    recipe = training_recipe(tmp_path, tiny_folder, use_peft=True, lora_r=4, lora_target_modules=["q_proj", "v_proj"])
    folder = train(recipe)
    base, merged = weights(tiny_folder), weights(folder)
    changed = {name.split(".")[-2] for name in merged if not torch.equal(base[name], merged[name])}
    assert changed == {"q_proj", "v_proj"}
    assert (folder / "adapter" / "adapter_config.json").exists()
    AutoModelForCausalLM.from_pretrained(folder)
    assert (folder / "chat_template.jinja").exists()


def test_only_what_a_trainer_reads_is_kept(tmp_path, tiny_folder):
    rows = [row | {"rsr": 0.5, "tools": [{"type": "function"}], "text": "not for TRL"} for row in training_rows()]
    write_rows(tmp_path / "data.jsonl", rows)
    training = recipes.parse(read_recipe(training_recipe(tmp_path, tiny_folder)))
    assert recipes.load_table(training.data).column_names == ["id", "prompt", "completion", "tools", "correct"]


def test_weights_that_a_method_ignores_are_refused(tmp_path, tiny_folder):
    write_rows(tmp_path / "data.jsonl", [row | {"sample_weight": 2.0} for row in training_rows()])
    with pytest.raises(RecipeError, match=r"`method: sft` .* ignores the column `sample_weight`.*`method: glow`"):
        train(training_recipe(tmp_path, tiny_folder, method="sft"))
    assert not (tmp_path / "run").exists()


def test_what_is_set_for_a_machine_without_a_gpu(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    args = recipes.parse(read_recipe(training_recipe(tmp_path, tiny_folder))).args
    assert (args.use_cpu, args.bf16, args.report_to) == (True, False, [])
    args = recipes.parse(read_recipe(training_recipe(tmp_path, tiny_folder, bf16=True))).args
    assert args.bf16, "the recipe decides"


@pytest.mark.parametrize(
    "got, kind, environment, says",
    [
        (1, "NO", {"WORLD_SIZE": "2"}, "2 processes were asked for, this training has 1"),
        (1, "NO", {"AFTERGLOW_PROCESSES": "4"}, "4 processes were asked for"),
        (1, "NO", {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "need mpirun"),
        (2, "MULTI_CPU", {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, "FSDP was asked for, .* made DDP"),
        (2, "MULTI_GPU", {"WORLD_SIZE": "2"}, None),
        (2, "FSDP", {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, None),
        (1, "NO", {"ACCELERATE_MIXED_PRECISION": "no"}, None),
        (
            2,
            "DEEPSPEED",
            {"WORLD_SIZE": "2", OFFLOAD: "cpu"},
            "silently makes Adam of it",
        ),
        (2, "DEEPSPEED", {"WORLD_SIZE": "2", OFFLOAD: "none"}, None),
    ],
)
def test_silent_launch_mistakes_are_errors(monkeypatch, got, kind, environment, says):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    state = SimpleNamespace(distributed_type=SimpleNamespace(value=kind))
    args = SimpleNamespace(world_size=got, n_gpu=1, optim=OptimizerNames.SGD)
    training = SimpleNamespace(args=args, state=state)
    if says is None:
        recipes.check_processes(training)
    else:
        with pytest.raises(RecipeError, match=says):
            recipes.check_processes(training)


def test_one_process_must_not_see_several_gpus():
    state = SimpleNamespace(distributed_type=SimpleNamespace(value="NO"))
    with pytest.raises(RecipeError, match="one process sees 8 GPUs"):
        recipes.check_processes(
            SimpleNamespace(args=SimpleNamespace(world_size=1, n_gpu=8, optim="adamw_torch"), state=state)
        )


def test_check_writes_nothing_and_says_what_would_stop_the_run(tmp_path, tiny_folder, capsys):
    recipe = training_recipe(tmp_path, tiny_folder)
    assert main([str(recipe), "--check"]) == 0
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    assert main([str(recipe), "--check"]) == 2
    assert "not a run folder" in capsys.readouterr().err
