"""RLVR with uneven tool rounds in two real processes, against one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rlvr_cases import METRICS, run_case, summary, weights
from tiny import tiny_model
from tiny_sft import parameters

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
FSDP = {
    "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True,
    "fsdp_cpu_ram_efficient_loading": False, "fsdp_state_dict_type": "FULL_STATE_DICT", "fsdp_offload_params": False,
    "fsdp_activation_checkpointing": False,
}  # fmt: skip
ZERO3 = {
    "zero_stage": 3, "zero3_init_flag": True, "zero3_save_16bit_model": True, "offload_optimizer_device": "none",
    "offload_param_device": "none", "gradient_accumulation_steps": 2,
}  # fmt: skip
KINDS = {
    "ddp": ("MULTI_CPU", {"distributed_type": "MULTI_GPU"}),
    "fsdp2": ("FSDP", {"distributed_type": "FSDP", "use_cpu": True, "fsdp_config": FSDP}),
    "zero3": ("DEEPSPEED", {"distributed_type": "DEEPSPEED", "use_cpu": False, "deepspeed_config": ZERO3}),
}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    trainer = run_case(tmp_path_factory.mktemp("one"), 1)
    return {**summary(trainer), "weights": weights(trainer)}


def spread(folder: Path, kind: str) -> list[dict]:
    """Run the case in two processes and return what each saw."""
    config = {
        "num_processes": 2,
        "num_machines": 1,
        "machine_rank": 0,
        "mixed_precision": "no",
        "rdzv_backend": "static",
    }
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(config | KINDS[kind][1]))
    worker = Path(__file__).with_name("rlvr_worker.py")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
    command += ["--main_process_port", "0", str(worker), str(folder), kind]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment |= {"ACCELERATE_USE_CPU": "true"} if kind == "ddp" else {}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    results = [torch.load(folder / f"{kind}-{rank}.pt") for rank in range(2)]
    assert [result["world"] for result in results] == [(2, KINDS[kind][0])] * 2
    return results


@pytest.mark.parametrize(
    "kind", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow)]
)
def test_uneven_tool_rounds_finish_and_agree_with_one_process(kind, one, tmp_path):
    two = spread(tmp_path, kind)
    assert len(two[0]["batches"]) == len(two[1]["batches"]) == len(one["batches"])  # the same rounds everywhere
    assert two[0]["batches"] != two[1]["batches"]  # with different work in them
    for key in METRICS:
        for rank in two:
            assert rank[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), key
    if "weights" in two[0]:
        change = (one["weights"] - parameters(tiny_model())).norm()
        assert change > 0 and (two[0]["weights"] - one["weights"]).norm() < 1e-4 * change
