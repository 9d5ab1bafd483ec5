"""Step time and peak memory of unlearning: `python benchmarks/unlearning_step.py`.

Two comparisons, each of trainers that take turns, one optimiser step each, in one process. Without a GPU each computes
in one thread, whose processor time is measured: what else the machine does counts for little.

- NPO with stored reference log-probabilities against the same step with a live reference model, as other codebases do;
- the reconstruction of StableUN (one point; Gaussian, and sharpness-aware) against gradient difference.

With LoRA, and with full fine-tuning; AdamW. The result is the median of the ratios of neighbouring steps. Peak memory
is what torch's allocator counts, the model included, in a process that trains with one of them only, with gradient
checkpointing as in the recipes. Writes runs/bench/unlearning_step.json.
"""

import argparse
import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # `clock` sees one thread
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
from transformers import PrinterCallback, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl.trainer.utils import add_fused_lm_head

from afterglow.core.provenance import describe_machine, describe_versions
from afterglow.recipes.demo.tokenizer import train_tokenizer
from afterglow.trainers.stable_unlearning import StableUnlearnConfig, StableUnlearnTrainer
from afterglow.trainers.unlearning import UnlearnConfig, UnlearnTrainer

VOCABULARY, LENGTH, PAIRS, ROWS = 2_048, 128, 4, 16
ACCUMULATION = 2  # what a step costs beside its passes is paid once for 2,048 tokens; recipes have about ten thousand
RESULT = Path("runs/bench/unlearning_step.json")


class LiveReference:
    """A second model in memory, asked in every step; it stands where `StartModel` does."""

    def __init__(self, trainer: UnlearnTrainer):
        self.trainer, self.model = trainer, copy.deepcopy(trainer.model).eval().requires_grad_(False)
        # The copied model's forward still belongs to the original.
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        inner.forward = types.MethodType(type(inner).forward, inner)
        add_fused_lm_head(inner)

    def forget(self) -> None:
        """Nothing is kept from training to training."""

    def compute(self, epochs: int) -> None:
        """Nothing is computed beforehand."""

    def log_probs(self, rows: torch.Tensor) -> torch.Tensor:
        """Score the forget rows of the batch at hand."""
        with torch.no_grad():
            return self.trainer.score(self.model, self.trainer.batch, slice(len(rows))).log_prob("sum")[None]


class NPOWithLiveReference(UnlearnTrainer):
    """NPO as it is usually written."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.start = LiveReference(self)

    def forget_losses(self, model, inputs, answers):
        """Leave the batch where the live reference finds it."""
        self.batch = inputs
        return super().forget_losses(model, inputs, answers)


# name -> trainer, configuration, keys
KINDS = {
    "npo": (UnlearnTrainer, UnlearnConfig, {}),
    "npo, live reference": (NPOWithLiveReference, UnlearnConfig, {}),
    "graddiff": (UnlearnTrainer, UnlearnConfig, {"forget_loss": "ga"}),
    "stable gpn": (StableUnlearnTrainer, StableUnlearnConfig, {"forget_loss": "ga", "perturbation": "gpn"}),
    "stable sap": (StableUnlearnTrainer, StableUnlearnConfig, {"forget_loss": "ga", "perturbation": "sap"}),
}
RATIOS = {"npo": "npo, live reference", "stable gpn": "graddiff", "stable sap": "graddiff"}


def clock() -> float:
    """Seconds: of this thread's processor time, or of the wall where a GPU does the work."""
    if not torch.cuda.is_available():
        return time.thread_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class TakeTurns(TrainerCallback):
    """Lets trainers in threads make one step each in turn, and times the steps after the second."""

    def __init__(self, mine: threading.Semaphore, following: threading.Semaphore):
        self.mine, self.following = mine, following
        self.seconds: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        """Wait for the first turn."""
        self.mine.acquire()
        self.start = clock()

    def on_step_end(self, args, state, control, **kwargs):
        """Note the time, hand over, wait for the next turn."""
        if state.global_step > 2:
            self.seconds.append(clock() - self.start)
        self.following.release()
        self.mine.acquire()
        self.start = clock()

    def on_train_end(self, args, state, control, **kwargs):
        """Let the others finish too."""
        self.following.release()


def make_trainer(
    kind: str, folder: str, steps: int, width: int, lora: bool, callbacks: list | None = None, **changes: Any
):
    """A fresh trainer of a kind on random tokens; `width` sets the size of the model."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    tokens = torch.randint(0, VOCABULARY, (2 * ROWS, LENGTH)).tolist()
    labels = [[-100] * (LENGTH // 4) + row[LENGTH // 4 :] for row in tokens]
    table = Dataset.from_dict({"input_ids": tokens, "labels": labels})
    settings = {
        "output_dir": folder, "per_device_train_batch_size": PAIRS, "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": steps, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_length": None,
        "gradient_checkpointing": False, "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(), "optim": "adamw_torch",
    }  # fmt: skip
    trainer, config, keys = KINDS[kind]
    built = trainer(
        model,
        config(**settings | keys | changes),
        table.select(range(ROWS)),
        table.select(range(ROWS, 2 * ROWS)),
        processing_class=train_tokenizer(["any text"], 300),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
        callbacks=callbacks,
    )
    built.remove_callback(PrinterCallback)
    return built


def compare_times(steps: int, folder: str, lora: bool) -> dict:
    """Train with all kinds, step by step in turn."""
    semaphores = [threading.Semaphore(int(number == 0)) for number in range(len(KINDS))]
    turns = [TakeTurns(mine, semaphores[(n + 1) % len(KINDS)]) for n, mine in enumerate(semaphores)]
    trainers = [make_trainer(kind, folder, steps, 192, lora, [turn]) for kind, turn in zip(KINDS, turns, strict=True)]
    threads = [threading.Thread(target=trainer.train) for trainer in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = {kind: turn.seconds for kind, turn in zip(KINDS, turns, strict=True)}
    return {kind: quartiles(seconds[kind], seconds[base]) for kind, base in RATIOS.items()}


def quartiles(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of neighbouring steps."""
    quarter, median, three_quarters = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
    return {"ratio": median, "quartile_1": quarter, "quartile_3": three_quarters, "steps": len(ours)}


def measure_memory(kind: str, folder: str, lora: bool) -> float:
    """Peak of two steps in gigabytes."""
    run = {"gradient_accumulation_steps": 1, "gradient_checkpointing": True}
    if torch.cuda.is_available():
        make_trainer(kind, folder, 2, 1024, lora, **run).train()
        return torch.cuda.max_memory_allocated() / 2**30
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        make_trainer(kind, folder, 2, 1024, lora, **run).train()
    events: Any = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyright: ignore[reportOptionalMemberAccess]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held) / 2**30


def compare_memory(lora: bool) -> dict[str, float]:
    """Peak memory of a process that trains with one of the two."""
    peaks = {}
    for kind in ("npo", RATIOS["npo"]):
        command = [sys.executable, __file__, "--memory_of", kind, *(["--lora"] if lora else [])]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[kind] = float(run.stdout.split()[-1])
    ours, theirs = peaks.values()
    return {"gb": ours, "live_reference_gb": theirs, "ratio": ours / theirs}


def show_times(name: str, ratios: dict) -> None:
    """Print them."""
    for kind, found in ratios.items():
        spread = f"quartiles {found['quartile_1']:.3f} to {found['quartile_3']:.3f}, {found['steps']} steps"
        print(f"{name}: step of {kind} / {RATIOS[kind]}: {found['ratio']:.3f} ({spread})", flush=True)


def show_memory(name: str, found: dict) -> None:
    """Print it."""
    sizes = f"{found['gb']:.3f} and {found['live_reference_gb']:.3f} GB"
    print(f"{name}: peak of npo / npo, live reference: {found['ratio']:.3f} ({sizes})", flush=True)


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=32, help="of each trainer; the first two are not timed")
    parser.add_argument("--memory_of", choices=KINDS, help="for the benchmark's own child processes")
    parser.add_argument("--lora", action="store_true", help="for the benchmark's own child processes")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.memory_of:
            print(measure_memory(arguments.memory_of, folder, arguments.lora))
            return
        result: dict = {"step": f"{ACCUMULATION} x {PAIRS} pairs x 2 x {LENGTH} tokens", "time": {}, "memory": {}}
        for name, lora in (("lora", True), ("full", False)):
            result["memory"][name] = compare_memory(lora)
            show_memory(name, result["memory"][name])
            result["time"][name] = compare_times(arguments.steps, folder, lora)
            show_times(name, result["time"][name])
    result["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    result |= {"machine": describe_machine(), "versions": describe_versions()}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {RESULT}")


if __name__ == "__main__":
    main()
