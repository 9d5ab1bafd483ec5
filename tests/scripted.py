"""Rollouts without a model and without walls: turns from a script, and sessions of plain functions."""

import threading
from collections import defaultdict

from tiny import tiny_tokenizer

from afterglow.core.generation import Completion, Engine
from afterglow.core.rollout import RolloutConfig, RolloutState
from afterglow.core.sandbox import CellResult, Sandbox, Session
from afterglow.core.tool_protocol import open_protocol

TOKENIZER = tiny_tokenizer()
QUESTION = [{"role": "user", "content": "How much is 6 * 7?"}]
END = "<|im_end|>"


def ids(text):
    """Token ids of text; control tokens in it are themselves."""
    return TOKENIZER.encode(text, add_special_tokens=False)


def call(code, before="Let me see.\n"):
    """A turn that calls Python as Qwen3's template writes it."""
    return f'{before}<tool_call>\n{{"name": "python", "arguments": {{"code": "{code}"}}}}\n</tool_call>{END}'


def answer(text="42"):
    """A turn that answers."""
    return f"So \\boxed{{{text}}}.{END}"


def state(protocol="template", seed=0, max_tokens=4000, max_context=None, question=QUESTION, tools=True, **config):
    """A rollout of one question."""
    config = RolloutConfig(tool_protocol=protocol, **config)
    opened = open_protocol(protocol if tools else None, TOKENIZER)
    return RolloutState(config, opened, opened.encode(question), seed, max_tokens, max_context)


def drive(rollout, *turns, run=lambda code: CellResult("42\n", "ok", 0.25), logprob=-0.5):
    """Feed turns to a rollout, each cut at what it asked for; return its result or, unfinished, None."""
    for turn in turns:
        request = rollout.next_request()
        tokens = ids(turn)[: request.max_tokens]
        reason = "stop" if len(tokens) == len(ids(turn)) else "length"
        rollout.receive(tokens, [logprob] * len(tokens), reason)
        while rollout.pending_code is not None:
            rollout.receive_result(run(rollout.pending_code))
    return rollout.result() if rollout.done else None


class ScriptedEngine(Engine):
    """Says what `policy(prompt text, seed)` says, in batches."""

    def __init__(self, policy, max_context=100_000):
        self.policy, self.tokenizer, self.max_context = policy, TOKENIZER, max_context
        self.requests = []

    def generate(self, requests):
        for request in requests:
            self.requests.append(request)
            tokens = ids(self.policy(TOKENIZER.decode(request.prompt_ids), request.seed))
            reason = "stop" if len(tokens) <= request.sampling.max_tokens else "length"
            tokens = tokens[: request.sampling.max_tokens]
            text = TOKENIZER.decode(tokens[:-1] if tokens[-1] == TOKENIZER.eos_token_id else tokens)
            yield Completion(request.key, tokens, text, reason, [-0.5] * len(tokens) if request.logprobs else None)


class PlainSession(Session):
    """Runs code in this process and answers with `out`; waits until `meet` sessions have a cell."""

    def __init__(self, sandbox):
        super().__init__(None, None)
        self.sandbox, self.variables = sandbox, defaultdict(int)
        with sandbox.lock:
            sandbox.opened += 1
            sandbox.open += 1
            sandbox.most_open = max(sandbox.most_open, sandbox.open)

    def _run_cell(self, code):
        if self.sandbox.fault:
            raise self.sandbox.fault
        if self.sandbox.meet:
            self.sandbox.meet.wait(timeout=60)
        try:
            exec(code, {}, self.variables)
        except Exception as error:
            return "error", f"{type(error).__name__}: {error}\n", ""
        return "ok", f"{self.variables['out']}\n", ""

    def close(self):
        with self.sandbox.lock:
            self.sandbox.open -= 1


class PlainSandbox(Sandbox):
    """A sandbox for code of tests."""

    isolation = "none"

    def __init__(self, meet=None, fault=None):
        super().__init__()
        self.meet, self.fault = threading.Barrier(meet) if meet else None, fault
        self.lock, self.opened, self.open, self.most_open = threading.Lock(), 0, 0, 0

    def describe(self):
        return "none"

    def session(self):
        return PlainSession(self)
