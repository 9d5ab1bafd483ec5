"""What each of two processes runs for test_rlvr_distributed.py: `rlvr_worker.py FOLDER KIND`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401  the environment of the tests
import torch
from rlvr_cases import run_case, summary, weights


def main(folder: Path, kind: str) -> None:
    changes = {}
    if kind == "fsdp2":  # accelerate offers FSDP on a CPU only if it takes the CPU for the device it was asked for
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        backend = ("gloo", DistributedType.MULTI_GPU)
        PartialState._prepare_backend = lambda self, cpu=False, sagemaker_dp=False, backend_name=None, **_: backend
    if kind != "ddp":
        changes |= {"use_cpu": False, "ddp_backend": "gloo"}
    trainer = run_case(folder / kind, 2, **changes)
    state = trainer.accelerator.state
    rank = state.process_index
    results = {"world": (state.num_processes, state.distributed_type.value), **summary(trainer)}
    if kind == "ddp":
        results["weights"] = weights(trainer)
    torch.save(results, folder / f"{kind}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
