"""The vLLM server that a training asks for rollouts: its GPUs, its command, its start, its health, its end."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.child_process import end_with_parent
from ..core.errors import GenerationError, RecipeError
from ..core.server_pool import is_healthy

START_TIMEOUT = 1800.0  # seconds; a large model from a slow disk takes most of it
STOP_TIMEOUT = 30.0
LAST_LINES = 12
ON_CPU = ("--dtype", "float32", "--enforce-eager", "--no-enable-chunked-prefill")


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def split_gpus(gpus: list[str], server: int, tensor_parallel: int) -> tuple[list[str], list[str]]:
    """Divide the GPUs of a machine: the first for the training, the last for the server.

    Args:
        gpus: their names, as CUDA_VISIBLE_DEVICES has them.
        server: how many the server gets.
        tensor_parallel: `vllm_tensor_parallel_size`: GPUs that hold one copy of the model.

    Raises:
        RecipeError: there are too few, or they do not divide.
    """
    if server < 1 or server >= len(gpus):
        raise RecipeError(
            f"--server_gpus {server}: of the {len(gpus)} GPU(s) here, the server needs at least one and the training "
            "too. On one GPU use `vllm_mode: colocate`."
        )
    replicas(server, tensor_parallel)
    return gpus[:-server], gpus[-server:]


def replicas(gpus: int, tensor_parallel: int) -> int:
    """Return how many copies of a model a server holds.

    Raises:
        RecipeError: the GPUs do not divide.
    """
    if gpus % tensor_parallel:
        raise RecipeError(
            f"`vllm_tensor_parallel_size: {tensor_parallel}` does not divide the {gpus} GPU(s) of the server: some "
            "would idle."
        )
    return gpus // tensor_parallel


def needs_server(args: Any) -> bool:
    """Whether a training samples from a vLLM server."""
    return bool(getattr(args, "use_vllm", False)) and args.vllm_mode == "server"


def server_command(model: Any, args: Any, gpus: int, host: str, port: int) -> list[str]:
    """Return the command of the server that a training needs; it samples as colocated vLLM would.

    Args:
        model: the recipe's `ModelConfig`.
        args: its method's configuration.
        gpus: of the server; 0 is a CPU.
        host: address to listen on.
        port: port to listen on.
    """
    name, parallel = str(model.model_name_or_path), args.vllm_tensor_parallel_size
    # Not `vllm serve`: the CPU build has no such command.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", name]
    command += ["--host", host, "--port", str(port), "--logprobs-mode", "processed_logprobs"]
    command += ["--weight-transfer-config", json.dumps({"backend": "nccl"})]
    if model.model_revision not in (None, "main"):
        command += ["--revision", model.model_revision]
    if args.vllm_max_model_length:
        command += ["--max-model-len", str(args.vllm_max_model_length)]
    if args.cast_lm_head_to_fp32:
        command += ["--hf-overrides", json.dumps({"head_dtype": "float32"})]
    if not gpus:
        return [*command, *ON_CPU]
    command += ["--dtype", model.dtype or "auto", "--tensor-parallel-size", str(parallel)]
    return [*command, "--data-parallel-size", str(replicas(gpus, parallel))]


@dataclass
class ServerProcess:
    """A server that lives as long as a `with` block.

    Args:
        command: what starts it.
        url: where it answers.
        log: file for what it says.
        environment: variables besides ours.

    Raises:
        GenerationError: it ends, or does not answer, before it is healthy; with its last lines.
    """

    command: list[str]
    url: str
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    timeout: float = START_TIMEOUT

    def __enter__(self) -> "ServerProcess":
        """Start it and wait until it is healthy."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # TRL's weight updates use vLLM's development endpoints.
        environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1"} | self.environment
        with open(self.log, "ab") as out:
            self.process = subprocess.Popen(
                self.command, stdout=out, stderr=out, env=environment, start_new_session=True,
                preexec_fn=end_with_parent,
            )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _wait(self) -> None:
        deadline = time.monotonic() + self.timeout
        while not is_healthy(self.url):
            if self.process.poll() is not None:
                raise GenerationError(f"The vLLM server ended with code {self.process.returncode}. {self.last_lines()}")
            if time.monotonic() > deadline:
                raise GenerationError(
                    f"The vLLM server did not answer on {self.url} within {self.timeout:.0f} s. {self.last_lines()}"
                )
            time.sleep(0.5)

    def last_lines(self) -> str:
        """Return the end of its log, with the file's name."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        return "\n  ".join([f"The end of {self.log}:", *lines])

    def stop(self) -> None:
        """Ask it to end; after a while, end all its processes."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_TIMEOUT)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its workers, where they outlived it
        self.process.wait()


def beside_training(training: Any, server_gpus: int) -> tuple[ServerProcess, int, list[str]]:
    """Divide this machine between a training and its server (`afterglow train --server_gpus N`).

    Args:
        training: what `training_recipe.parse` returned.
        server_gpus: how many GPUs the server gets: the last ones.

    Returns:
        The server, not yet started; the GPUs left for the training, which are the visible ones from now on; and the
        keys that tell the training where the server is.

    Raises:
        RecipeError: the recipe samples from no server, or the GPUs do not divide.
    """
    from .processes import count_gpus

    _refuse_no_server(training.args)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count_gpus())))
    gpus = [name for name in visible.split(",") if name]
    ours, theirs = split_gpus(gpus, server_gpus, training.args.vllm_tensor_parallel_size)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(ours)
    port, group = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    server = ServerProcess(
        server_command(training.model, training.args, len(theirs), "127.0.0.1", port),
        url,
        Path(str(training.args.output_dir)) / ".vllm-server.log",  # a dot: no file of the run
        {"CUDA_VISIBLE_DEVICES": ",".join(theirs)},
    )
    return server, len(ours), ["--vllm_server_base_url", url, "--vllm_group_port", str(group)]


def _refuse_no_server(args: Any) -> None:
    if not needs_server(args):
        raise RecipeError("the recipe samples from no server: set `use_vllm: true` and `vllm_mode: server`.")


def cpu_environment() -> dict[str, str]:
    """Return what a server on a CPU is told: a cache of 1 GB, and no cores of its own."""
    return {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def serve(training: Any, gpus: int, host: str, port: int, dry_run: bool = False) -> int:
    """Run the server of a training until it is stopped (`afterglow serve`), and return its exit code.

    A dry run prints its command.

    Raises:
        RecipeError: the recipe samples from no server.
        MissingDependencyError: vLLM is missing or has an unsupported version.
    """
    from ..core.engine_vllm import import_vllm
    from .processes import run_child

    _refuse_no_server(training.args)
    command = server_command(training.model, training.args, gpus, host, port)
    if dry_run:
        print(shlex.join(command))
        return 0
    import_vllm()
    environment = {"VLLM_SERVER_DEV_MODE": "1"} | ({} if gpus else cpu_environment())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the child hears of our end and ends in order
    return run_child(command, environment)
