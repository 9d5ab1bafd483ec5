"""Speed and memory of `score_tokens` against full logits and against bare matmuls: `python benchmarks/token_stats.py`.

Three processes score the same chains with the same 103M-parameter Qwen3-shaped model (random weights, 151,936 tokens;
bf16 where the processor multiplies it, else float32), a piece at a time and in turn, so that whatever else the machine
does slows all of them down:

    plain    batches of 8 in the given order, padded; logits of every position; logsumexp and top-100 of the response
    fused    score_tokens, compiled
    matmul   nothing but the multiplications that the fused scorer cannot avoid

The figures are medians over pieces and repeats. `fraction_of_matmul_bound` is the time of those multiplications at the
rate of a single large one (4096 x 4096 x 4096), divided by the fused time; `fraction_of_same_matmuls` uses the time
that they take in their own shapes. Peak memory is each process's own, compiler included; compiling itself is done
before the clock starts and reported apart. Writes runs/bench/token_stats.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from peak_memory import resident_peak_gb
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from afterglow.core.provenance import describe_machine, describe_versions
from afterglow.core.token_stats import ScoredSequence, plan_batches, score_tokens

VOCABULARY, BUDGET, LARGE = 151_936, 4096, 4096
RESULT = Path("runs/bench/token_stats.json")


def native_dtype() -> torch.dtype:
    """Return bf16, or float32 on a processor that only emulates it: there bf16 is ten times slower."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # no public question exists
    return torch.bfloat16 if native else torch.float32


DTYPE = native_dtype()


def make_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM._from_config(config, dtype=DTYPE).eval()


def make_pieces(chains: int, pieces: int) -> list[list[ScoredSequence]]:
    """Random tokens with the lengths of GSM8K chains: prompts of about 75 tokens, responses of about 245."""
    rng = np.random.default_rng(0)
    made = []
    for key in range(chains):
        prompt, response = (
            int(rng.lognormal(np.log(median), spread)) + 5 for median, spread in ((68, 0.3), (222, 0.4))
        )
        scored = np.arange(prompt + response) >= prompt
        made.append(ScoredSequence(key, rng.integers(0, VOCABULARY, prompt + response), scored))
    return [made[i::pieces] for i in range(pieces)]


@torch.no_grad()
def plain(model: nn.Module, sequences: list[ScoredSequence]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The usual way: logits of whole padded batches, float32 and top-k on the response's."""
    for start in range(0, len(sequences), 8):
        batch = sequences[start : start + 8]
        ids = nn.utils.rnn.pad_sequence([torch.as_tensor(s.input_ids) for s in batch], batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(s.input_ids), dtype=torch.int64) for s in batch], True)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, sequence in zip(logits, batch, strict=True):
            positions = torch.as_tensor(np.flatnonzero(sequence.scored))
            response, target = row[positions - 1], torch.as_tensor(sequence.input_ids)[positions, None]
            own = response.gather(1, target)
            nll = response.float().logsumexp(-1) - own.float().squeeze(1)
            rank = 1 + (response.topk(100).values > own).sum(1)
            yield sequence.key, nll, rank.clamp(max=100)


def fused(model: nn.Module, sequences: list[ScoredSequence]) -> Iterator[tuple[int, Tensor, Tensor]]:
    for key, stats in score_tokens(model, sequences, token_budget=BUDGET, compiled=True):
        yield key, stats.nll, stats.rank.clamp(max=100)


@torch.no_grad()
def matmul(model: PreTrainedModel, sequences: list[ScoredSequence]) -> dict[str, float]:
    """Time the multiplications of the body and the head alone, and one large multiplication for the rate."""
    body = [module for module in model.model.modules() if isinstance(module, nn.Linear)]
    fed = [int(np.flatnonzero(s.scored)[-1]) for s in sequences]
    work: list[tuple[int, nn.Linear]] = []
    for batch in plan_batches(fed, BUDGET):
        work += [(sum(fed[i] for i in batch), layer) for layer in body]
        work += [(sum(int(np.sum(sequences[i].scored)) for i in batch), model.lm_head)]
    inputs = {layer.in_features: torch.randn(2 * BUDGET, layer.in_features).to(DTYPE) for _, layer in work}
    logits = torch.empty(BUDGET, 8192, dtype=DTYPE)
    start = time.perf_counter()
    for rows, layer in work:
        x = inputs[layer.in_features][:rows]
        if layer is model.lm_head:  # in slices: all logits at once would measure the memory
            for weight in layer.weight.split(logits.shape[1]):
                torch.mm(x, weight.T, out=logits[:rows, : len(weight)])
        else:
            layer(x)
    same = time.perf_counter() - start
    large = torch.randn(LARGE, LARGE).to(DTYPE)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        large @ large
        seconds.append(time.perf_counter() - start)
    rate = 2 * LARGE**3 / statistics.median(seconds[1:])
    return {"same": same, "bound": sum(2 * rows * layer.weight.numel() for rows, layer in work) / rate, "rate": rate}


def serve(kind: str, pieces: list[list[ScoredSequence]]) -> None:
    """Do the pieces whose numbers come in on stdin; answer each with a line of JSON."""
    model = make_model()
    if kind == "fused":
        start = time.perf_counter()
        for _ in range(2):
            list(fused(model, pieces[0]))
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
    elif kind == "plain":
        list(plain(model, pieces[0][:8]))
    for line in sys.stdin:
        piece = pieces[int(line)]
        if kind == "matmul":
            answer = matmul(model, piece)
        else:
            start = time.perf_counter()
            done = list({"plain": plain, "fused": fused}[kind](model, piece))
            answer = {"seconds": time.perf_counter() - start}
            answer["rsr"] = {key: (rank.sum() / nll.sum()).item() for key, nll, rank in done}
        answer["peak_gb"] = resident_peak_gb()
        print(json.dumps(answer), flush=True)


class Worker:
    """One of the three processes."""

    def __init__(self, kind: str, arguments: list[str]):
        command = [sys.executable, __file__, "--serve", kind, *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def read(self) -> dict:
        """Wait for an answer."""
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, piece: int) -> dict:
        """Have a piece done."""
        self.process.stdin.write(f"{piece}\n")
        self.process.stdin.flush()
        return self.read()


def measure(pieces: list[list[ScoredSequence]], repeats: int, arguments: list[str]) -> dict:
    """Let the three take turns; return medians and ratios."""
    workers = {kind: Worker(kind, arguments) for kind in ("plain", "fused", "matmul")}
    compiling = workers["fused"].read()["seconds"]
    rounds = []
    for _ in range(repeats):
        for piece in range(len(pieces)):
            answers = {kind: worker.ask(piece) for kind, worker in workers.items()}
            rounds.append(answers)
            print({kind: round(a.get("seconds", a.get("same")), 2) for kind, a in answers.items()}, flush=True)
    for worker in workers.values():
        worker.process.stdin.close()
        worker.process.wait()

    def median(value) -> float:
        return statistics.median(value(r) for r in rounds)

    chains = [sequence for piece in pieces for sequence in piece]
    tokens, scored = sum(len(s.input_ids) for s in chains), sum(int(np.sum(s.scored)) for s in chains)
    per_set = len(pieces)
    peak = {kind: rounds[-1][kind]["peak_gb"] for kind in workers}
    return {
        "speed_ratio": median(lambda r: r["plain"]["seconds"] / r["fused"]["seconds"]),
        "memory_ratio": peak["fused"] / peak["plain"],
        "fraction_of_matmul_bound": median(lambda r: r["matmul"]["bound"] / r["fused"]["seconds"]),
        "fraction_of_same_matmuls": median(lambda r: r["matmul"]["same"] / r["fused"]["seconds"]),
        "largest_relative_difference_of_rsr": max(
            abs(r["fused"]["rsr"][key] / value - 1) for r in rounds for key, value in r["plain"]["rsr"].items()
        ),
        "plain_seconds": per_set * median(lambda r: r["plain"]["seconds"]),
        "fused_seconds": per_set * median(lambda r: r["fused"]["seconds"]),
        "matmul_bound_seconds": per_set * median(lambda r: r["matmul"]["bound"]),
        "same_matmuls_seconds": per_set * median(lambda r: r["matmul"]["same"]),
        "large_matmul_gflops": median(lambda r: r["matmul"]["rate"]) / 1e9,
        "fused_tokens_per_second": median(lambda r: tokens / per_set / r["fused"]["seconds"]),
        "compile_and_warm_up_seconds": compiling,
        "plain_peak_gb": peak["plain"],
        "fused_peak_gb": peak["fused"],
        "dtype": str(DTYPE).removeprefix("torch."),
        "chains": len(chains),
        "tokens": tokens,
        "scored_tokens": scored,
        "rounds": len(rounds),
    }


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="an eighth of the chains, once")
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all chains")
    parser.add_argument("--serve", choices=["plain", "fused", "matmul"], help="for the benchmark's own processes")
    arguments = parser.parse_args()
    pieces = make_pieces(24, 1) if arguments.quick else make_pieces(192, 4)
    if arguments.serve:
        serve(arguments.serve, pieces)
        return
    result = measure(pieces, 1 if arguments.quick else arguments.repeats, ["--quick"] if arguments.quick else [])
    result["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    result |= {"machine": describe_machine(), "versions": describe_versions()}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(
        f"{result['speed_ratio']:.2f}x the speed of full logits at {result['memory_ratio']:.2f}x their memory; "
        f"{result['fraction_of_matmul_bound']:.0%} of the matmul bound -> {RESULT}"
    )


if __name__ == "__main__":
    main()
