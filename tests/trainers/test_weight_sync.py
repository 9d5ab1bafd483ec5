"""Waits for a server that end. A stand-in for NCCL: a sleep in the main thread, which no other thread can interrupt."""

import subprocess
import sys
from pathlib import Path

import pytest

from afterglow.core.errors import GenerationError
from afterglow.launch.vllm_server import ServerProcess, free_port
from afterglow.trainers import weight_sync
from afterglow.trainers.weight_sync import LOST, watched, watched_client

FAKE = Path(__file__).parents[1] / "fake_vllm_server.py"
SENDS = """
import sys, time
from afterglow.trainers import weight_sync
weight_sync.LOOK_EVERY, weight_sync.LONGEST_SYNC = 0.05, float(sys.argv[2])
with weight_sync.watched(sys.argv[1], "sending it new weights"):
    print("sending", flush=True)
    time.sleep(50)
"""


@pytest.fixture
def server(tmp_path):
    port = free_port()
    command = [sys.executable, str(FAKE), str(port)]
    with ServerProcess(command, f"http://127.0.0.1:{port}", tmp_path / "log") as running:
        yield running


def sender(server, longest):
    words = [sys.executable, "-c", SENDS, server.url, str(longest)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "sending\n"
    return process


def test_a_server_killed_while_weights_are_sent_ends_the_wait(server):
    process = sender(server, 40)
    server.process.kill()
    _, error = process.communicate(timeout=40)
    assert process.returncode == LOST
    assert f"vLLM server {server.url}, while sending it new weights: it has not answered 3 times in a row" in error
    assert "the same command goes on from the last checkpoint" in error


def test_a_wait_that_never_ends_though_the_server_lives(server):
    process = sender(server, 0.2)
    _, error = process.communicate(timeout=40)
    assert process.returncode == LOST and "it answers, but this is not done" in error and "vllm_group_port" in error


def test_what_the_server_refuses_is_one_message(server):
    with (
        pytest.raises(GenerationError, match="while joining: no weight-transfer engine"),
        watched(server.url, "joining"),
    ):
        raise RuntimeError("no weight-transfer engine")
    with watched(server.url, "joining"):
        pass
    server.process.kill()
    server.process.wait()
    with pytest.raises(GenerationError, match="the server does not answer"), watched(server.url, "joining"):
        raise AssertionError("not reached")


def test_the_client_watches_both_waits(server, monkeypatch):
    class Client:
        def __init__(self, url):
            if url is None:
                raise ConnectionError("The vLLM server can't be reached")
            self.base_url, self.done = url, []

        def init_communicator(self, device):
            self.done.append(device)

        def update_named_params(self, metadata, named_params):
            self.done.append(named_params)

    seen = []
    monkeypatch.setattr(weight_sync, "_look_after", lambda url, doing, done: seen.append(doing))
    client = watched_client(Client)(server.url)
    client.init_communicator("cuda:0")
    client.update_named_params([], "weights")
    assert client.done == ["cuda:0", "weights"]
    assert seen == ["joining its weight-update group", "sending it new weights"]
    with pytest.raises(GenerationError, match=r"can't be reached.*Start both again"):
        watched_client(Client)(None)
