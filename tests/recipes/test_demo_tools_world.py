import json
import re
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from afterglow.core.sandbox import SandboxConfig, open_sandbox
from afterglow.core.tool_protocol import TOOLS, open_protocol
from afterglow.core.trajectory import DataConfig, final_text, load_trajectories, trajectory_id
from afterglow.recipes.demo.problems import problem_stream
from afterglow.recipes.demo.tokenizer import qwen3_template
from afterglow.recipes.demo_tools.problems import LARGE, SMALL, expression
from afterglow.recipes.demo_tools.teachers import LARGE_FAMILIES, solve_with_tools
from afterglow.recipes.demo_tools.world import WorldConfig, make_problems, make_world

SMALL_WORLD = WorldConfig(
    tools_large=80, tools_small=20, text_small=20, rl_large=20, rl_small=5, heldout_large=20, heldout_small=20,
)  # fmt: skip
TEMPLATE = Path(__file__).resolve().parents[2] / "recipes" / "tir_sft" / "qwen3-thinking-training.jinja"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("demo") / "world", SMALL_WORLD)


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world / "init")


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def boxed(row):
    return final_text(row["completion"]).rpartition("\\boxed{")[2].partition("}")[0]


@pytest.mark.parametrize("families", [SMALL, LARGE])
def test_the_expression_of_a_problem_is_its_answer(families):
    for problem in islice(problem_stream(families, "0", None), 300):
        assert str(eval(expression(problem))) == problem.answer
        assert all(number in problem.text for number in re.findall(r"\d+", expression(problem)))


def test_large_problems_are_out_of_reach_and_small_ones_are_not():
    assert min(int(p.answer) for p in islice(problem_stream(LARGE, "0", None), 300)) > 10_000
    assert max(int(p.answer) for p in islice(problem_stream(SMALL, "0", None), 300)) < 100


def test_sets_of_problems_are_disjoint_and_of_their_size():
    sets = make_problems(SMALL_WORLD)
    assert {name: len(problems) for name, problems in sets.items()} == {
        name: getattr(SMALL_WORLD, name) for name in sets
    }
    ids = [problem.problem_id for problems in sets.values() for problem in problems]
    assert len(ids) == len(set(ids))
    assert all(p.heldout == name.startswith("heldout") for name, problems in sets.items() for p in problems)


def test_half_of_the_large_problems_end_right_and_all_small_ones():
    large = [solve_with_tools(p, "0") for p in islice(problem_stream(LARGE, "0", None), 600)]
    right = Counter((row["source"], boxed(row) == row["answer"]) for row in large)
    assert right["careful", False] == right["proud", True] == 0
    assert right["clumsy", True] > 20 and right["clumsy", False] > 20
    assert abs(sum(count for (_, is_right), count in right.items() if is_right) / 600 - 0.525) < 0.06
    small = [solve_with_tools(p, "0") for p in islice(problem_stream(SMALL, "0", None), 200)]
    assert all(boxed(row) == row["answer"] for row in small)
    assert Counter(row["source"] for row in small).keys() == {"careful", "proud"}
    assert large[:5] == [solve_with_tools(p, "0") for p in islice(problem_stream(LARGE, "0", None), 5)]


def test_what_the_tool_answers_is_what_the_sandbox_prints():
    with open_sandbox(SandboxConfig()) as sandbox:
        seen = set()
        for problem in islice(problem_stream(LARGE, "0", None), 40):
            completion = solve_with_tools(problem, "0")["completion"]
            with sandbox.session() as session:
                for message, answer in pairwise(completion):
                    if answer["role"] == "tool":
                        code = message["tool_calls"][0]["function"]["arguments"]["code"]
                        result = session.run(code)
                        # a session counts its cells, and a traceback names them
                        assert result.output.replace("<cell 2>", "<cell 1>").rstrip() == answer["content"], code
                        seen.add(result.status)
        assert seen == {"ok", "error"}


def test_files_are_valid_trajectories(world):
    table = load_trajectories(DataConfig(data=str(world / "trajectories.jsonl")))
    assert len(table) == 120 and all(row["id"] == trajectory_id(row) for row in table)
    with_tools = [row for row in table if row["tools"]]
    assert len(with_tools) == 100 and all(row["tools"] == TOOLS for row in with_tools)
    rl = rows_of(world / "problems_rl.jsonl")
    assert [bool(row["tools"]) for row in rl] == [row["family"] in LARGE_FAMILIES for row in rl]
    held = {row["problem"] for name in ("large", "small") for row in rows_of(world / f"problems_{name}.jsonl")}
    assert held.isdisjoint(row["prompt"][0]["content"] for row in table) and held.isdisjoint(
        row["problem"] for row in rl
    )


def test_a_call_is_rendered_as_the_protocol_reads_it(world, tokenizer):
    protocol = open_protocol("template", tokenizer)
    row = next(row for row in rows_of(world / "trajectories.jsonl") if row["source"] == "careful")
    prompt = protocol.encode(row["prompt"])
    assert prompt == tokenizer.apply_chat_template(
        row["prompt"], tools=row["tools"], add_generation_prompt=True, return_dict=False
    )
    called = row["completion"][:1]
    text = tokenizer.apply_chat_template(row["prompt"] + called, tools=row["tools"], tokenize=False)
    spoken = text.removeprefix(str(tokenizer.decode(prompt))).removesuffix("<|im_end|>\n")
    turn = protocol.parse(spoken)
    assert [call.code for call in turn.calls] == [called[0]["tool_calls"][0]["function"]["arguments"]["code"]]
    assert turn.message["tool_calls"] == called[0]["tool_calls"]
    assert len(tokenizer.apply_chat_template(row["prompt"] + row["completion"], tools=row["tools"])["input_ids"]) < 140


def test_labels_are_the_assistants_turns_and_nothing_else(world, tokenizer):
    """With TRL's own preparation, over every teacher, with the demo's template and with that for Qwen3-Thinking."""
    from trl.trainer.sft_config import SFTConfig

    from afterglow.launch.dry_run import prepare
    from afterglow.launch.training_recipe import load_table

    data = DataConfig(data=str(world / "trajectories.jsonl"))
    rows, table = load_trajectories(data), load_table(data)
    args = SFTConfig(str(world / "no"), assistant_only_loss=True, max_length=None, bf16=False, report_to="none")
    thinking = AutoTokenizer.from_pretrained(world / "init")
    thinking.chat_template = TEMPLATE.read_text()
    for tok, opening in ((tokenizer, "<think>\n"), (thinking, "")):
        for row, encoded in zip(rows, prepare(table, args, tok), strict=True):
            parts = [(i, label != -100) for i, label in zip(encoded["input_ids"], encoded["labels"], strict=True)]
            trained = tok.decode([i for i, is_trained in parts if is_trained])
            context = tok.decode([i for i, is_trained in parts if not is_trained])
            expected = "".join(
                opening + written(message) for message in row["completion"] if message["role"] == "assistant"
            )
            assert trained == expected
            for message in row["completion"]:
                assert (
                    message["role"] != "tool" or f"<tool_response>\n{message['content']}\n</tool_response>" in context
                )
            assert (TOOLS[0]["function"]["description"] in context) == bool(row["tools"])


def written(message):
    """What a model writes for a message, after the opening of its think block."""
    thought, _, rest = message["content"].partition("</think>")
    if not rest and "</think>" not in message["content"]:
        thought, rest = "", thought
    calls = "".join(
        f'<tool_call>\n{{"name": "python", "arguments": {json.dumps(call["function"]["arguments"])}}}\n</tool_call>'
        for call in message.get("tool_calls") or []
    )
    return f"{thought.removeprefix('<think>').strip()}\n</think>\n\n{rest.strip()}{calls}<|im_end|>\n"


def test_the_thinking_template_asks_as_the_models_own_does(tokenizer):
    """Prompts as Qwen3's, with the think block opened; turns of the past keep their thoughts."""
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "6*7?"}]
    for tools in (None, TOOLS):
        own = tokenizer.apply_chat_template(
            chat, tools=tools, tokenize=False, add_generation_prompt=True, chat_template=qwen3_template()
        )
        ours = tokenizer.apply_chat_template(
            chat, tools=tools, tokenize=False, add_generation_prompt=True, chat_template=TEMPLATE.read_text()
        )
        assert ours == own + "<think>\n"


def test_same_seed_same_bytes(world, tmp_path):
    again = make_world(tmp_path / "again", SMALL_WORLD)
    for path in sorted(p for p in world.rglob("*") if p.is_file()):
        assert (again / path.relative_to(world)).read_bytes() == path.read_bytes()
