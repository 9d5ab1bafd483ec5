"""How many processes train, and how they are started: `afterglow train --accelerate_config NAME --num_processes N`."""

import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from ..core.child_process import end_with_parent
from ..core.errors import RecipeError
from .console import print_error

if TYPE_CHECKING:
    from .vllm_server import ServerProcess

FOLDER = Path(__file__).parent / "accelerate_configs"
SINGLE, CPU = "single", "cpu"
PROCESSES = "AFTERGLOW_PROCESSES"  # tells each process how many were asked for: `train.check_processes` compares


@dataclass(frozen=True)
class Machines:
    """Where this machine stands among several that train together; the same command runs on each."""

    count: int = 1
    rank: int = 0
    address: str = ""  # of the machine with rank 0
    port: int = 0  # on it; free on one machine, agreed upon on several

    def __post_init__(self):
        """Refuse what would wait for machines that never come.

        Raises:
            RecipeError: a number that cannot be, or no address.
        """
        if self.count < 1 or not 0 <= self.rank < self.count:
            raise RecipeError(f"--machine_rank {self.rank}: must be from 0 to --num_machines - 1 ({self.count - 1}).")
        if self.count > 1 and not (self.address and self.port):
            raise RecipeError(
                f"--num_machines {self.count}: --main_process_ip and --main_process_port are missing, the address of "
                "machine 0 and a free port on it. `afterglow launch` writes a script that sets them."
            )


@dataclass(frozen=True)
class Setup:
    """How a training is spread: the name or path of an accelerate configuration, its kind, and the processes."""

    name: str = SINGLE
    kind: str = "NO"  # accelerate's `distributed_type`
    processes: int = 1  # on all machines together
    zero_stage: int = 0  # of DeepSpeed
    machines: Machines = Machines()

    @property
    def path(self) -> Path:
        """The file that accelerate reads."""
        return config_file(self.name)


def config_file(name: str) -> Path:
    """Return the file of an accelerate configuration: a packaged one by its name, or a path.

    Raises:
        RecipeError: there is none.
    """
    packaged = FOLDER / f"{name}.yaml"
    path = packaged if packaged.is_file() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise RecipeError(f"--accelerate_config {name}: no such file, and none of {known}.")
    return path


def choose_setup(name: str | None, processes: int | None, gpus: int, machines: Machines | None = None) -> Setup:
    """Decide how a training is spread. Without a wish: every GPU that is visible, else one process.

    Args:
        name: of a packaged accelerate configuration, or the path of one.
        processes: on all machines together.
        gpus: visible on this machine.
        machines: several that train together.

    Raises:
        RecipeError: a setup that this machine cannot run, or that would silently be another one.
    """
    if processes is not None and processes < 1:
        raise RecipeError(f"--num_processes {processes}: must be at least 1.")
    machines = machines or Machines()
    here = max(gpus, 1) * machines.count
    if name is None:
        processes = processes or here
        name = SINGLE if processes == 1 else "ddp"
    config = yaml.safe_load(config_file(name).read_text(encoding="utf-8")) or {}
    kind = str(config.get("distributed_type", "NO"))
    if config_file(name).parent == FOLDER:
        processes = processes or (1 if name == SINGLE else here)
    else:
        processes = processes or int(config.get("num_processes") or 1)
    count = max(int(config.get("num_machines") or 1), machines.count)
    if kind == "NO" and processes > 1:
        raise RecipeError(f"--accelerate_config {name} is for one process; {processes} were asked for. Use `ddp`.")
    if kind == "MULTI_CPU":
        raise RecipeError(
            f"--accelerate_config {name}: `distributed_type: MULTI_CPU` starts a single process without mpirun. "
            "Use `ddp`, which also works without a GPU."
        )
    if processes % count:
        raise RecipeError(
            f"--num_processes {processes}: is the number on all {count} machines together, and must be a multiple of "
            f"{count}."
        )
    if gpus and processes > gpus * count:
        raise RecipeError(f"--num_processes {processes}: only {gpus} GPU(s) are visible here.")
    if not gpus and kind == "FSDP":
        raise RecipeError(
            f"--accelerate_config {name}: there is no GPU here, and without one accelerate silently replaces FSDP by "
            "DDP. Use `ddp` (or `zero3`, which shards on a CPU too)."
        )
    if kind == "MULTI_GPU" and processes == 1:
        name, kind = SINGLE, "NO"
    stage = int((config.get("deepspeed_config") or {}).get("zero_stage", 0)) if kind == "DEEPSPEED" else 0
    return Setup(name, kind, processes, stage, machines)


def count_gpus() -> int:
    """Return the accelerators that torch sees, without touching them."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def hide_gpus() -> None:
    """Make this process, and those it starts, a machine without GPUs. Before torch looks for them."""
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"):
        os.environ[variable] = ""


def use_one_gpu() -> None:
    """Hide all GPUs but the first: transformers would otherwise spread one process over all of them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]


def launch_training(
    recipe: str, options: list[str], setup: Setup, gpus: int, overwrite: bool, server: "ServerProcess | None" = None
) -> int:
    """Check the recipe in a process of its own, then let accelerate start the training. Returns the exit code.

    The check comes first so that a mistake is one message, not one per process with a launcher's traceback below it,
    and so that it costs no start of a server.
    """
    train = ["-m", "afterglow.launch.train", recipe, *options, *(["--overwrite"] if overwrite else [])]
    code = run_child([sys.executable, *train, "--check"])
    if code:
        return code
    environment = {PROCESSES: str(setup.processes)} | ({} if gpus else without_gpus(setup))
    cores = max((os.cpu_count() or 1) * setup.machines.count // setup.processes, 1)
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(cores))
    command = [] if setup.name == SINGLE else accelerate_command(setup, gpus)
    with server or nullcontext():
        code = run_child([sys.executable, *command, *train], environment)
        if code and server and server.process.poll() is not None:
            print_error(f"the vLLM server ended with code {server.process.returncode}. {server.last_lines()}")
    if code:
        print_error(
            f"the training ended with code {code}; the process that failed first says why, above. Once that is mended, "
            "the same command goes on from the last checkpoint."
        )
    return code


def accelerate_command(setup: Setup, gpus: int) -> list[str]:
    """Return the arguments of Python that start accelerate's launcher, up to what it launches."""
    command = ["-m", "accelerate.commands.launch", "--config_file", str(setup.path)]
    command += ["--num_processes", str(setup.processes)]
    machines = setup.machines
    if machines.count > 1:
        command += ["--num_machines", str(machines.count), "--machine_rank", str(machines.rank)]
        command += ["--main_process_ip", machines.address]
        if setup.kind == "DEEPSPEED":  # its own launcher would log in to the other machines
            command += ["--deepspeed_multinode_launcher", "standard"]
    if machines.count > 1 or setup.path.parent == FOLDER:
        command += ["--main_process_port", str(machines.port)]  # 0 is a free one: two trainings may share a machine
    return command if gpus else [*command, "--mixed_precision", "no"]


def without_gpus(setup: Setup) -> dict[str, str]:
    """Return the variables of processes without a GPU.

    The launcher for GPUs does not hand `use_cpu` on, and DeepSpeed wants to hear nothing of it.
    """
    return {"DS_ACCELERATOR": "cpu"} | ({} if setup.kind == "DEEPSPEED" else {"ACCELERATE_USE_CPU": "true"})


def run_child(command: list[str], environment: dict[str, str] | None = None) -> int:
    """Run a command that ends when we do, whatever ends us, and return its exit code."""
    child = subprocess.Popen(command, env=os.environ | (environment or {}), preexec_fn=end_with_parent)
    try:
        return child.wait()
    except KeyboardInterrupt:  # the child got it too: let it end in its own way
        child.wait()
        raise
