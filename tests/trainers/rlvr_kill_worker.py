"""Trains as test_tool_rlvr_kill.py's undisturbed run does, and dies by kill -9: `rlvr_kill_worker.py FOLDER MOMENT`."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401  the environment of the tests
from test_tool_rlvr_kill import build, right
from transformers import TrainerCallback


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieInCheckpoint(TrainerCallback):
    """The weights are written; what the trainer's own callbacks write beside them is not."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 4:
            die()


def main(folder: str, moment: str) -> None:
    trainer = build(folder)
    if moment == "checkpoint":
        trainer.callback_handler.callbacks.insert(0, DieInCheckpoint())
    else:  # among the rollouts of the fourth batch, whose prompts are dealt
        trainer._turns.right = lambda seed: die() if trainer.curriculum.dealt == 4 and seed % 5 == 0 else right(seed)
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
