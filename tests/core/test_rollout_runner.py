import pytest
from scripted import END, QUESTION, TOKENIZER, PlainSandbox, ScriptedEngine, answer, call, drive, ids, state

from afterglow.core.errors import SandboxError
from afterglow.core.generation import SamplingConfig
from afterglow.core.rollout_runner import run_lockstep, run_streaming
from afterglow.core.sandbox import CellResult

SAMPLING = SamplingConfig()


def counting(prompt, seed):
    """As many calls as the question says, each adding one to a variable; then what the last one printed."""
    wanted = int(prompt.partition("calls: ")[2].split("<")[0])
    done = prompt.count("<tool_response>\n")
    return (
        call("out += 1")
        if done < wanted
        else answer(prompt.rpartition("<tool_response>\n")[2].split("\n")[0] if done else "0")
    )


def questions(*calls):
    return [[{"role": "user", "content": f"calls: {n}"}] for n in calls]


def stream(engine, sandbox, asked, **options):
    jobs = ((str(n), state(seed=n, question=question), SAMPLING) for n, question in enumerate(asked))
    return dict(run_streaming(engine, jobs, sandbox, **options))


def test_each_rollout_has_a_session_of_its_own_that_keeps_its_variables():
    with PlainSandbox() as sandbox:
        found = stream(ScriptedEngine(counting), sandbox, questions(0, 1, 3, 2))
    assert [found[str(n)].messages[-1]["content"] for n in range(4)] == [
        "So \\boxed{0}.", "So \\boxed{1}.", "So \\boxed{3}.", "So \\boxed{2}."
    ]  # fmt: skip
    assert [found[str(n)].n_calls for n in range(4)] == [0, 1, 3, 2]
    assert sandbox.opened == 3 and sandbox.open == 0  # none for the rollout without calls


def test_tools_of_different_rollouts_run_at_the_same_time():
    with PlainSandbox(meet=64) as sandbox:  # no cell returns before 64 run
        found = stream(ScriptedEngine(counting), sandbox, questions(*[1] * 64))
        locked = run_lockstep([state(question=q) for q in questions(*[1] * 64)], rounds(counting, []), sandbox)
    assert [rollout.n_calls for rollout in [*found.values(), *locked]] == [1] * 128


def test_no_more_sessions_are_open_than_rollouts_in_flight():
    with PlainSandbox() as sandbox:
        found = stream(ScriptedEngine(counting), sandbox, questions(*[2] * 20), in_flight=3)
    assert len(found) == 20 and sandbox.most_open <= 3 and sandbox.opened == 20


def test_turns_have_seeds_of_their_own_and_the_same_in_every_run():
    def noisy(prompt, seed):
        return call(f"out = {seed}") if prompt.count("<tool_response>\n") < 2 else answer(str(seed))

    runs = []
    for in_flight in (1, 8):
        with PlainSandbox() as sandbox:
            runs.append(stream(ScriptedEngine(noisy), sandbox, questions(*[0] * 8), in_flight=in_flight))
    assert {key: r.completion_ids for key, r in runs[0].items()} == {
        key: r.completion_ids for key, r in runs[1].items()
    }
    assert len({tuple(r.completion_ids) for r in runs[0].values()}) == 8
    assert "out = 5" in runs[0]["5"].messages[0]["tool_calls"][0]["function"]["arguments"]["code"]  # its own seed first


def test_a_sandbox_that_fails_ends_a_stream_but_only_one_rollout_of_a_round():
    with PlainSandbox(fault=SandboxError("gone")) as sandbox, pytest.raises(SandboxError, match="gone"):
        stream(ScriptedEngine(counting), sandbox, questions(1))
    states = [state(question=question) for question in questions(0, 1)]
    with PlainSandbox(fault=SandboxError("gone")) as sandbox:
        rollouts = run_lockstep(states, rounds(counting, []), sandbox)
    assert [rollout.finish_reason for rollout in rollouts] == ["stop", "error"]


def test_engine_and_log_probabilities():
    with PlainSandbox() as sandbox:
        (rollout,) = stream(ScriptedEngine(counting), sandbox, questions(1), logprobs=True).values()
    assert rollout.logprobs == [-0.5 * own for own in rollout.mask]


def rounds(policy, log):
    """A `generate_turn` that follows a policy and logs how many requests each round has."""

    def generate(requests):
        log.append(len(requests))
        turns = [ids(policy(TOKENIZER.decode(r.prompt_ids), r.seed))[: r.max_tokens] for r in requests]
        return [(turn, None, "stop" if turn[-1] == TOKENIZER.eos_token_id else "length") for turn in turns]

    return generate


def test_lockstep_gives_what_streaming_gives():
    asked = questions(2, 0, 1)
    with PlainSandbox() as sandbox:
        streamed = stream(ScriptedEngine(counting), sandbox, asked)
        log = []
        states = [state(seed=n, question=question) for n, question in enumerate(asked)]
        locked = run_lockstep(states, rounds(counting, log), sandbox)
    assert [r.completion_ids for r in locked] == [streamed[str(n)].completion_ids for n in range(3)]
    assert log == [3, 2, 1]


def test_a_rank_without_work_joins_with_one_token():
    more = iter([True, True, True, False])  # another rank needs a third round
    log = []
    states = [state(question=question) for question in questions(1)]
    with PlainSandbox() as sandbox:
        (rollout,) = run_lockstep(states, rounds(counting, log), sandbox, lambda mine: next(more))
    assert log == [1, 1, 1] and rollout.n_calls == 1
    alone = drive(
        state(question=questions(1)[0]), call("out += 1"), answer("1"), run=lambda _: CellResult("1", "ok", 0)
    )
    assert rollout.completion_ids == alone.completion_ids


def test_text_only_rollouts_need_no_sandbox():
    jobs = [("a", state(tools=False, seed=3), SAMPLING)]
    ((_, rollout),) = run_streaming(ScriptedEngine(lambda prompt, seed: f"Fine.{END}"), jobs)
    assert rollout.messages == [{"role": "assistant", "content": "Fine."}] and rollout.finish_reason == "stop"
    assert QUESTION[0]["content"] in TOKENIZER.decode(rollout.prompt_ids)
