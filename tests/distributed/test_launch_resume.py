"""`afterglow train` on two real processes: a rank is killed, the same command goes on, on two processes or on one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from launch_recipes import training_recipe
from safetensors.torch import load_file
from vllm_server import free_port

from afterglow.launch.cli import main

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# AdamW has a state to be loaded; 40 epochs leave time to kill a rank.
KEYS = {"optim": "adamw_torch", "learning_rate": 1e-3, "num_train_epochs": 40, "save_steps": 20, "logging_steps": 20}


def train(recipe, *words, **popen):
    command = [sys.executable, "-m", "afterglow.launch.cli", "train", str(recipe), *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **popen)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.01)


def rank(number, process):
    """The process that trains as this rank."""
    children = psutil.Process(process.pid).children(recursive=True)
    return next(child for child in children if child.environ().get("RANK") == str(number))


def assert_same_model(one, two):
    one, two = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


def test_a_killed_rank_ends_the_training_and_nothing_is_lost(tmp_path, tiny_folder, capfd):
    one = training_recipe(tmp_path, tiny_folder, "one", **KEYS)
    assert main(["train", str(one)]) == 0
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    recipe = training_recipe(tmp_path, tiny_folder, "two", **KEYS, **halves)
    process = train(recipe, "--num_processes", "2")
    wait_for(tmp_path / "two" / "checkpoint-20" / "complete", process)
    rank(1, process).send_signal(signal.SIGKILL)
    killed = time.monotonic()
    error = process.communicate()[1]
    print(f"a killed rank: message after {time.monotonic() - killed:.1f} s", file=sys.stderr)
    assert process.returncode != 0
    assert "the same command goes on from the last checkpoint" in error.replace("\n", " ")
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["finished"] is None

    shutil.copytree(tmp_path / "two", tmp_path / "alone")
    assert main(["train", str(recipe), "--num_processes", "2"]) == 0
    assert_same_model(tmp_path / "one", tmp_path / "two")
    options = ("--output_dir", str(tmp_path / "alone"), "--gradient_accumulation_steps", "2")
    assert main(["train", str(recipe), *options]) == 0
    assert_same_model(tmp_path / "one", tmp_path / "alone")
    manifest = json.loads((tmp_path / "alone" / "manifest.json").read_text())
    assert manifest["resumed"] and manifest["world_size"] == 1


def test_ranks_end_with_their_launcher(tmp_path, tiny_folder):
    halves = {"per_device_train_batch_size": 2, "num_train_epochs": 400}
    process = train(training_recipe(tmp_path, tiny_folder, **KEYS | halves), "--num_processes", "2")
    wait_for(tmp_path / "run" / "checkpoint-20" / "complete", process)
    ranks = [rank(number, process) for number in (0, 1)]
    ranks[0].parent().send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive and "the same command goes on" in process.communicate()[1].replace("\n", " ")


def machines(recipe) -> list[subprocess.Popen]:
    """Start the command that a rendered script runs on each of two machines; here both are this one."""
    words = ["--accelerate_config", "cpu", "--num_processes", "2", "--num_machines", "2"]
    words += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    return [train(recipe, *words, "--machine_rank", str(number), start_new_session=True) for number in (0, 1)]


def end(started: list[subprocess.Popen]) -> None:
    for machine in started:
        if machine.poll() is None:
            os.killpg(machine.pid, signal.SIGKILL)


def test_two_machines_train_what_one_does(tmp_path, tiny_folder):
    keys = KEYS | {"num_train_epochs": 3}
    assert main(["train", str(training_recipe(tmp_path, tiny_folder, "one", **keys))]) == 0
    started = machines(training_recipe(tmp_path, tiny_folder, "two", **keys, per_device_train_batch_size=2))
    try:
        errors = [machine.communicate()[1] for machine in started]
    finally:
        end(started)
    assert [machine.returncode for machine in started] == [0, 0], errors
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["world_size"] == 2
    assert_same_model(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("killed", ["rank", "launcher"])
def test_a_machine_that_fails_ends_the_other(tmp_path, tiny_folder, killed):
    keys = KEYS | {"num_train_epochs": 4000, "per_device_train_batch_size": 2, "save_total_limit": 2}
    started = machines(training_recipe(tmp_path, tiny_folder, **keys))
    try:
        wait_for(tmp_path / "run" / "checkpoint-20" / "complete", started[0])
        of_second = rank(1, started[1])
        (of_second if killed == "rank" else of_second.parent()).send_signal(signal.SIGKILL)
        begin = time.monotonic()
        errors = [machine.communicate(timeout=120)[1].replace("\n", " ") for machine in started]
        print(f"the {killed} of a machine killed: both ended after {time.monotonic() - begin:.1f} s", file=sys.stderr)
    finally:
        end(started)
    assert all(machine.returncode for machine in started)
    assert all("the same command goes on from the last checkpoint" in error for error in errors), errors


@pytest.mark.timeout(900)  # DeepSpeed compiles its optimizer once
def test_zero3_on_the_cpu_trains_with_its_own_optimizer(tmp_path, tiny_folder, capfd):
    pytest.importorskip("deepspeed")
    keys = KEYS | {"num_train_epochs": 3}
    assert main(["train", str(training_recipe(tmp_path, tiny_folder, "one", **keys))]) == 0
    recipe = training_recipe(tmp_path, tiny_folder, "two", **keys, per_device_train_batch_size=2)
    assert main(["train", str(recipe), "--accelerate_config", "zero3_offload", "--num_processes", "2"]) == 0
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["distributed_type"] == "DEEPSPEED"
    assert_same_model(tmp_path / "one", tmp_path / "two")
    refused = [str(recipe), "--optim", "sgd", "--overwrite", "--accelerate_config", "zero3_offload"]
    assert main(["train", *refused, "--num_processes", "2"]) != 0
    assert "silently makes Adam of it" in capfd.readouterr().err.replace("\n", " ")
