"""Throughput of RSR scoring on GPUs. Not run by us: we had none. Commands, in the order to try them:

    python benchmarks/gpu/rsr.py --model Qwen/Qwen3-0.6B                                  # does it run?
    python benchmarks/gpu/rsr.py --model Qwen/Qwen3-8B-Base --rows 2000 --tokens 8000 --token_budget 32768
    python benchmarks/gpu/rsr.py --model Qwen/Qwen3-8B-Base --rows 2000 --tokens 8000 --backend vllm
    python benchmarks/gpu/rsr.py --model Qwen/Qwen3-8B-Base --rows 9000 --tokens 8000 --token_budget 32768 --processes 8

Each scores made-up trajectories of about `--tokens` tokens without a cache, loading included, and prints tokens per
second; the live line of the first process shows the rate without loading, and the model FLOPs utilisation where the
peak is known. The paper (arXiv 2601.14249, appendix C) names under an hour on one H200 for 5,000 trajectories of up to
32,768 tokens and a 7B student.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from datasets import Dataset

from afterglow.core.progress import progress
from afterglow.core.provenance import describe_machine
from afterglow.data_filters.rsr import RSRConfig
from afterglow.data_filters.scoring import score

WORDS = ["we", "add", "the", "two", "numbers", "and", "get", "a", "sum", "so", "x", "equals", "7", "times", "3"]


def make_rows(count: int, tokens: int) -> Dataset:
    """Trajectories of 0.5 to 1.5 times `tokens` words, about a token each."""
    draw = random.Random(0)
    rows = []
    for i in range(count):
        text = " ".join(draw.choices(WORDS, k=draw.randint(tokens // 2, 3 * tokens // 2)))
        prompt, completion = ([{"role": role, "content": c}] for role, c in (("user", f"{i}?"), ("assistant", text)))
        rows.append({"id": str(i), "prompt": prompt, "completion": completion})
    return Dataset.from_list(rows)


def main() -> None:
    """Score and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--token_budget", type=int, default=16384)
    parser.add_argument("--backend", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--processes", type=int, default=1)
    asked = parser.parse_args()
    config = RSRConfig(model=asked.model, backend=asked.backend, dtype=asked.dtype, num_processes=asked.processes)
    rows = make_rows(asked.rows, asked.tokens)
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        measured = score(
            rows,
            config.scoring(asked.model),
            cache=Path(folder, "cache"),
            work=Path(folder, "work"),
            token_budget=asked.token_budget,
            processes=asked.processes,
            progress=progress,
        )
        seconds = time.monotonic() - start
    tokens = sum(line["n_tokens"] for line in measured.rows)
    result = vars(asked) | {"scored_tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
    print(json.dumps(result | {"machine": describe_machine()}))


if __name__ == "__main__":
    main()
