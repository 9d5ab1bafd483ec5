"""RLVR killed by kill -9 and started again goes on with the same prompts, table of pass rates and optimizer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from tiny_sft import logged, parameters
from tiny_tools import scripted_trainer

from afterglow.trainers.checkpoints import last_complete_checkpoint

pytestmark = pytest.mark.slow
STEPS = 5


def right(seed: int) -> bool:
    return seed % 8 < 5


def build(folder):
    return scripted_trainer(
        folder, rows=14, script={"right": right}, optim="adamw_torch", learning_rate=1e-3, max_steps=STEPS,
        save_strategy="steps", save_steps=1, retire_pass_rate=0.75,
    )  # fmt: skip


def state(folder: Path) -> tuple:
    last = folder / f"checkpoint-{STEPS}"
    moments = torch.load(last / "optimizer.pt")["state"]
    table = json.loads((last / "prompt_curriculum.json").read_text())
    return table, {(n, key): value for n, of in moments.items() for key, value in of.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer = build(folder)
    trainer.train()
    return folder, trainer


@pytest.mark.parametrize("moment", ["checkpoint", "rollouts"])
def test_killed_and_started_again_equals_undisturbed(moment, whole, tmp_path):
    worker = Path(__file__).with_name("rlvr_kill_worker.py")
    killed = subprocess.run([sys.executable, worker, tmp_path, moment], capture_output=True, text=True, timeout=280)
    assert killed.returncode == -9, killed.stderr[-3000:]
    assert (tmp_path / "checkpoint-4" / "model.safetensors").exists() == (moment == "checkpoint")
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-3"

    resumed = build(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    folder, undisturbed = whole
    assert torch.equal(parameters(resumed.model), parameters(undisturbed.model))
    assert not torch.equal(parameters(resumed.model), parameters(tiny_model()))
    (table, moments), (table_whole, moments_whole) = state(tmp_path), state(folder)
    assert table == table_whole and table["dealt"] == STEPS
    assert moments.keys() == moments_whole.keys()
    assert all(torch.equal(torch.as_tensor(moments[key]), torch.as_tensor(moments_whole[key])) for key in moments)
    for key in ("loss", "grad_norm", "reward", "prompts/retired", "rollouts/calls"):
        assert logged(resumed, key) == logged(undisturbed, key), key
