"""RLVR runs that must not depend on how a generation batch of 16 rollouts is spread over processes.

The replies are scripted, with 0 to 2 calls by seed, so the processes need different numbers of rounds; behind the
script the real model generates as well, of uneven length, so that its collectives are those of a real run.
"""

from pathlib import Path

import transformers
from tiny import tiny_model
from tiny_sft import logged, parameters
from tiny_tools import ScriptedTurns, scripted_trainer

METRICS = (
    "loss",
    "grad_norm",
    "reward",
    "rollouts/calls",
    "rollouts/call_error_rate",
    "entropy",
    "groups/distinct_wrong",
)


def run_case(folder: Path, processes: int, resume: Path | None = None, **changes):
    transformers.logging.set_verbosity_error()
    trainer = scripted_trainer(
        folder, rows=14, model=changes.pop("model", None) or tiny_model(), per_device_train_batch_size=8 // processes,
        learning_rate=0.5, probe_every=2, probe_prompts=3, **changes,
    )  # fmt: skip
    # One process has rollouts that call, the other may have none.
    trainer._turns = ScriptedTurns(trainer._turns, rounds=lambda seed: seed % 3)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def summary(trainer) -> dict:
    return {"batches": trainer._turns.batches, **{key: logged(trainer, key) for key in METRICS}}


def weights(trainer):
    return parameters(trainer.model)
