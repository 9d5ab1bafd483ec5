"""Every training recipe under every accelerate configuration that splits a training: two steps in two CPU processes.

    make smoke        or, for some of them:  python tests/smoke_table.py FOLDER WORD

writes FOLDER/cells.jsonl, a row per cell as it ends (the same command goes on there, and runs what failed again), one
log per process, and FOLDER/table.md. The runs are those of `smoke.py`.

One process imports everything once and forks two for each cell, with the environment that accelerate's own launcher
makes of the packaged configuration: a cell costs seconds, and one that crashes or hangs is a row and takes none along.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  the environment of the tests
from smoke import Smoke, check_training
from vllm_server import free_port

from afterglow.core.errors import AfterglowError
from afterglow.core.provenance import describe_machine, describe_versions
from afterglow.core.recipe import Section, read_recipe
from afterglow.core.run_folder import JsonlLog, write_atomic
from afterglow.launch.processes import PROCESSES, Setup, accelerate_command, without_gpus
from afterglow.launch.recipe_shelf import packaged_recipes, verb_of_text
from afterglow.launch.train import run

# Configuration -> its kind, and accelerate's type of such a training here.
KINDS = {
    "ddp": ("MULTI_GPU", "MULTI_CPU"), "fsdp2": ("FSDP", "FSDP"), "zero2": ("DEEPSPEED", "DEEPSPEED"),
    "zero3": ("DEEPSPEED", "DEEPSPEED"),
}  # fmt: skip
# FSDP2 and DeepSpeed must not hear of `use_cpu`, without which transformers refuses `bf16` where there is no GPU. RLVR
# has a head in float32; under bf16 accelerate makes the rest of FSDP2's weights so too, here the recipe must say it.
ON_GLOO = {"use_cpu": False, "ddp_backend": "gloo", "bf16": False}
RLVR_ON_GLOO = ON_GLOO | {"dtype": "float32"}
TWO_STEPS, REFUSED, FAILED = "two steps", "refused", "failed"
SIGNS = {TWO_STEPS: "✓", REFUSED: "refused", FAILED: "**failed**"}
CELL_SECONDS, OTHER_SECONDS = 300, 20  # before a cell, or the second process of one that failed, is ended


def training_recipes() -> list[str]:
    """Name the packaged recipes that train."""
    return [name for name, path in packaged_recipes().items() if verb_of_text(path.read_text()) == "train"]


def environment(config: str) -> dict[str, str]:
    """Return what accelerate's launcher adds to the environment of two processes without a GPU."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    kind = KINDS[config][0]
    setup = Setup(config, kind, 2)
    words = accelerate_command(setup, gpus=0)[2:]
    options, file, _ = _validate_launch_command(launch_command_parser().parse_args([*words, "train.py"]))
    options.deepspeed_fields_from_accelerate_config = ",".join(getattr(file, "deepspeed_config", {}))
    made = prepare_deepspeed_cmd_env(options)[1] if kind == "DEEPSPEED" else prepare_multi_gpu_env(options)
    added = {name: value for name, value in made.items() if os.environ.get(name) != value}
    own = {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"} if kind == "FSDP" else without_gpus(setup)
    port = str(free_port())
    return added | own | {PROCESSES: "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def changes(name: str, config: str) -> dict[str, Any]:
    """Return what a recipe must say otherwise where there is no GPU."""
    if config == "ddp":
        return {}
    return RLVR_ON_GLOO if read_recipe(name).values["method"].endswith("rlvr") else ON_GLOO


def take_the_cpu_for_a_gpu() -> None:
    """Let accelerate make FSDP on a CPU: gloo belongs to a GPU, it is told, and that GPU is the CPU."""
    from accelerate.state import DistributedType, PartialState

    PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)


def train_cell(section: Section, config: str) -> None:
    """Train one recipe in this process, one of two, and check the type of the training and what it left."""
    if config == "fsdp2":
        take_the_cpu_for_a_gpu()
    folder = run(section)
    if os.environ["RANK"] == "0":
        check_training(folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        found = manifest["world_size"], manifest["distributed_type"]
        assert found == (2, KINDS[config][1]), f"trained as {found}"


def in_two_processes(work: Callable[[], None], variables: dict[str, str], logs: Path) -> tuple[str, str]:
    """Do the same work in two forked processes and return its result with a reason.

    Args:
        work: what each does; an `AfterglowError` is a refusal.
        variables: added to the environment of both, which differ by rank.
        logs: folder for what they print, `0.log` and `1.log`.
    """
    logs.mkdir(parents=True, exist_ok=True)
    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe(duplex=False) for _ in range(2)]
    ranks = [
        fork.Process(target=_rank, args=(work, variables | {"RANK": str(i), "LOCAL_RANK": str(i)}, logs, pipes[i][1]))
        for i in range(2)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + CELL_SECONDS
    while any(rank.is_alive() for rank in ranks) and time.monotonic() < deadline:
        multiprocessing.connection.wait([rank.sentinel for rank in ranks if rank.is_alive()], 1)
        if any(rank.exitcode for rank in ranks):
            deadline = min(deadline, time.monotonic() + OTHER_SECONDS)
    hung = [rank for rank in ranks if rank.is_alive()]
    for rank in hung:
        rank.kill()
        rank.join()
    return _joint([receiver.recv() if receiver.poll() else None for receiver, _ in pipes], ranks)


def _rank(work: Callable[[], None], variables: dict[str, str], logs: Path, outcome: Any) -> None:
    """Do the work as one of the two, with nothing left to the parent's clean-up."""
    os.environ.update(variables)
    log = os.open(logs / f"{variables['RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 0
    try:
        work()
        outcome.send((TWO_STEPS, ""))
    except AfterglowError as error:
        outcome.send((REFUSED, str(error)))
    except BaseException as error:
        traceback.print_exc()
        outcome.send((FAILED, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"))
        code = 1
    sys.stdout.flush()
    os._exit(code)


def _joint(outcomes: list[tuple[str, str] | None], ranks: list[Any]) -> tuple[str, str]:
    """Make one result of two: what failed first tells, a refusal counts only if both refuse."""
    for outcome in outcomes:
        if outcome and outcome[0] == FAILED:
            return outcome
    for outcome, rank in zip(outcomes, ranks, strict=True):
        if outcome is None:
            return FAILED, f"a process ended with code {rank.exitcode}"
    results = {outcome[0] for outcome in outcomes if outcome}
    if len(results) > 1:
        return FAILED, f"one process of two {REFUSED}: {next(o[1] for o in outcomes if o and o[0] == REFUSED)}"
    return outcomes[0] or (FAILED, "")


def fill(folder: Path, recipes: list[str], work: Callable[[Section, str], None] = train_cell) -> list[dict]:
    """Run the cells that are not there yet, or failed, and return all rows that the folder holds, the newest last."""
    cells = JsonlLog(folder / "cells.jsonl")
    done = {(row["recipe"], row["config"]) for row in cells.rows() if row["result"] != FAILED}
    smoke = Smoke(folder)
    for name in recipes:
        for config in KINDS:
            if (name, config) in done:
                continue
            start = time.monotonic()
            section = smoke.section(name, folder / "work", changes(name, config))
            logs = folder / "logs" / f"{name.replace('/', '-').removesuffix('.yaml')}-{config}"
            result, reason = in_two_processes(lambda s=section, c=config: work(s, c), environment(config), logs)
            shutil.rmtree(folder / "work", ignore_errors=True)
            cells.append({"recipe": name, "config": config, "result": result, "reason": reason,
                          "seconds": round(time.monotonic() - start, 1)})  # fmt: skip
            print(f"{name} {config}: {result} {reason.splitlines()[0] if reason else ''}", flush=True)
    rows = list(cells.rows())
    cells.close()
    return rows


def table(rows: Iterable[dict]) -> str:
    """Return the rows as a Markdown table, a line per recipe, with the reasons numbered below it."""
    found = {(row["recipe"], row["config"]): row for row in rows}
    notes: dict[str, int] = {}
    lines = [f"| recipe | {' | '.join(KINDS)} |", f"|---|{'---|' * len(KINDS)}"]
    for name in sorted({recipe for recipe, _ in found}):
        signs = []
        for config in KINDS:
            row = found.get((name, config))
            reason = re.sub(r"^\S+\.yaml:\d+: ", "", " ".join(row["reason"].split())) if row else ""
            number = f" ({notes.setdefault(reason, len(notes) + 1)})" if reason else ""
            signs.append((SIGNS[row["result"]] if row else "not run") + number)
        lines.append(f"| `{name.removesuffix('.yaml')}` | {' | '.join(signs)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for reason, number in notes.items())]) + "\n"


def summary(rows: Iterable[dict]) -> str:
    """Say how many cells ended how, when, and on which machine."""
    last = list({(row["recipe"], row["config"]): row for row in rows}.values())
    counts = {result: sum(row["result"] == result for row in last) for result in SIGNS}
    machine, versions = describe_machine(), describe_versions()
    names = ("torch", "transformers", "trl", "accelerate", "deepspeed", "peft")
    return (
        f"{len(last)} cells: {', '.join(f'{count} {result}' for result, count in counts.items())}; "
        f"{sum(row['seconds'] for row in last) / max(len(last), 1):.1f} s a cell. {datetime.now(UTC):%Y-%m-%d}, "
        f"{machine['processor']}, {machine['cores']} cores, "
        f"{', '.join(f'{name} {versions[name]}' for name in names if name in versions)}.\n"
    )


def main(folder: str, word: str = "") -> None:
    """Fill the table of the recipes with a word in their name."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import peft  # noqa: F401  imported once, not in every cell
    import trl.trainer.grpo_trainer
    import trl.trainer.sft_trainer  # noqa: F401
    from deepspeed.comm.torch import build_shm_op

    import afterglow.launch.training_run  # noqa: F401
    from afterglow.trainers import glow, stable_unlearning, tool_rlvr, unlearning  # noqa: F401

    build_shm_op()  # DeepSpeed compiles it where it is not cached

    target = Path(folder).resolve()
    target.mkdir(parents=True, exist_ok=True)
    os.chdir(target)  # recipes find their templates in the package
    os.environ["AFTERGLOW_DATA"] = "/data"
    rows = fill(target, [name for name in training_recipes() if word in name])
    write_atomic(target / "table.md", f"{summary(rows)}\n{table(rows)}")
    print(target / "table.md")


if __name__ == "__main__":
    main(*sys.argv[1:])
