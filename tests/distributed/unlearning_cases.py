"""Unlearning runs that must not depend on how a global batch of 8 pairs is spread; also the worker that runs them.

Under accelerate: `unlearning_cases.py FOLDER NAME ...` makes the named runs in each process and writes
FOLDER/results.pt.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401  the environment of the tests
import torch
from tiny_sft import chats, logged
from unlearning_setup import lora, unlearn

STABLE = {"perturbation_radius": 0.2, "perturbation_points": 2, "inner_step": 1e-3}
CASES = {
    "npo": {},
    "stable sap": {"perturbation": "sap", **STABLE},
    "stable gpn": {"perturbation": "gpn", "feedback_split": "literal", **STABLE},
    "stable hws": {"perturbation": "hws", "hws_decay": 0.5, **STABLE},
    "npo lora": {"peft_config": lora, "gradient_checkpointing": True, "learning_rate": 1e-2},
    "kl": {"forget_loss": "ga", "retain_loss": "kl", "learning_rate": 0.05},
    "kl lora": {"peft_config": lora, "forget_loss": "ga", "retain_loss": "kl", "learning_rate": 0.1},
}
KEYS = (
    "loss",
    "grad_norm",
    "forget_loss",
    "retain_loss",
    "forget_nll",
    "retain_nll",
    "stable/cosine",
    "stable/sharpness",
)


def make(folder: Path, name: str, rows: int, accumulation: int, **changes):
    """Two epochs of 19 pairs: the last batch of each has three, so two processes must fill it up with repeats."""
    case = CASES[name] | changes
    peft_config = case.pop("peft_config")() if "peft_config" in case else None
    case = {"num_train_epochs": 2, **case}
    spread = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
    return unlearn(folder, forget=chats(19), retain=chats(23, start=100), peft_config=peft_config, **spread, **case)


def summary(trainer) -> dict:
    """What must not depend on the spread; every process calls it."""
    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    names = [name.removeprefix("module.") for name, p in trainer.model_wrapped.named_parameters() if p.requires_grad]
    flat = torch.cat([whole[name].detach().float().cpu().reshape(-1) for name in names]) if whole else None
    return {"parameters": flat, **{key: logged(trainer, key) for key in KEYS}}


def start(name: str) -> torch.Tensor:
    """The trained parameters before the first step."""
    trainer = make(Path("/unused"), name, 8, 1)
    return torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters() if p.requires_grad])


def run_case(folder: Path, name: str, rows: int, accumulation: int, resume: Path | None = None, **changes):
    trainer = make(folder, name, rows, accumulation, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def pretend_that_gloo_is_a_gpu() -> None:
    """accelerate has no FSDP on a CPU: it is told that gloo belongs to a GPU, and that this GPU is the CPU."""
    from accelerate.state import DistributedType, PartialState

    def prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None):
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = prepare_backend


def work(folder: Path, names: list[str]) -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        pretend_that_gloo_is_a_gpu()
    on_gpu = {} if os.environ.get("ACCELERATE_USE_CPU") == "true" else {"use_cpu": False}
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        on_gpu["ddp_backend"] = "gloo"
    results = {name: summary(run_case(folder / "unsaved", name, 2, 2, **on_gpu)) for name in names}
    # torch cannot load an empty optimizer state under FSDP2, nor transformers a full one under DDP on a CPU.
    optimizer = "sgd" if os.environ.get("ACCELERATE_USE_CPU") == "true" else "adamw_torch"
    saved = {"save_strategy": "steps", "save_steps": 4, "optim": optimizer, **on_gpu}
    last = names[-1]
    trainer = run_case(folder / "whole", last, 2, 2, **saved)
    results["whole"] = summary(trainer)
    resumed = run_case(folder / "resumed", last, 2, 2, resume=folder / "whole" / "checkpoint-4", **saved)
    results["resumed"] = summary(resumed)
    state = trainer.accelerator.state
    results["world"] = (state.num_processes, state.distributed_type.value)
    if state.is_main_process:
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2:])
