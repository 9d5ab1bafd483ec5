import pytest
from filter_tables import dropped_ids, row, run_filter

from afterglow.data_filters import message_format
from afterglow.data_filters.message_format import FormatConfig, repetition

CALL = {"type": "function", "function": {"name": "python", "arguments": {"code": "2+2"}}}


def turns(*messages):
    return [{"role": role, "content": content} for role, content in messages]


ROWS = [
    row("plain", "It is \\boxed{4}."),
    row("thinks", "<think>Two and two.</think>It is \\boxed{4}."),
    row("opened by the prompt", "Two and two.</think>It is \\boxed{4}."),
    row("field", [{"role": "assistant", "content": "It is \\boxed{4}.", "reasoning_content": "Two and two."}]),
    row("null field", [{"role": "assistant", "content": "It is \\boxed{4}.", "reasoning_content": None}]),
    row("empty field", [{"role": "assistant", "content": "It is \\boxed{4}.", "reasoning_content": ""}]),
    row("empty", "<think>\n\n</think>It is \\boxed{4}."),
    row("open", "<think>Two and two is \\boxed{4}"),
    row("silent", "<think>Two and two.</think>\n"),
    row("no box", "<think>Two and two.</think>It is 4."),
    row("cut", "<think>Two.</think>It is \\boxed{4}.", finish_reason="length"),
    row("no result", [{"role": "assistant", "content": "", "tool_calls": [CALL]}]),
    row("ends on a result", [{"role": "assistant", "content": "", "tool_calls": [CALL]}, *turns(("tool", "4"))]),
]
ALWAYS = {
    "cut": "finish_reason is length",
    "no result": "a tool call without its result",
    "ends on a result": "ends with a message of the tool",
}


def run(folder, rows=ROWS, **keys):
    return dropped_ids(rows, run_filter(message_format, rows, FormatConfig(**keys), folder))


def test_the_default_asks_for_an_answer_and_an_end(tmp_path):
    silent = {"open": "no answer after the reasoning", "silent": "no answer after the reasoning"}
    assert run(tmp_path) == ALWAYS | silent
    gone = run(tmp_path, finished=False)
    assert gone == silent | {"no result": "no answer", "ends on a result": "no answer"}
    assert run(tmp_path, finished=False, answer="any") == {}


def test_reasoning_required(tmp_path):
    no = "no marked reasoning"
    assert run(tmp_path, reasoning="required", answer="boxed") == ALWAYS | {
        "plain": no,
        "null field": no,
        "empty field": "empty reasoning",
        "empty": "empty reasoning",
        "open": "reasoning never closes",
        "silent": "no answer after the reasoning",
        "no box": "no boxed answer",
    }


def test_reasoning_forbidden(tmp_path):
    kept = {r["id"] for r in ROWS} - set(run(tmp_path, reasoning="forbidden"))
    assert kept == {"plain", "null field"}


def test_repetition_by_hand():
    assert repetition("one two three", n=2) == 0 == repetition("", n=2)
    assert repetition("a b a b a b", n=2) == pytest.approx(3 / 5)  # ab ba ab ba ab
    assert repetition(" ".join(map(str, range(500)))) == 0


def test_a_loop_is_dropped_wherever_it_stands(tmp_path):
    loop = "Wait, let me check that again, since the last sum may be wrong. " * 40
    rows = [
        row("loop", loop + "\\boxed{4}"),
        row("field", [{"role": "assistant", "content": "4", "reasoning_content": loop}]),
        row("sound", f"{' '.join(map(str, range(300)))} \\boxed{{4}}"),
    ]
    result = run_filter(message_format, rows, FormatConfig(max_repetition=0.3), tmp_path)
    gone = dropped_ids(rows, result)
    assert set(gone) == {"loop", "field"} and all(
        why.startswith("repeats itself (repetition 0.9") for why in gone.values()
    )
    assert result.scores["repetition"][2] == 0 and result.report["histogram"]["counts"]["t"][0] == 1
    with pytest.raises(ValueError, match="max_repetition"):
        FormatConfig(max_repetition=1.0)
