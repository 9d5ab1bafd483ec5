r"""Tokens per second of an evaluation against a bare vLLM call: `python benchmarks/evaluation.py`.

One engine, one small model with random weights, the same prompts, seeds and sampling parameters: vLLM's `LLM.generate`,
which returns token ids only, and the evaluator's `Sampler`, which also decodes, grades and writes every sample. They
take turns, and the order is turned round in every pair; both must draw the same number of tokens. A third of the
samples is on its way at once, so that most are graded while others are drawn, as in any long evaluation. Every gold
answer is `\sqrt{2}`, so that no number is compared without the symbolic worker. The result is the median of the ratios
of the pairs with its quartiles. Starting the engine and the workers is not timed. Writes runs/bench/evaluation.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from afterglow.core.engine_vllm import VLLMEngine
from afterglow.core.generation import EngineConfig, Request
from afterglow.core.provenance import describe_machine, describe_versions
from afterglow.core.rollout import RolloutConfig
from afterglow.core.run_folder import JsonlLog
from afterglow.core.tool_protocol import open_protocol
from afterglow.eval.sampling import Job, Sampler, encode_prompts, plan, read_rows_of, sample_seed
from afterglow.eval.tasks import Problem, Task
from afterglow.recipes.demo.tokenizer import init_model, train_tokenizer

RESULT = Path("runs/bench/evaluation.json")
GOLD = "\\sqrt{2}"
TARGET = 0.95


def make_model(folder: str, questions: list[str]) -> None:
    """Write a model of 5 million parameters and a tokenizer that knows the words of the questions and digits."""
    tokenizer: Any = train_tokenizer(questions, 2000)
    model = init_model(tokenizer, seed=0, hidden_size=256, layers=6)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def bare(engine: VLLMEngine, requests: list[Request]) -> tuple[int, float]:
    """Draw with vLLM's own call; returns tokens and seconds."""
    start = time.perf_counter()
    prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
    parameters = [engine._parameters(request) for request in requests]
    outputs = engine._llm.generate(prompts, parameters, use_tqdm=False)
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return tokens, time.perf_counter() - start


def evaluated(sampler: Sampler, engine: VLLMEngine, jobs: list[Job], prompts: Any) -> tuple[int, float]:
    """Draw, grade and write with the evaluator; returns tokens and seconds."""
    for grader in sampler.graders.values():
        grader._verdicts.clear()  # what a grader remembers would spare the next turn its work
    sampler.log = JsonlLog(sampler.log.path)
    start = time.perf_counter()
    sampler.draw(engine, jobs, prompts)
    sampler.log.close()
    seconds = time.perf_counter() - start
    tokens = sum(row["n_tokens"] for row in read_rows_of(sampler.log.path))
    sampler.log.path.unlink()
    return tokens, seconds


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--samples", type=int, default=6, help="of each problem")
    parser.add_argument("--max_tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    questions = [f"A box holds {3 * i + 4} red and {7 * i + 1} blue balls. How many?" for i in range(options.problems)]
    task = Task(
        "balls", "made here", extract="last", n=options.samples, temperature=1.0, top_p=1.0,
        max_tokens=options.max_tokens,
    )  # fmt: skip
    problems = {task.name: [Problem(f"p{i}", [{"role": "user", "content": q}], GOLD) for i, q in enumerate(questions)]}
    jobs = plan([task], problems)
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, questions)
        engine = VLLMEngine(EngineConfig(model=folder, dtype="float32", max_num_seqs=len(jobs) // 3))
        protocol = open_protocol(None, engine.tokenizer, engine._checkpoint.stop_ids, {})
        prompts = encode_prompts({"none": protocol}, problems)
        requests = [
            Request(str(i), prompts[job.key[:2]], sample_seed(0, *job.key), task.sampling())
            for i, job in enumerate(jobs)
        ]
        with task.open_grader(workers=2) as grader:
            grader.check_gold(GOLD)  # starts a worker
            log = JsonlLog(Path(folder) / "samples.jsonl")
            sampler = Sampler(
                log, folder, 0, False, {task.name: grader}, {"none": protocol}, RolloutConfig(), len(jobs)
            )
            speeds: dict[str, list[float]] = {"bare": [], "evaluation": []}
            drawn = set()
            for pair in range(options.pairs + 1):
                turns = [
                    ("bare", lambda: bare(engine, requests)),
                    ("evaluation", lambda: evaluated(sampler, engine, jobs, prompts)),
                ]
                for name, turn in turns if pair % 2 else turns[::-1]:
                    tokens, seconds = turn()
                    drawn.add(tokens)
                    if pair:  # the first pair warms up
                        speeds[name].append(tokens / seconds)
        engine.close()
    if len(drawn) > 1:
        raise SystemExit(f"the two did not draw the same tokens: {sorted(drawn)}")
    ratios = [own / plain for own, plain in zip(speeds["evaluation"], speeds["bare"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    result = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"), "machine": describe_machine(),
        "versions": describe_versions(), "samples": len(jobs), "tokens": drawn.pop(), "pairs": options.pairs,
        "bare_tokens_per_second": statistics.median(speeds["bare"]),
        "evaluation_tokens_per_second": statistics.median(speeds["evaluation"]),
        "ratio": middle, "ratio_quartiles": [low, high], "ratios": ratios, "target": TARGET,
    }  # fmt: skip
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(
        f"{len(jobs)} samples, {result['tokens']:,} tokens, {options.pairs} pairs in turn: bare vLLM "
        f"{result['bare_tokens_per_second']:,.0f} tokens/s, evaluation {result['evaluation_tokens_per_second']:,.0f}"
    )
    print(f"ratio: {middle:.3f} (quartiles {low:.3f} to {high:.3f}; target {TARGET}); written to {RESULT}")


if __name__ == "__main__":
    main()
