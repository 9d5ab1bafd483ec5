import json
from collections import Counter

import pytest
from datasets import Features, Json, Value
from filter_tables import dropped_ids, row, run_filter, write_jsonl

from afterglow.core.errors import DataError, RecipeError
from afterglow.core.recipe import Section, build, read_recipe
from afterglow.core.tool_protocol import TOOLS
from afterglow.core.trajectory import FEATURES, DataConfig, load_trajectories, table_of
from afterglow.data_filters import mixture
from afterglow.data_filters.chain import run
from afterglow.data_filters.mixture import MixtureConfig, counts_of, largest_total

CALL = {"type": "function", "function": {"name": "python", "arguments": {"code": "2+2"}}}
CALLED = [
    {"role": "assistant", "content": "<think>\na\n</think>", "tool_calls": [CALL]},
    {"role": "tool", "content": "4\n"},
    {"role": "assistant", "content": "\\boxed{4}"},
]
OTHER_TOOLS = [{"type": "function", "function": {"name": "other"}}]


def rows_of(tool, text, **columns):
    with_tools = [row(f"tool{i}", [*CALLED], problem_id=f"p{i}", **columns) for i in range(tool)]
    return with_tools + [row(f"text{i}", problem_id=f"p{i}", **columns) for i in range(text)]


def with_columns(rows, **columns):
    return table_of(rows, Features(FEATURES | columns))


@pytest.mark.parametrize(
    "total, proportions, expected",
    [
        (10, {"tool": 1, "text": 1}, [5, 5]),
        (7, {"tool": 1, "text": 1}, [4, 3]),
        (10, {"a": 1, "b": 1, "c": 1}, [4, 3, 3]),
        (100, {"tool": 0.6, "text": 0.4}, [60, 40]),
        (3, {"a": 1 / 3, "b": 2 / 3}, [1, 2]),
        (10, {"a": 0.55, "b": 0.25, "c": 0.2}, [6, 2, 2]),  # 5.5, 2.5, 2: the tie goes to the first
    ],
)
def test_counts_are_exact(total, proportions, expected):
    assert list(counts_of(total, proportions).values()) == expected


@pytest.mark.parametrize(
    "have, proportions, total",
    [
        ({"tool": 6, "text": 4}, {"tool": 1, "text": 1}, 9),  # 5 + 4
        ({"tool": 4, "text": 6}, {"tool": 1, "text": 1}, 8),  # 9 would take 5 + 4
        ({"tool": 30, "text": 8}, {"tool": 3, "text": 1}, 34),  # 25.5 + 8.5 -> 26 + 8
        ({"tool": 30}, {"tool": 1, "text": 1}, 1),
        ({}, {"tool": 1}, 0),
    ],
)
def test_the_scarcest_part_decides(have, proportions, total):
    assert largest_total(have, proportions) == total
    assert all(count <= have.get(part, 0) for part, count in counts_of(total, proportions).items())


def test_half_tool_half_text(tmp_path):
    rows = rows_of(6, 4)
    result = run_filter(mixture, rows, MixtureConfig({"tool": 1, "text": 1}, total=8), tmp_path)
    gone = dropped_ids(rows, result)
    assert Counter(gone.values()) == {"more tool than the mixture takes": 2}
    assert result.report["in"] == {"text": 4, "tool": 6} and result.report["kept"] == {"text": 4, "tool": 4}
    tools = [json.loads(value.as_py()) if value.as_py() else None for value in result.scores["tools"]]
    assert tools == [TOOLS] * 6 + [None] * 4
    assert "chat_template_kwargs" not in result.scores
    assert gone != dropped_ids(
        rows, run_filter(mixture, rows, MixtureConfig({"tool": 1, "text": 1}, total=8), tmp_path, 1)
    )
    backwards = rows[::-1]
    again = run_filter(mixture, backwards, MixtureConfig({"tool": 1, "text": 1}, total=8), tmp_path)
    assert dropped_ids(backwards, again) == gone, "the order of the file does not matter"


def test_tools_that_were_offered_stay_and_make_a_row_one_with_tools(tmp_path):
    rows = [
        row("offered") | {"tools": OTHER_TOOLS},
        row("text") | {"tools": None},
        row("called", [*CALLED]) | {"tools": None},
        row("empty") | {"tools": []},
    ]
    for kind in (Json(), Value("string")):
        given = [r | {"tools": json.dumps(r["tools"])} for r in rows] if isinstance(kind, Value) else rows
        result = run_filter(mixture, with_columns(given, tools=kind), MixtureConfig({"tool": 1, "text": 1}), tmp_path)
        tools = [json.loads(value.as_py()) if value.as_py() else None for value in result.scores["tools"]]
        assert tools == [OTHER_TOOLS, None, TOOLS, None]
        assert result.report["in"] == {"text": 2, "tool": 2} and not result.dropped


def test_parts_by_a_column(tmp_path):
    rows = [row(str(i), source="maths" if i < 6 else "code" if i < 9 else "law") for i in range(10)]
    config = MixtureConfig({"maths": 2, "code": 1}, by="source")
    result = run_filter(mixture, rows, config, tmp_path)
    assert dropped_ids(rows, result) == {"9": "source law is not in `proportions`"}
    assert result.report["kept_by_source"] == {"code": {"code": 3}, "maths": {"maths": 6}}


def test_a_part_without_enough_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"4 rows of `text` wanted, 3 there \(by `mode`: tool 6, text 3\)"):
        run_filter(mixture, rows_of(6, 3), MixtureConfig({"tool": 1, "text": 1}, total=8), tmp_path)
    with pytest.raises(DataError, match=r"of `text` wanted, 0 there"):
        run_filter(mixture, rows_of(6, 0), MixtureConfig({"tool": 1, "text": 1}), tmp_path)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"proportions": {"tool": 0}}, "above 0"),
        ({"proportions": {}}, "above 0"),
        ({"proportions": {"tol": 1}}, "the parts are tool and text, got tol"),
        ({"proportions": {"tool": 1, "text": 1}, "total": 1}, "at least one row of each part"),
        ({"proportions": {"tool": 1}, "chat_template_kwargs": {"text": {}}}, "names text"),
    ],
)
def test_a_wrong_recipe_is_refused(values, message):
    with pytest.raises(RecipeError, match=message):
        build(Section(values), MixtureConfig)


def test_a_chain_writes_rows_that_trl_renders(tmp_path):
    """What the chain keeps is read again, and its labels are the assistant's turns and nothing else."""
    from tiny import tiny_tokenizer
    from trl.trainer.sft_config import SFTConfig

    from afterglow.launch.dry_run import prepare
    from afterglow.launch.training_recipe import load_table

    rows = [r | {"tools": None} for r in rows_of(3, 4)]
    rows[0] |= {"tools": OTHER_TOOLS, "correct": False}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data: {write_jsonl(tmp_path / 'data.jsonl', rows)}\noutput_dir: {tmp_path / 'run'}\nsteps:\n"
        "  - length: {max_words: 100}\n"
        "  - mixture: {proportions: {tool: 1, text: 1}, chat_template_kwargs: {text: {enable_thinking: false}}}\n"
    )
    kept = run(read_recipe(str(recipe))) / "kept.jsonl"
    table = load_trajectories(DataConfig(data=str(kept)))
    assert [tools and tools[0]["function"]["name"] for tools in table["tools"]].count("python") == 2
    assert Counter(map(str, table["chat_template_kwargs"])) == {"{}": 3, "{'enable_thinking': False}": 3}

    tokenizer = tiny_tokenizer()
    args = SFTConfig(str(tmp_path / "out"), assistant_only_loss=True, max_length=None, bf16=False, report_to="none")
    prepared = prepare(load_table(DataConfig(data=str(kept))), args, tokenizer)
    for given, encoded in zip(table, prepared, strict=True):
        trained = tokenizer.decode([label for label in encoded["labels"] if label != -100])
        context = tokenizer.decode(
            [i for i, label in zip(encoded["input_ids"], encoded["labels"], strict=True) if label == -100]
        )
        if given["tools"]:
            call = '<tool_call>\n{"name": "python", "arguments": {"code": "2+2"}}\n</tool_call>'
            empty = "<think>\n\n</think>\n\n"
            assert trained == f"<think>\na\n</think>\n\n{call}<|im_end|>\n{empty}\\boxed{{4}}<|im_end|>\n"
            assert "<tool_response>\n4\n" in context and "<tools>" in context
        else:
            assert "<tools>" not in context and trained.endswith("The answer is \\boxed{4}.<|im_end|>\n")
