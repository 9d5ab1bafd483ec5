"""One GLOW run of five steps, spread in every way that we call the same: `python glow_sharded.py` prints the table.

Under accelerate it is a worker: `accelerate launch ... glow_sharded.py FOLDER` makes the runs of one strategy in two
processes and writes FOLDER/results.pt. The five steps hold one whole epoch with an uneven last batch, and two steps of
the next, whose weights differ from sample to sample.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "distributed")]

import conftest  # noqa: E402, F401  the environment of the tests
import torch  # noqa: E402
from glow_cases import run_case  # noqa: E402
from tiny import tiny_model  # noqa: E402
from tiny_sft import logged, parameters  # noqa: E402

CONFIGS = TESTS.parent / "launch" / "accelerate_configs"
STRATEGIES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
LAYOUTS = {"padded": "sample", "packed": "packed"}
ONE_PROCESS = {"1 x 8": (1, 8), "8 x 1": (8, 1)}  # rows per process x accumulation
TWO_PROCESSES = {"2 x 4": (4, 1), "2 x 2 x 2": (2, 2)}  # processes x rows x accumulation
STEPS = 5
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2}


def results(folder: Path, splits: dict, **launch) -> dict:
    """Loss, gradient norm and parameters of every layout and split, and the statistics that weights depend on."""
    found = {}
    for layout, case in LAYOUTS.items():
        for name, split in splits.items():
            trainer = run_case(folder / "unsaved", case, *split, max_steps=STEPS, **launch)
            found[layout, name] = summary(trainer)
    return found


def summary(trainer) -> dict:
    """What must not depend on the split; every process calls it."""
    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    like = dict(tiny_model().named_parameters())
    return {
        "parameters": torch.cat([whole[name].detach().float().cpu().reshape(-1) for name in like]) if whole else None,
        "ledger": trainer.ledger.table(),
        **{key: logged(trainer, key) for key in ("loss", "grad_norm", "glow/weight_std")},
    }


def work(folder: Path) -> None:
    """Make the runs of one strategy in this process, one of two."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate has no FSDP on a CPU: it is told that gloo belongs to a GPU, and that this GPU is the CPU.
        from accelerate.state import DistributedType, PartialState

        PartialState._prepare_backend = lambda self, cpu=False, sagemaker_dp=False, backend=None: (
            "gloo",
            DistributedType.MULTI_GPU,
        )
    launched = {} if os.environ.get("ACCELERATE_USE_CPU") == "true" else {"use_cpu": False, "ddp_backend": "gloo"}
    found = results(folder, TWO_PROCESSES, **launched)
    saved = folder / "whole"
    trainer = run_case(saved, "sample", 2, 2, save_strategy="steps", save_steps=2, **ADAM, **launched)
    found["whole"] = summary(trainer)
    resumed = run_case(folder / "resumed", "sample", 2, 2, resume=saved / "checkpoint-4", **ADAM, **launched)
    found["resumed"] = summary(resumed)
    state = trainer.accelerator.state
    found["world"] = (state.num_processes, state.distributed_type.value)
    if state.is_main_process:
        torch.save(found, folder / "results.pt")


def launch(strategy: str, folder: Path) -> dict:
    """Start two processes with a packaged accelerate configuration, and return what they found."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{strategy}.yaml")]
    command += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0", __file__, str(folder)]
    extra = {
        "ddp": {"ACCELERATE_USE_CPU": "true"},
        "fsdp2": {"ACCELERATE_TORCH_DEVICE": "cpu"},
    }.get(strategy, {"DS_ACCELERATOR": "cpu"})
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | extra
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-6000:]
    found = torch.load(folder / "results.pt")
    assert found["world"] == (2, STRATEGIES[strategy])
    return found


def difference(reference: dict, other: dict) -> dict[str, float]:
    """Largest relative difference of loss and gradient norm, and that of the parameters relative to their change."""
    start = parameters(tiny_model())
    change = (reference["parameters"] - start).norm()
    return {
        **{
            key: max(abs(a - b) / abs(a) for a, b in zip(reference[key], other[key], strict=True))
            for key in ("loss", "grad_norm")
        },
        "parameters": float((other["parameters"] - reference["parameters"]).norm() / change),
    }


def main() -> None:
    """Print every difference from one process with one row at a time, as a Markdown table."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        one = results(folder, ONE_PROCESS)
        print("| strategy | layout | split | loss | gradient norm | parameters |\n|---|---|---|---|---|---|")
        for strategy in ("one process", *STRATEGIES):
            (folder / strategy).mkdir()
            found = one if strategy == "one process" else launch(strategy, folder / strategy)
            for layout in LAYOUTS:
                for split in ONE_PROCESS if strategy == "one process" else TWO_PROCESSES:
                    apart = difference(one[layout, "1 x 8"], found[layout, split])
                    print(f"| {strategy} | {layout} | {split} | " + " | ".join(f"{x:.1e}" for x in apart.values()), "|")


if __name__ == "__main__":
    work(Path(sys.argv[1])) if len(sys.argv) > 1 else main()
