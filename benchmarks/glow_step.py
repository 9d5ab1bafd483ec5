"""Step time and peak memory of GLOWTrainer against TRL's SFTTrainer: `python benchmarks/glow_step.py`.

Both train the same small model on the same batches in one process and take turns, one optimiser step each, so that
whatever else the machine does slows both down. A step is everything from one to the next: data, forward, backward,
optimiser, logging. All of GLOW's timed steps have weights (epoch 2 and later). The result is the median of the ratios
of neighbouring steps. Peak memory is that of a process which trains with one of the two only. Writes
runs/bench/glow_step.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch
import transformers
from datasets import Dataset
from peak_memory import resident_peak_gb
from transformers import PrinterCallback, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from afterglow.core.provenance import describe_machine, describe_versions
from afterglow.recipes.demo.tokenizer import train_tokenizer
from afterglow.trainers.glow import GLOWConfig, GLOWTrainer

VOCABULARY, LENGTH, BATCH, STEPS_PER_EPOCH = 8_192, 256, 4, 4
RESULT = Path("runs/bench/glow_step.json")


class TakeTurns(TrainerCallback):
    """Lets two trainers in two threads make one step each in turn, and times the steps after the first epoch."""

    def __init__(self, mine: threading.Semaphore, other: threading.Semaphore):
        self.mine, self.other = mine, other
        self.seconds: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        """Wait for the first turn."""
        self.mine.acquire()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Note the time, hand over, wait for the next turn."""
        if state.epoch > 1:
            self.seconds.append(time.perf_counter() - self.start)
        self.other.release()
        self.mine.acquire()
        self.start = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        """Let the other finish too."""
        self.other.release()


def make_trainer(kind: str, epochs: int, output_dir: str, callbacks: list | None = None) -> SFTTrainer:
    """A fresh trainer, "sft" or "glow", on random tokens."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=64, max_position_embeddings=LENGTH, tie_word_embeddings=True,
        )
    )  # fmt: skip
    rows, prompt = BATCH * STEPS_PER_EPOCH, LENGTH // 4
    tokens = torch.randint(0, VOCABULARY, (rows, LENGTH)).tolist()
    labels = [[-100] * prompt + row[prompt:] for row in tokens]
    dataset = Dataset.from_dict({"id": [str(n) for n in range(rows)], "input_ids": tokens, "labels": labels})
    settings = {
        "output_dir": output_dir, "per_device_train_batch_size": BATCH, "num_train_epochs": epochs, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "max_length": None, "gradient_checkpointing": False,
        "bf16": torch.cuda.is_available(), "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip
    shared = {"processing_class": train_tokenizer(["any text"], 300), "callbacks": callbacks}
    if kind == "glow":
        trainer = GLOWTrainer(model, GLOWConfig(**settings), dataset, **shared)
    else:
        trainer = SFTTrainer(model, SFTConfig(**settings), train_dataset=dataset, **shared)
    trainer.remove_callback(PrinterCallback)
    return trainer


def compare_times(epochs: int, output_dir: str) -> dict:
    """Train with both, step by step in turn."""
    turns = {"sft": threading.Semaphore(1), "glow": threading.Semaphore(0)}
    sft, glow = TakeTurns(turns["sft"], turns["glow"]), TakeTurns(turns["glow"], turns["sft"])
    trainers = [make_trainer("sft", epochs, output_dir, [sft]), make_trainer("glow", epochs, output_dir, [glow])]
    threads = [threading.Thread(target=trainer.train) for trainer in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ratios = [b / a for a, b in zip(sft.seconds, glow.seconds, strict=True)]
    quarter, median, three_quarters = statistics.quantiles(ratios, n=4)
    return {
        "steps": len(ratios),
        "sft_step_seconds": statistics.median(sft.seconds),
        "glow_step_seconds": statistics.median(glow.seconds),
        "step_time_ratio": median,
        "step_time_ratio_quartiles": [quarter, three_quarters],
        "model": f"Qwen3, {trainers[0].model.num_parameters() / 1e6:.1f}M parameters, vocabulary {VOCABULARY}",
        "batch": f"{BATCH} x {LENGTH} tokens",
    }


def peak_memory() -> float:
    """Gigabytes: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resident_peak_gb()


def compare_memory() -> dict:
    """Peak memory of a process that trains with one of them."""
    peak = {}
    for kind in ("sft", "glow"):
        command = [sys.executable, __file__, "--memory_of", kind]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        peak[kind] = float(run.stdout.split()[-1])
    return {"sft_peak_gb": peak["sft"], "glow_peak_gb": peak["glow"], "memory_ratio": peak["glow"] / peak["sft"]}


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=31, help=f"of {STEPS_PER_EPOCH} steps; the first is not timed")
    parser.add_argument("--memory_of", choices=["sft", "glow"], help="for the benchmark's own child processes")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.memory_of:
            make_trainer(arguments.memory_of, 3, folder).train()
            print(peak_memory())
            return
        result = compare_times(arguments.epochs, folder) | compare_memory()
    result["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    result |= {"machine": describe_machine(), "versions": describe_versions()}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    low, high = result["step_time_ratio_quartiles"]
    print(f"{result['model']}, {result['batch']}, {result['steps']} steps of each, in turn")
    for name, unit in (("step", "seconds"), ("peak", "gb")):
        sft, glow = (
            result[f"{kind}_step_seconds" if name == "step" else f"{kind}_peak_gb"] for kind in ("sft", "glow")
        )
        print(f"{name}: SFT {sft:.3f} {unit}, GLOW {glow:.3f} {unit}")
    print(f"ratio: step time {result['step_time_ratio']:.3f} (quartiles {low:.3f} to {high:.3f}), ", end="")
    print(f"memory {result['memory_ratio']:.3f}; written to {RESULT}")


if __name__ == "__main__":
    main()
