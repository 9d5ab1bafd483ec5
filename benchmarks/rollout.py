"""Rollouts against TRL's own tool loop, with the same turns and the same tool: `python benchmarks/rollout.py`.

A scripted model, so that nothing but the loops differs: every rollout calls its tool twice and answers, and a call to
generate costs the same short sleep in each. TRL's `GRPOTrainer._tool_call_loop` runs one tool after another; the
lock-step driver runs those of a round together; the streaming driver does not wait for a round. The tool sleeps 0, 0.1
or 1 s. The last figure is 64 rollouts whose tool sleeps 0.5 s, one turn. Writes runs/bench/rollout.json.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from afterglow.core.generation import Completion, Engine, Request, SamplingConfig
from afterglow.core.provenance import describe_machine, describe_versions
from afterglow.core.rollout import RolloutConfig, RolloutState, TurnRequest
from afterglow.core.rollout_runner import run_lockstep, run_streaming
from afterglow.core.sandbox import CellStatus, Sandbox, SandboxConfig, Session
from afterglow.core.tool_protocol import TOOL_NAME, TemplateProtocol
from afterglow.recipes.demo.tokenizer import init_model, train_tokenizer

RESULT = Path("runs/bench/rollout.json")
LATENCIES = (0.0, 0.1, 1.0)
GENERATE_SECONDS = 0.02
CALL = '<tool_call>\n{"name": "python", "arguments": {"code": "6 * 7"}}\n</tool_call><|im_end|>'
ANSWER = "So \\boxed{42}.<|im_end|>"
QUESTION = [{"role": "user", "content": "How much is 6 * 7?"}]


class SleepingSession(Session):
    """A tool that takes a while and costs nothing."""

    def __init__(self, seconds: float):
        super().__init__(SandboxConfig(), None)  # pyright: ignore[reportArgumentType]
        self._seconds = seconds

    def _run_cell(self, code: str) -> tuple[CellStatus, str, str]:
        time.sleep(self._seconds)
        return "ok", "42\n", ""

    def close(self) -> None:
        """Nothing is held."""


class SleepingSandbox(Sandbox):
    """Opens sleeping sessions."""

    isolation = "none"  # pyright: ignore[reportAssignmentType]

    def __init__(self, seconds: float):
        super().__init__()
        self._seconds = seconds

    def describe(self) -> str:
        """See `Sandbox.describe`."""
        return "sleeps"

    def session(self) -> SleepingSession:
        """See `Sandbox.session`."""
        return SleepingSession(self._seconds)


class ScriptedEngine(Engine):
    """Calls until its prompt holds so many answers of the tool, then answers."""

    max_context = 1 << 20

    def __init__(self, tokenizer: Any, calls: int):
        self.tokenizer = tokenizer
        self._call, self._answer = (tokenizer.encode(text, add_special_tokens=False) for text in (CALL, ANSWER))
        self._mark, self._calls = tokenizer.convert_tokens_to_ids("<tool_response>"), calls

    def turn(self, prompt_ids: Sequence[int]) -> list[int]:
        """Return the tokens of the next turn."""
        return list(self._call if list(prompt_ids).count(self._mark) < self._calls else self._answer)

    def turns(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the next turn of each, at the price of one generation."""
        time.sleep(GENERATE_SECONDS)
        return [self.turn(prompt) for prompt in prompts]

    def generate(self, requests: Sequence[Request]) -> Any:
        """See `Engine.generate`."""
        for request, tokens in zip(requests, self.turns([r.prompt_ids for r in requests]), strict=True):
            yield Completion(request.key, tokens, self.tokenizer.decode(tokens[:-1]), "stop")

    def load_weights(self, model: str) -> None:
        """Not used."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is held."""


def states(protocol: TemplateProtocol, number: int) -> list[RolloutState]:
    """New rollouts of the question."""
    return [RolloutState(RolloutConfig(), protocol, protocol.encode(QUESTION), n, 4000) for n in range(number)]


def lockstep(engine: ScriptedEngine, protocol: TemplateProtocol, number: int, seconds: float) -> None:
    """Run them in rounds."""

    def generate(requests: list[TurnRequest]) -> list[tuple[list[int], None, str]]:
        return [(turn, None, "stop") for turn in engine.turns([request.prompt_ids for request in requests])]

    with SleepingSandbox(seconds) as sandbox:
        check(run_lockstep(states(protocol, number), generate, sandbox))


def streaming(engine: ScriptedEngine, protocol: TemplateProtocol, number: int, seconds: float) -> None:
    """Run them as they come."""
    jobs = ((str(n), state, SamplingConfig()) for n, state in enumerate(states(protocol, number)))
    with SleepingSandbox(seconds) as sandbox:
        check([rollout for _, rollout in run_streaming(engine, jobs, sandbox)])


def check(rollouts: Sequence[Any]) -> None:
    """Refuse to time anything else than finished rollouts with their calls."""
    assert all(rollout.finish_reason == "stop" and rollout.n_calls >= 1 for rollout in rollouts)


def trl_trainer(tokenizer: Any, number: int, folder: str) -> Any:
    """Return TRL's trainer with a model too small to matter and a tool that sleeps for `trainer.seconds`."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def python(code: str) -> str:
        """Run Python.

        Args:
            code: The code of one cell.
        """
        time.sleep(trainer.seconds)
        return "42"

    arguments = GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=number,
        num_generations=number, max_completion_length=4000, max_tool_calling_iterations=16,
    )  # fmt: skip
    trainer: Any = GRPOTrainer(
        model=init_model(tokenizer, seed=0, hidden_size=64, layers=1), processing_class=tokenizer, args=arguments,
        reward_funcs=lambda completions, **_: [0.0] * len(completions), tools=[python],
        train_dataset=Dataset.from_list([{"prompt": QUESTION}] * number),
    )  # fmt: skip
    trainer.model.config.max_position_embeddings = 1 << 20  # the loop drops results beyond it
    return trainer


def trl_loop(trainer: Any, engine: ScriptedEngine, protocol: TemplateProtocol, number: int, seconds: float) -> None:
    """Run TRL's own loop on the first turns of `number` rollouts."""
    trainer.seconds = seconds
    # What `_generate` sets before it enters the loop.
    trainer._sync_tool_dicts, trainer._async_tool_dicts = [{TOOL_NAME: trainer.tools[0]}] * number, [{}] * number
    trainer._generate_single_turn = lambda ids, *_, **__: (engine.turns(ids), None)
    prompt = protocol.encode(QUESTION)
    call = {"type": "function", "function": {"name": TOOL_NAME, "arguments": {"code": "6 * 7"}}}
    first = engine.turns([prompt] * number)
    asked = [list(map(dict, QUESTION)) for _ in range(number)]
    said = [[{"role": "assistant", "content": "", "tool_calls": [call]}] for _ in range(number)]
    mask, messages, ids, *_ = trainer._tool_call_loop(asked, [prompt] * number, first, said, None, None, {})
    assert all(len(row) == len(own) for row, own in zip(ids, mask, strict=True))
    assert all(chat[-1]["content"].startswith("So") for chat in messages)


def seconds_of(work: Callable[..., None], *arguments: Any) -> float:
    """Time one call."""
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=16)
    number = parser.parse_args().rollouts
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    tokenizer: Any = train_tokenizer([QUESTION[0]["content"], CALL, ANSWER], 300)
    protocol, engine = TemplateProtocol(tokenizer), ScriptedEngine(tokenizer, calls=2)
    result: dict[str, Any] = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"), "machine": describe_machine(),
        "versions": describe_versions(), "rollouts": number, "calls_per_rollout": 2,
        "seconds_of_one_generation": GENERATE_SECONDS, "latencies": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(tokenizer, number, folder)
        for latency in LATENCIES:
            trl = seconds_of(trl_loop, trainer, engine, protocol, number, latency)
            ours = {run.__name__: seconds_of(run, engine, protocol, number, latency) for run in (lockstep, streaming)}
            result["latencies"][str(latency)] = {"trl_seconds": trl} | {
                name: {"seconds": seconds, "times_as_fast_as_trl": trl / seconds} for name, seconds in ours.items()
            }
            shown = ", ".join(f"{name} {trl / seconds:.1f} times as fast" for name, seconds in ours.items())
            print(f"tool latency {latency:g} s, {number} rollouts of 2 calls: TRL's loop {trl:.2f} s; {shown}")
    once = ScriptedEngine(tokenizer, calls=1)
    result["64_rollouts_sleeping_0.5_s"] = {
        run.__name__: seconds_of(run, once, protocol, 64, 0.5) for run in (lockstep, streaming)
    }
    print(f"64 rollouts whose tool sleeps 0.5 s, one call: {result['64_rollouts_sleeping_0.5_s']} s")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {RESULT}")


if __name__ == "__main__":
    main()
