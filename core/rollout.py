"""One rollout: a model's turns and the answers of its tool, as a state machine without engine and sandbox.

    state = RolloutState(config, protocol, prompt_ids, seed, max_tokens=8192)
    while not state.done:
        request = state.next_request()
        state.receive(*generate(request))              # token ids, log-probabilities, "stop" or "length"
        while state.pending_code is not None:
            state.receive_result(session.run(state.pending_code))
    rollout = state.result()

So sampling, evaluation and reinforcement learning share it, whatever drives it (`core.rollout_runner`). Tokens go in
and out as ids: the concatenation of the prompt and of all that was received and inserted is the sequence that the model
saw. What it did not write (answers of the tool, an interruption) has mask 0 and log-probability 0, by position.

A rollout is finished only if the model ended its last turn by itself, without a call that nobody answered:

* `stop`: it did;
* `length`: a turn met `max_turn_tokens`, the rollout its `max_tokens`, or the context its end;
* `tool_limit`: it called again after it was told to answer;
* `error`: the sandbox failed.
"""

import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from .answer_extraction import Extract, after_think, find_answer
from .errors import RecipeError
from .generation import first_stop
from .sandbox import CellResult
from .tool_protocol import ToolProtocol, ToolProtocolName
from .trajectory import content_hash

THINK, THINK_END = "<think>", "</think>"
ANSWER_NOW = "[No further calls are possible. Give your final answer now.]"

FinishReason = Literal["stop", "length", "tool_limit", "error"]


@dataclass
class RolloutConfig:
    """How a model may think and call its tool."""

    tool_protocol: ToolProtocolName = field(
        default="template",
        metadata={
            "help": "`template`: calls as the model's chat template writes them; `code_block`: ```python blocks."
        },
    )
    max_tool_calls: int = field(
        default=16,
        metadata={"help": "Calls of one rollout, malformed ones included; then the model is told to answer."},
    )
    max_turn_tokens: int | None = field(
        default=None, metadata={"help": "Longest turn in tokens; default: what the rollout has left."}
    )
    tool_result_tokens: int = field(
        default=1024, metadata={"help": "Tokens of one tool result that the model sees: its head and its tail."}
    )
    answer_tokens: int = field(
        default=512,
        metadata={"help": "Tokens that a tool result leaves for the answer: where less would remain it is cut further, "
                          "and the model is told to answer."},
    )  # fmt: skip
    think_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens of a turn after which a think block that is still open is interrupted."},
    )
    think_tokens_from: int | None = field(
        default=None,
        metadata={"help": "Interrupt at a random point from here to `think_tokens`, the same for a seed "
                          "(ScaleRL: 10240 to 12288); default: at `think_tokens`."},
    )  # fmt: skip
    interruption_phrase: str = field(
        default="Okay, time is up. Let me stop thinking and formulate a final answer now. </think>",
        metadata={"help": "What is inserted there; must close the think block. No loss falls on it."},
    )

    def __post_init__(self):
        problems = []
        if self.tool_protocol not in ("template", "code_block"):
            problems.append(f"tool_protocol is {self.tool_protocol!r}: use template or code_block")
        for key, least in (
            ("max_tool_calls", 1),
            ("max_turn_tokens", 1),
            ("tool_result_tokens", 16),
            ("answer_tokens", 1),
            ("think_tokens", 1),
            ("think_tokens_from", 1),
        ):
            if (value := getattr(self, key)) is not None and value < least:
                problems.append(f"{key} is {value}: use at least {least}")
        if self.think_tokens_from is not None and self.think_tokens_from > (self.think_tokens or 0):
            problems.append(
                f"think_tokens_from is {self.think_tokens_from}, think_tokens is {self.think_tokens}: set both, the "
                "first at most as large as the second"
            )
        if not self.interruption_phrase.rstrip().endswith(THINK_END):
            problems.append(f"interruption_phrase does not end with {THINK_END}: the model would go on thinking")
        if problems:
            raise RecipeError("; ".join(problems))


class TurnRequest(NamedTuple):
    """What to generate next.

    Attributes:
        prompt_ids: the prompt and all of the rollout so far.
        max_tokens: at most so many, which the context holds.
        stop: strings that end the generation; tokens behind them may be given back too.
        seed: from 0 to 2^63 - 1; the same for the same rollout's seed and number of the request.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Rollout:
    """What came of it.

    Attributes:
        prompt_ids: the prompt's token ids.
        completion_ids: everything after the prompt, foreign tokens included.
        mask: per token of the completion, 1 where the model wrote it.
        logprobs: per token of the completion, 0.0 on foreign ones; None where the engine gave none.
        messages: the completion as chat messages, tool calls and tool turns included.
        finish_reason: see the module's first lines.
        n_calls: calls that were run.
        n_failed: of these, those that raised, timed out or found the session ended.
        n_malformed: attempts that could not be run.
        first_call_position: tokens of the completion before the first attempt; None without one.
        tool_seconds: wall-clock seconds in the tool.
        interrupted: whether a think block was closed by force.
        void_turn: whether some turn has neither an attempt to call nor a final answer, as one that was cut off in its
            thoughts (SimpleTIR, 2509.02479, drops such rollouts from the update).
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    mask: list[int]
    logprobs: list[float] | None
    messages: list[dict[str, Any]]
    finish_reason: FinishReason
    n_calls: int
    n_failed: int
    n_malformed: int
    first_call_position: int | None
    tool_seconds: float
    interrupted: bool
    void_turn: bool

    @property
    def n_model_tokens(self) -> int:
        """Tokens that the model wrote."""
        return sum(self.mask)


class RolloutState:
    """A rollout on its way.

    Args:
        config: budgets.
        protocol: how the tool is called; the base class `ToolProtocol` is a rollout without tools.
        prompt_ids: what `protocol.encode` returned.
        seed: decides every turn.
        max_tokens: tokens of the whole completion, those of the tool included.
        max_context: tokens of prompt and completion together.
        stop: strings that end the rollout; the last message is cut before them.
        extract: where a final answer is looked for, to tell a void turn.
    """

    def __init__(
        self,
        config: RolloutConfig,
        protocol: ToolProtocol,
        prompt_ids: Sequence[int],
        seed: int,
        max_tokens: int,
        max_context: int | None = None,
        stop: Sequence[str] = (),
        extract: Extract = "boxed",
    ):
        self.prompt_ids, self.seed = tuple(prompt_ids), seed
        self._config, self._protocol, self._stop = config, protocol, tuple(stop)
        self._extract: Extract = extract
        self._most = max_tokens if max_context is None else min(max_tokens, max_context - len(self.prompt_ids))
        self._think = config.think_tokens
        if config.think_tokens is not None and config.think_tokens_from is not None:
            self._think = random.Random(seed).randint(config.think_tokens_from, config.think_tokens)
        self._ids: list[int] = []
        self._mask: list[int] = []
        self._logprobs: list[float] | None = []
        self._messages: list[dict[str, Any]] = []
        self._requests = 0
        self._turn_start = 0
        self._last_turn = False  # the model was told to answer
        self._opened = self._opens_think(self.prompt_ids)
        self._results: list[str | None] = []  # of the calls of this turn; None: still to be run
        self._codes: list[str] = []
        self._ended = True
        self._reason: FinishReason | None = None
        self._n_calls = self._n_failed = self._n_malformed = self._attempts = 0
        self._first_call: int | None = None
        self._tool_seconds = 0.0
        self._interrupted = self._void = False
        if self._most < 1:
            self._reason = "length"

    @property
    def done(self) -> bool:
        """Whether there is nothing more to generate and nothing to run."""
        return self._reason is not None

    @property
    def pending_code(self) -> str | None:
        """The cell that waits to be run, if any; then no turn can be requested."""
        return self._codes[0] if self._codes and not self.done else None

    @property
    def n_calls(self) -> int:
        """Calls that were run so far."""
        return self._n_calls

    def next_request(self) -> TurnRequest:
        """Return what to generate next."""
        if self.done or self._codes:
            raise RuntimeError("the rollout is done, or waits for its tool")
        most = self._room()
        if self._think is not None and (left := self._turn_start + self._think - len(self._ids)) > 0:
            most = min(most, left)
        # The first turn has the rollout's own seed: a rollout without calls is a plain sample.
        seed = int(content_hash(self.seed, self._requests), 16) >> 1 if self._requests else self.seed
        return TurnRequest(self.prompt_ids + tuple(self._ids), most, self._protocol.stop + self._stop, seed)

    def receive(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float] | None,
        finish_reason: str,
        text: str | None = None,
    ) -> None:
        """Take what the model wrote.

        Args:
            token_ids: the end token included, if it wrote one.
            logprobs: one per token, or None.
            finish_reason: `stop` (an end token or a stop string) or `length`.
            text: the tokens decoded, where the engine knows better than `protocol.decode`.
        """
        self._requests += 1
        self._ids += token_ids
        self._mask += [1] * len(token_ids)
        self._logprobs = None if self._logprobs is None or logprobs is None else [*self._logprobs, *logprobs]
        # An engine's text ends before a stop string, and the protocol's are part of the call.
        if text is None or self._protocol.stop or len(self._ids) - self._turn_start > len(token_ids):
            text = self._protocol.decode(self._ids[self._turn_start :])
        text = f"{THINK}\n{text}" if self._opened else text
        if finish_reason == "length":
            self._receive_cut(text)
            return
        self._ended = bool(token_ids) and token_ids[-1] in self._protocol.end_ids
        stopped_at = None if self._ended else first_stop(text, self._stop)
        text = text[:stopped_at]
        calls = self._protocol.parse(text).calls
        if calls:
            self._end_turn(text, "tool_limit" if self._last_turn else None)
        elif self._ended or stopped_at is not None or first_stop(text, self._protocol.stop) is None:
            self._end_turn(text, "stop")
        elif self._room() <= 0:
            self._end_turn(text, "length")
        # else a fence of something that is no call: the turn goes on

    def receive_result(self, result: CellResult) -> None:
        """Take the result of `pending_code`."""
        self._n_calls += 1
        self._n_failed += result.status != "ok"
        self._tool_seconds += result.seconds
        self._codes.pop(0)
        self._results[self._results.index(None)] = result.output
        if not self._codes:
            self._reply()

    def fail(self) -> None:
        """End the rollout: its sandbox failed, which says nothing about the model."""
        self._codes, self._reason = [], "error"

    def result(self) -> Rollout:
        """Return the rollout, once it is done."""
        if self._reason is None:
            raise RuntimeError("the rollout is not done")
        return Rollout(
            prompt_ids=list(self.prompt_ids),
            completion_ids=self._ids,
            mask=self._mask,
            logprobs=self._logprobs,
            messages=self._messages,
            finish_reason=self._reason,
            n_calls=self._n_calls,
            n_failed=self._n_failed,
            n_malformed=self._n_malformed,
            first_call_position=self._first_call,
            tool_seconds=self._tool_seconds,
            interrupted=self._interrupted,
            void_turn=self._void,
        )

    def _room(self) -> int:
        """Return how many tokens the turn may still have."""
        room = self._most - len(self._ids)
        if self._config.max_turn_tokens is not None:
            room = min(room, self._turn_start + self._config.max_turn_tokens - len(self._ids))
        return room

    def _receive_cut(self, text: str) -> None:
        """A limit was met: that of thinking, behind which the turn goes on, or another one."""
        if self._room() <= 0 or self._think is None or len(self._ids) != self._turn_start + self._think:
            self._end_turn(text, "length")
        elif text.rfind(THINK) > text.rfind(THINK_END):
            phrase = self._config.interruption_phrase
            self._insert(self._protocol.tokenize(phrase))
            self._interrupted = True
            if self._room() <= 0:
                self._end_turn(text + phrase, "length")

    def _opens_think(self, ids: Sequence[int]) -> bool:
        return self._protocol.decode(ids[-16:]).rstrip().endswith(THINK)

    def _insert(self, ids: Sequence[int]) -> None:
        """Append tokens that the model did not write."""
        self._ids += ids
        self._mask += [0] * len(ids)
        if self._logprobs is not None:
            self._logprobs += [0.0] * len(ids)

    def _end_turn(self, text: str, reason: FinishReason | None) -> None:
        """Close the turn; with no reason its calls are now answered."""
        turn = self._protocol.parse(text, cut_off=reason == "length")
        self._messages.append(turn.message)
        self._reason = reason
        self._void |= not turn.calls and find_answer(after_think(text) or "", self._extract)[0] is None
        if turn.calls and self._first_call is None:
            self._first_call = self._turn_start + self._tokens_before(turn.calls[0].start)
        self._n_malformed += sum(call.code is None for call in turn.calls)
        if reason is not None:
            return
        allowed = self._config.max_tool_calls - self._attempts
        self._attempts += len(turn.calls)
        self._results = [call.fault for call in turn.calls[:allowed]]
        self._results += ["[The call was not run: there were too many.]\n"] * len(turn.calls[allowed:])
        self._codes = [call.code for call in turn.calls[:allowed] if call.code is not None]
        if not self._codes:
            self._reply()

    def _tokens_before(self, character: int) -> int:
        """Return how many tokens of the turn hold its first characters."""
        ids = self._ids[self._turn_start :]
        if self._opened:
            character -= len(THINK) + 1
        return max(
            bisect_left(range(len(ids) + 1), character + 1, key=lambda n: len(self._protocol.decode(ids[:n]))) - 1, 0
        )

    def _reply(self) -> None:
        """Append the answer to the calls of this turn, and open the next one; or end, where there is no room."""
        results = [result or "" for result in self._results]
        room = self._most - len(self._ids) - self._config.answer_tokens
        self._last_turn |= self._attempts >= self._config.max_tool_calls
        for most in _shrinking(self._config.tool_result_tokens):
            self._last_turn |= most < self._config.tool_result_tokens
            shortened = [self._protocol.shorten(result, most) for result in results]
            if self._last_turn:
                shortened[-1] = f"{shortened[-1].rstrip()}\n{ANSWER_NOW}".lstrip()
            messages = self._protocol.reply_messages(shortened)
            ids = self._protocol.reply_ids(messages, self._ended)
            if len(ids) <= room:
                self._insert(ids)
                self._messages += messages
                self._results = []
                self._turn_start = len(self._ids)
                self._opened = self._opens_think(ids)
                return
        self._reason = "length"


def _shrinking(most: int) -> list[int]:
    """Return most, and ever smaller numbers of tokens down to 0."""
    return [most >> power for power in range(most.bit_length() + 1)]
