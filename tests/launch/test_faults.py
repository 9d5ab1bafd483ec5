"""What a full disk and an unreachable hub do to a training; the other faults stand with what they happen to."""

import errno
import os
import subprocess
import sys
import time

import psutil
import pytest
import torch
from launch_recipes import training_recipe
from safetensors.torch import load_file

from afterglow.core.errors import RunFolderError
from afterglow.launch.cli import main
from afterglow.launch.full_disk import says_when_the_disk_is_full
from afterglow.trainers.checkpoints import last_complete_checkpoint


def raise_chained():
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError as error:
        raise RuntimeError("cannot save") from error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 368832 vs 368720"),
    ],
)
def test_every_library_has_its_own_words_for_a_full_disk(tmp_path, error):
    with (
        pytest.raises(RunFolderError, match=r"the disk or your quota is full .* checkpoints before this one are whole"),
        says_when_the_disk_is_full(tmp_path),
    ):
        raise error


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (OSError(errno.EACCES, "No space left for this user"), ValueError("a bug"), RunFolderError("ours")):
        with pytest.raises(type(error)) as caught, says_when_the_disk_is_full(tmp_path):
            raise error
        assert caught.value is error
    with pytest.raises(RunFolderError, match="full"), says_when_the_disk_is_full(tmp_path):
        raise_chained()


def start(recipe, **environment):
    words = [sys.executable, "-m", "afterglow.launch.cli", "train", str(recipe)]
    return subprocess.Popen(
        words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits a running process")
def test_a_disk_that_fills_up_while_a_checkpoint_is_saved(tmp_path, tiny_folder):
    keys = {"optim": "adamw_torch", "learning_rate": 1e-3, "num_train_epochs": 40, "save_steps": 20}
    assert main(["train", str(training_recipe(tmp_path, tiny_folder, "one", **keys))]) == 0
    recipe = training_recipe(tmp_path, tiny_folder, "two", **keys)
    process = start(recipe)
    while last_complete_checkpoint(tmp_path / "two") is None:
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.01)
    limit = (last_complete_checkpoint(tmp_path / "two") / "optimizer.pt").stat().st_size // 2
    psutil.Process(process.pid).rlimit(psutil.RLIMIT_FSIZE, (limit, limit))
    error = process.communicate()[1]
    assert process.returncode == 2, error[-3000:]
    assert "the disk or your quota is full" in error and "Traceback" not in error
    assert last_complete_checkpoint(tmp_path / "two") is not None
    assert main(["train", str(recipe)]) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_one_message(tmp_path, tiny_folder):
    recipe = training_recipe(tmp_path, tiny_folder, model_name_or_path="org/not-on-this-disk")
    process = start(recipe, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "empty"))
    error = process.communicate(timeout=250)[1]
    assert process.returncode == 2, error[-3000:]
    assert "org/not-on-this-disk" in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()
