"""What each of two processes runs for test_glow_distributed.py: `glow_worker.py FOLDER` writes FOLDER/results.pt."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401  the environment of the tests
import torch
import unlearning_cases
from glow_cases import SPLITS_OF_TWO, run_case, summary


def main(folder: Path) -> None:
    results = {}
    for name, splits in SPLITS_OF_TWO.items():
        for split in splits:
            results[name, split] = summary(run_case(folder / "unsaved", name, *split))
    saved = folder / "undisturbed"
    trainer = run_case(saved, "sample", 1, 4, save_strategy="steps", save_steps=5)
    results["undisturbed"] = summary(trainer)
    results["resumed"] = summary(run_case(folder / "resumed", "sample", 1, 4, resume=saved / "checkpoint-5"))
    results["npo"] = unlearning_cases.summary(unlearning_cases.run_case(folder / "unsaved", "npo", 2, 2))
    state = trainer.accelerator.state
    results["world"] = (state.num_processes, state.distributed_type.value)
    if state.is_main_process:
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
