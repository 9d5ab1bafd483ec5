import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from afterglow.core.errors import RecipeError
from afterglow.launch.processes import FOLDER, Machines, Setup, choose_setup, config_file, hide_gpus, use_one_gpu

NAMES = {
    "cpu": "MULTI_GPU", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED",
    "zero3_offload": "DEEPSPEED", "single": "NO",
}  # fmt: skip


@pytest.mark.parametrize(
    "name, processes, gpus, setup",
    [
        (None, None, 0, Setup("single", "NO", 1)),
        (None, None, 1, Setup("single", "NO", 1)),
        (None, None, 8, Setup("ddp", "MULTI_GPU", 8)),
        (None, 2, 0, Setup("ddp", "MULTI_GPU", 2)),
        ("single", None, 8, Setup("single", "NO", 1)),
        ("ddp", None, 4, Setup("ddp", "MULTI_GPU", 4)),
        ("ddp", 1, 4, Setup("single", "NO", 1)),
        ("fsdp2", None, 1, Setup("fsdp2", "FSDP", 1)),
        ("zero3", 4, 8, Setup("zero3", "DEEPSPEED", 4, 3)),
        ("zero2", 2, 0, Setup("zero2", "DEEPSPEED", 2, 2)),
        ("zero3_offload", None, 2, Setup("zero3_offload", "DEEPSPEED", 2, 3)),
        ("cpu", None, 0, Setup("single", "NO", 1)),
        ("cpu", 2, 0, Setup("cpu", "MULTI_GPU", 2)),
    ],
)
def test_how_a_training_is_spread(name, processes, gpus, setup):
    assert choose_setup(name, processes, gpus) == setup


@pytest.mark.parametrize(
    "name, processes, gpus, says",
    [
        ("fsdp2", 2, 0, "silently replaces FSDP by DDP"),
        ("single", 2, 8, "is for one process; 2 were asked for"),
        ("ddp", 16, 8, "only 8 GPU"),
        ("dpp", 2, 8, "no such file, and none of cpu, ddp, fsdp2, single, zero2, zero3, zero3_offload"),
        (None, 0, 8, "must be at least 1"),
    ],
)
def test_what_would_silently_be_something_else_is_refused(name, processes, gpus, says):
    with pytest.raises(RecipeError, match=says):
        choose_setup(name, processes, gpus)


def test_several_machines_are_counted_together():
    two = Machines(2, 1, "10.0.0.1", 29500)
    assert choose_setup("fsdp2", None, 8, two) == Setup("fsdp2", "FSDP", 16, machines=two)
    with pytest.raises(RecipeError, match="on all 2 machines together, and must be a multiple of 2"):
        choose_setup("fsdp2", 7, 8, two)
    with pytest.raises(RecipeError, match="only 8 GPU"):
        choose_setup("fsdp2", 18, 8, two)


@pytest.mark.parametrize(
    "numbers, says",
    [
        ((2, 2, "head", 29500), "--machine_rank 2: must be from 0 to --num_machines - 1"),
        ((2, 0, "", 29500), "--main_process_ip and --main_process_port are missing"),
        ((2, 0, "head", 0), "--main_process_ip and --main_process_port are missing"),
    ],
)
def test_machines_that_would_wait_for_ever_are_refused(numbers, says):
    with pytest.raises(RecipeError, match=says):
        Machines(*numbers)


def test_no_gpu_is_left_to_a_training_on_cpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("ZE_AFFINITY_MASK", "0")
    hide_gpus()
    assert {os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")} == {""}


def test_a_configuration_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("distributed_type: MULTI_GPU\nnum_processes: 4\nnum_machines: 2\n")
    assert choose_setup(str(path), None, 2) == Setup(str(path), "MULTI_GPU", 4)
    path.write_text("distributed_type: MULTI_CPU\nnum_processes: 4\n")
    with pytest.raises(RecipeError, match="starts a single process without mpirun"):
        choose_setup(str(path), None, 0)


def test_the_packaged_configurations_are_read_by_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file

    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(NAMES)
    for name, kind in NAMES.items():
        text = yaml.safe_load(config_file(name).read_text())
        assert text["distributed_type"] == kind
        assert text["mixed_precision"] == ("no" if name == "cpu" else "bf16")
        loaded = load_config_from_file(str(config_file(name)))
        assert loaded.distributed_type == kind and loaded.num_machines == 1
    assert yaml.safe_load(config_file("fsdp2").read_text())["fsdp_config"]["fsdp_version"] == 2
    zero3, offload = (
        yaml.safe_load(config_file(name).read_text())["deepspeed_config"] for name in ("zero3", "zero3_offload")
    )
    assert offload == zero3 | {"offload_optimizer_device": "cpu", "offload_param_device": "cpu"}


def test_one_gpu_is_the_first_of_those_that_are_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    use_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


IN_A_CHILD = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
BY_ITSELF = "from afterglow.core.child_process import end_with_parent; end_with_parent(); " + IN_A_CHILD


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a child of its parent's death")
@pytest.mark.parametrize(
    "start",
    [
        f"from afterglow.launch.processes import run_child; run_child({[sys.executable, '-c', IN_A_CHILD, 'pid']})",
        f"import subprocess; subprocess.run({[sys.executable, '-c', BY_ITSELF, 'pid']})",
    ],
    ids=["started by us", "as a rank of a foreign launcher"],
)
def test_a_child_ends_with_its_parent(tmp_path, start):
    process = subprocess.Popen([sys.executable, "-c", start], cwd=tmp_path)
    written = tmp_path / "pid"
    while not written.exists() or not written.read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    pid = int(written.read_text())
    for _ in range(200):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            return
        time.sleep(0.02)
    raise AssertionError("the child outlived its parent")
