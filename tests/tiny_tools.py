"""A small world for the tests of tool-integrated RL: multiplications, and a policy whose turns are scripted.

The script decides by the seed of a rollout how often it calls, whether a call fails, and whether its answer is right.
Behind it the real model may generate too (its tokens are thrown away), so that sharded models join their collectives.
"""

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer

from afterglow.core.generation import make_completion
from afterglow.trainers.tool_rlvr import ToolRLVRTrainer
from afterglow.trainers.tool_rlvr_config import ToolRLVRConfig

TOKENIZER = tiny_tokenizer()
CHECKPOINT: Any = SimpleNamespace(tokenizer=TOKENIZER, stop_ids=frozenset({TOKENIZER.eos_token_id}))
LEFT = re.compile(r"# (\d+) left, then (\S+)")


def products(count: int = 8) -> Dataset:
    """Prompts `a * b` with their products."""
    rows = []
    for number in range(count):
        a, b = 12 + 7 * number, 345 + 11 * number
        rows.append({"id": f"p{number}", "prompt": [{"role": "user", "content": f"{a}*{b}?"}], "answer": str(a * b)})
    return Dataset.from_list(rows)


def product(text: str) -> int:
    a, b = re.search(r"(\d+)\*(\d+)\?", text).groups()
    return int(a) * int(b)


class ScriptedTurns:
    """Replies by script. `rounds(seed)` is the number of calls of a rollout, `right(seed)` whether it ends well."""

    def __init__(
        self, engine: Any = None, rounds=lambda seed: seed % 3, right=lambda seed: seed % 5 < 2, thinks: bool = False
    ):
        self.engine, self.rounds, self.right, self.thinks = engine, rounds, right, thinks
        self.max_context = 1024
        self.batches: list[int] = []

    def opened(self):
        return self.engine.opened() if self.engine else nullcontext()

    def __call__(self, requests):
        self.batches.append(len(requests))
        if self.engine:
            self.engine([self._short(request) for request in requests])
        return [self._reply(request) for request in requests]

    @staticmethod
    def _short(request):
        return replace(request, sampling=replace(request.sampling, max_tokens=1 + request.seed % 4))

    def _reply(self, request):
        said = TOKENIZER.decode(list(request.prompt_ids))
        found = LEFT.findall(said)
        if found:
            left, answer = int(found[-1][0]), found[-1][1]
        else:
            left = self.rounds(request.seed)
            answer = str(product(said) + (0 if self.right(request.seed) else 1 + request.seed % 3))
        if self.thinks and "<think>" not in said:
            text = "<think>\n" + "hm " * 200
        elif left:
            code = f"# {left - 1} left, then {answer}\n" + ("1/0" if request.seed % 7 == 0 else "6*7")
            text = f"Let me see.\n```python\n{code}\n```\n"
        else:
            text = rf"It is \boxed{{{answer}}}."
        ids = TOKENIZER.encode(text, add_special_tokens=False) + ([] if left else [TOKENIZER.eos_token_id])
        most = request.sampling.max_tokens
        logprobs = [-1.0] * len(ids[:most]) if request.logprobs else None
        return make_completion(request, CHECKPOINT, ids[:most], len(ids) <= most, logprobs)


def settings(output_dir: Path, **changes) -> dict:
    """Arguments of a `ToolRLVRConfig`: four prompts, four rollouts each, one batch per step."""
    return {
        "output_dir": str(output_dir),
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 400,
        "answer_tokens": 32,
        "tool_result_tokens": 64,
        "tool_protocol": "code_block",
        "learning_rate": 0.05,
        "warmup_steps": 0,
        "optim": "sgd",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "guard": "off",
        **changes,
    }


def scripted_trainer(output_dir: Path, rows: int = 8, script: dict | None = None, model: Any = None, **changes):
    """A trainer whose policy follows the script."""
    trainer = ToolRLVRTrainer(
        model or tiny_model(),
        ToolRLVRConfig(**settings(output_dir, **changes)),
        products(rows),
        processing_class=TOKENIZER,
    )
    trainer._turns = ScriptedTurns(**(script or {}))
    return trainer
