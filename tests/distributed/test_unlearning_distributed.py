"""Unlearning in two real processes against one. Each launch makes all its runs, since starting it costs most."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from unlearning_cases import KEYS, run_case, start, summary

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
CONFIGS = Path(__file__).parents[2] / "launch" / "accelerate_configs"
KINDS = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
DEEPSPEED = ["npo", "npo lora", "kl"]  # where stable unlearning refuses to start
LAUNCHES = {
    "ddp": ["kl lora", "kl", "npo", "stable sap", "stable gpn"],
    "fsdp2": ["npo lora", "kl", "npo", "stable sap", "stable hws", "stable gpn"],
    "zero2": DEEPSPEED,
    "zero3": DEEPSPEED,
}
CLOSE = 1e-5


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Results of the two-process runs of a strategy."""
    done = {}

    def launch(strategy: str) -> dict:
        if strategy not in done:
            folder = tmp_path_factory.mktemp(strategy)
            command = [sys.executable, "-m", "accelerate.commands.launch"]
            command += ["--config_file", str(CONFIGS / f"{strategy}.yaml"), "--num_processes", "2"]
            command += ["--mixed_precision", "no", "--main_process_port", "0"]
            command += [str(Path(__file__).with_name("unlearning_cases.py")), str(folder), *LAUNCHES[strategy]]
            extra = {"ddp": {"ACCELERATE_USE_CPU": "true"}, "fsdp2": {"ACCELERATE_TORCH_DEVICE": "cpu"}}
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | extra.get(strategy, {"DS_ACCELERATOR": "cpu"})
            run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
            assert run.returncode == 0, run.stderr[-6000:]
            done[strategy] = torch.load(folder / "results.pt")
            assert done[strategy]["world"] == (2, KINDS[strategy])
        return done[strategy]

    return launch


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The same runs in one process, one pair at a time."""
    done = {}

    def run(name: str) -> dict:
        if name not in done:
            done[name] = summary(run_case(tmp_path_factory.mktemp("one"), name, 1, 8))
        return done[name]

    return run


def assert_same_run(one: dict, other: dict, begin: torch.Tensor) -> None:
    """Same losses and gradients, and a parameter change that differs by rounding only."""
    assert len(one["loss"]) == 6
    for key in KEYS:  # sharpness is a difference of two losses, whose rounding shows more
        assert other[key] == pytest.approx(one[key], rel=1e-4 if key == "stable/sharpness" else CLOSE, abs=CLOSE), key
    change = (one["parameters"] - begin).norm()
    assert change > 0
    assert (other["parameters"] - one["parameters"]).norm() < CLOSE * change


SPREADS = [(strategy, name) for strategy, names in LAUNCHES.items() for name in names if "zero" not in strategy]


@pytest.mark.parametrize("strategy, name", SPREADS)
def test_one_process_equals_two(strategy, name, launched, one_process):
    assert_same_run(one_process(name), launched(strategy)[name], start(name))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_resume_in_the_middle_of_epoch_two_is_exact(strategy, launched):
    results = launched(strategy)
    assert torch.equal(results["resumed"]["parameters"], results["whole"]["parameters"])
    assert results["resumed"]["loss"] == results["whole"]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed_does_what_one_process_does(strategy, name, launched, one_process):
    pytest.importorskip("deepspeed")
    assert_same_run(one_process(name), launched(strategy)[name], start(name))
