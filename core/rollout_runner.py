"""Many rollouts at once. Two drivers of the same state machine (`core.rollout`):

* `run_streaming`: a rollout that waits for its tool holds up no other one. For sampling and evaluation.
* `run_lockstep`: all ranks generate in the same rounds, whoever still has work, as sharded weights require. For
  training.

Cells run in threads, those of different rollouts at the same time, each rollout in a session of its own: opened at its
first call, closed at its end.
"""

import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from .errors import SandboxError
from .generation import Engine, Request, SamplingConfig
from .rollout import Rollout, RolloutState, TurnRequest
from .sandbox import Sandbox, Session

TOOL_THREADS = 256  # they wait for cells, which cost processor time elsewhere

TurnReply = tuple[Sequence[int], Sequence[float] | None, str]  # token ids, log-probabilities, "stop" or "length"


class _Tools:
    """The sessions of the rollouts that have called, and the threads that wait for their cells."""

    def __init__(self, sandbox: Sandbox | None):
        self._sandbox = sandbox
        self._threads = ThreadPoolExecutor(TOOL_THREADS, thread_name_prefix="afterglow-tools")
        self._sessions: dict[RolloutState, Session] = {}

    def run(self, state: RolloutState) -> "Future[None]":
        """Run the calls of one turn, in order, in a thread."""
        return self._threads.submit(self._run, state)

    def _run(self, state: RolloutState) -> None:
        if state not in self._sessions:
            if self._sandbox is None:
                raise RuntimeError("a rollout calls its tool, but there is no sandbox")
            self._sessions[state] = self._sandbox.session()
        while (code := state.pending_code) is not None:
            state.receive_result(self._sessions[state].run(code))
        if state.done:
            self.forget(state)

    def forget(self, state: RolloutState) -> None:
        """Close the session of a rollout, if it has one."""
        if session := self._sessions.pop(state, None):
            self._threads.submit(session.close)

    def close(self) -> None:
        for session in list(self._sessions.values()):
            session.close()
        self._threads.shutdown(cancel_futures=False)

    def __enter__(self) -> "_Tools":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def run_streaming(
    engine: Engine,
    rollouts: Iterable[tuple[str, RolloutState, SamplingConfig]],
    sandbox: Sandbox | None = None,
    logprobs: bool = False,
    in_flight: int = 512,
) -> Iterator[tuple[str, Rollout]]:
    """Run rollouts on an engine, and yield each as it finishes, in any order.

    Beyond floating-point rounding in the engine, a rollout depends on its own prompt, seed, sampling and tool only.

    Args:
        engine: its tokenizer is that of the protocol.
        rollouts: unique key, state, and how to draw (`max_tokens` and `stop` come from the state); read as they are
            started.
        sandbox: opens the sessions; may be None where no protocol has tools.
        logprobs: whether the rollouts carry log-probabilities.
        in_flight: rollouts on their way at once, which bounds the open sessions; more than the engine runs, so that it
            stays busy while some wait for their tool.

    Raises:
        GenerationError: the engine failed.
        SandboxError: the sandbox failed; what it would have answered is not the model's doing, so nothing is made up.
    """
    backlog, active = iter(rollouts), dict[str, tuple[RolloutState, SamplingConfig]]()
    answered: queue.SimpleQueue[tuple[str, Future[None]]] = queue.SimpleQueue()
    with engine.open_stream() as stream, _Tools(sandbox) as tools:

        def go_on(key: str) -> Iterator[tuple[str, Rollout]]:
            state, sampling = active[key]
            if state.done:
                del active[key]
                tools.forget(state)
                yield key, state.result()
            elif state.pending_code is not None:
                tools.run(state).add_done_callback(lambda future: answered.put((key, future)))
            else:
                prompt_ids, most, stop, seed = state.next_request()
                drawn = replace(sampling, max_tokens=most, stop=list(stop))
                stream.submit(Request(key, prompt_ids, seed, drawn, logprobs))

        while True:
            while len(active) < in_flight and (new := next(backlog, None)) is not None:
                key, state, sampling = new
                active[key] = state, sampling
                yield from go_on(key)
            if not active:
                return
            while not answered.empty() or not stream.running:
                key, future = answered.get()
                future.result()
                yield from go_on(key)
                if not active:
                    break
            for completion in stream.poll():
                state, _ = active[completion.key]
                state.receive(completion.token_ids, completion.logprobs, completion.finish_reason, completion.text)
                yield from go_on(completion.key)


def run_lockstep(
    states: Sequence[RolloutState],
    generate_turn: Callable[[list[TurnRequest]], Sequence[TurnReply]],
    sandbox: Sandbox | None,
    any_rank: Callable[[bool], bool] = bool,
) -> list[Rollout]:
    """Run this rank's rollouts in rounds that all ranks share: generate, then run all calls at the same time.

    Every rank calls `generate_turn` equally often, and never with nothing: a rank whose rollouts are done joins with
    one token of its first prompt, which is thrown away. So rollouts with different numbers of calls work where
    generation is a collective (FSDP2, ZeRO-3, a sharded engine).

    Args:
        states: at least one.
        generate_turn: one reply per request, in order.
        sandbox: opens the sessions. Where it fails the rollout ends with `error`: other ranks wait for this one.
        any_rank: whether any rank says True (a collective); default: there is one rank.

    Returns:
        The rollouts, in the order of `states`.
    """
    dummy = TurnRequest(states[0].prompt_ids, 1, (), 0)
    with _Tools(sandbox) as tools:
        while any_rank(any(not state.done for state in states)):
            asking = [state for state in states if not state.done]
            replies = generate_turn([state.next_request() for state in asking] or [dummy])
            if len(replies) != max(len(asking), 1):
                raise RuntimeError(f"{len(replies)} replies to {max(len(asking), 1)} requests")
            for state, reply in zip(asking, replies, strict=False):
                state.receive(*reply)
            running = [(state, tools.run(state)) for state in asking if state.pending_code is not None]
            for state, future in running:
                try:
                    future.result()
                except SandboxError:
                    state.fail()
            for state in asking:
                if state.done:
                    tools.forget(state)
    return [state.result() for state in states]
