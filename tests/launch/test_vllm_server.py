import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from afterglow.core.errors import GenerationError, RecipeError
from afterglow.core.server_pool import is_healthy
from afterglow.launch import vllm_server
from afterglow.launch.vllm_server import ServerProcess, beside_training, free_port, replicas, server_command, split_gpus

FAKE = Path(__file__).parents[1] / "fake_vllm_server.py"
MODEL = SimpleNamespace(model_name_or_path="org/model", model_revision="main", dtype="bfloat16")
ARGS = SimpleNamespace(
    use_vllm=True, vllm_mode="server", vllm_tensor_parallel_size=2, vllm_max_model_length=512,
    cast_lm_head_to_fp32=True, output_dir="runs/x",
)  # fmt: skip


def server(tmp_path, mode="serves", **changes) -> ServerProcess:
    port = free_port()
    command = [sys.executable, str(FAKE), str(port), mode]
    return ServerProcess(command, f"http://127.0.0.1:{port}", tmp_path / "server.log", **changes)


def test_a_server_lives_as_long_as_the_block_and_takes_its_workers_with_it(tmp_path):
    with server(tmp_path, "leaves a worker") as running:
        assert is_healthy(running.url) and running.process.poll() is None
        worker = psutil.Process(int((tmp_path / "server.log").read_text().split()[1]))
        assert worker.is_running()
    assert running.process.returncode is not None and not is_healthy(running.url)
    psutil.wait_procs([worker], timeout=10)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_a_server_that_cannot_start_says_why(tmp_path):
    with (
        pytest.raises(GenerationError, match=r"ended with code 1.*(?s:.*)CUDA out of memory"),
        server(tmp_path, "dies"),
    ):
        raise AssertionError("never healthy")


def test_a_server_that_never_answers_is_ended(tmp_path):
    hanging = server(tmp_path, "hangs", timeout=0.1)
    with pytest.raises(GenerationError, match="did not answer on http"), hanging:
        raise AssertionError("never healthy")
    assert hanging.process.returncode is not None


def test_gpus_are_divided_between_training_and_server():
    assert split_gpus(list("01234567"), 2, 2) == (list("012345"), list("67"))
    assert split_gpus(["3", "5"], 1, 1) == (["3"], ["5"])
    assert replicas(8, 2) == 4
    for count, served, parallel, says in (
        (1, 1, 1, "On one GPU use `vllm_mode: colocate`"),
        (4, 0, 1, "the server needs at least one"),
        (4, 4, 1, "and the training too"),
        (8, 3, 2, "`vllm_tensor_parallel_size: 2` does not divide the 3 GPU"),
    ):
        with pytest.raises(RecipeError, match=says):
            split_gpus([str(gpu) for gpu in range(count)], served, parallel)


def test_a_training_and_its_server_share_a_machine(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    training = SimpleNamespace(model=MODEL, args=ARGS)
    process, gpus, keys = beside_training(training, 2)
    assert gpus == 2 and vllm_server.os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert process.environment == {"CUDA_VISIBLE_DEVICES": "6,7"}
    assert keys[:2] == ["--vllm_server_base_url", process.url]
    assert process.command[process.command.index("--port") + 1] == process.url.rsplit(":", 1)[1] != keys[3]
    colocated = SimpleNamespace(model=MODEL, args=SimpleNamespace(use_vllm=True, vllm_mode="colocate"))
    with pytest.raises(RecipeError, match="samples from no server"):
        beside_training(colocated, 2)


def test_the_server_samples_as_a_colocated_engine_would():
    command = " ".join(server_command(MODEL, ARGS, 4, "0.0.0.0", 8000))
    for part in (
        "--model org/model --host 0.0.0.0 --port 8000 --logprobs-mode processed_logprobs",
        '--weight-transfer-config {"backend": "nccl"}',
        "--max-model-len 512",
        '--hf-overrides {"head_dtype": "float32"}',
        "--dtype bfloat16 --tensor-parallel-size 2 --data-parallel-size 2",
    ):
        assert part in command
    on_cpu = server_command(MODEL, ARGS, 0, "127.0.0.1", 8000)
    assert "--tensor-parallel-size" not in on_cpu and on_cpu[-4:] == list(vllm_server.ON_CPU)


@pytest.mark.slow
@pytest.mark.vllm
def test_a_real_server_is_started_asked_and_stopped(tmp_path, tiny_folder):
    pytest.importorskip("vllm")
    from trl.generation.vllm_client import VLLMClient

    from afterglow.trainers.weight_sync import watched_client

    model = SimpleNamespace(model_name_or_path=str(tiny_folder), model_revision=None, dtype=None)
    args = SimpleNamespace(**vars(ARGS) | {"cast_lm_head_to_fp32": False})
    port = free_port()
    command, url = server_command(model, args, 0, "127.0.0.1", port), f"http://127.0.0.1:{port}"
    with ServerProcess(command, url, tmp_path / "log", vllm_server.cpu_environment(), timeout=240) as running:
        client = watched_client(VLLMClient)(base_url=url)
        assert client.get_server_info()["weight_transfer_config"] is not None
        with pytest.raises(GenerationError, match=r"joining its weight-update group.*needs a CUDA device"):
            client.init_communicator("cpu")
    assert running.process.returncode is not None and not is_healthy(url)
