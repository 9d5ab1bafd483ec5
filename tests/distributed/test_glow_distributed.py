"""GLOW, and NPO once, in two real processes against one. A single launch makes all the runs: starting costs most."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import unlearning_cases
from glow_cases import ROWS, SPLITS_OF_ONE, SPLITS_OF_TWO, run_case, summary
from tiny import tiny_model
from tiny_sft import parameters

pytestmark = pytest.mark.distributed
CLOSE = 1e-5  # relative; see each use for what it is relative to


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder):
    """Results of the two-process runs."""
    worker = Path(__file__).with_name("glow_worker.py")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--mixed_precision", "no", "--main_process_port", "0", str(worker), str(folder)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    results = torch.load(folder / "results.pt")
    assert results["world"] == (2, "MULTI_CPU")
    return results


def assert_same_run(one: dict, other: dict) -> None:
    """Same losses, gradients and ledger, and a parameter change that differs by rounding only."""
    start = parameters(tiny_model())
    assert len(one["loss"]) == len(other["loss"])
    for key in ("loss", "grad_norm", "unweighted_loss"):
        assert other[key] == pytest.approx(one[key], rel=CLOSE), key
    torch.testing.assert_close(other["ledger"], one["ledger"], rtol=CLOSE, atol=0, equal_nan=True)
    change = (one["parameters"] - start).norm()
    assert (other["parameters"] - one["parameters"]).norm() < CLOSE * change


@pytest.mark.parametrize("name", SPLITS_OF_TWO)
def test_one_process_equals_two_and_every_accumulation(name, two, tmp_path):
    one = [summary(run_case(tmp_path, name, *split)) for split in SPLITS_OF_ONE]
    assert one[0]["glow/weight_std"][-1] > 0  # the weights differ, so their denominators matter
    assert_same_run(one[0], one[1])
    for split in SPLITS_OF_TWO[name]:
        assert_same_run(one[0], two[name, split])


def test_resume_in_the_middle_of_epoch_two_is_exact_with_two_processes(two):
    assert torch.equal(two["resumed"]["parameters"], two["undisturbed"]["parameters"])
    assert torch.equal(two["resumed"]["ledger"], two["undisturbed"]["ledger"])
    assert not two["resumed"]["ledger"].isnan().any() and two["resumed"]["ledger"].shape == (ROWS, 3)


def test_resume_with_another_number_of_processes(two, folder, tmp_path):
    resumed = summary(run_case(tmp_path, "sample", 1, 8, resume=folder / "undisturbed" / "checkpoint-5"))
    whole = {key: values[5:] if isinstance(values, list) else values for key, values in two["undisturbed"].items()}
    resumed = {key: values[5:] if isinstance(values, list) else values for key, values in resumed.items()}
    assert_same_run(whole, resumed)


def test_npo_in_two_processes_is_npo_in_one(two, tmp_path):
    """The other unlearning runs are in test_unlearning_distributed.py, which is slow."""
    one = unlearning_cases.summary(unlearning_cases.run_case(tmp_path, "npo", 1, 8))
    for key in ("loss", "grad_norm", "forget_nll", "retain_nll"):
        assert len(one[key]) == 6 and two["npo"][key] == pytest.approx(one[key], rel=CLOSE), key
    change = (one["parameters"] - unlearning_cases.start("npo")).norm()
    assert change > 0 and (two["npo"]["parameters"] - one["parameters"]).norm() < CLOSE * change
