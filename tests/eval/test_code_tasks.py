import base64
import json
import pickle
import zlib

import pytest
import yaml

from afterglow.core.code_grading import CodeGrader
from afterglow.core.code_tests import gold_of_row, read_tests
from afterglow.core.errors import DataError, RecipeError
from afterglow.core.recipe import build, read_recipe
from afterglow.core.sandbox import SandboxConfig
from afterglow.eval.tasks import Task, find_task


def packed(found):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(found)))).decode()


STDIN = [{"input": "1", "output": "2", "testtype": "stdin"}]
CALLED = [{"input": '[1, 2]\n"x"', "output": "[3]", "testtype": "functional"}]


def test_columns_of_tests_are_joined():
    row = {"public": json.dumps(STDIN), "private": packed([STDIN[0] | {"input": "5"}]), "metadata": "{}"}
    assert read_tests(gold_of_row(row, ["public", "private"])) == (None, [("1", "2"), ("5", "2")])
    row = {"public": CALLED, "private": packed(CALLED), "metadata": '{"func_name": "f"}'}
    assert read_tests(gold_of_row(row, ["public", "private"])) == ("f", 2 * [([[1, 2], "x"], [3])])


def test_tests_of_ones_own():
    assert read_tests('[{"input": "1", "output": "2"}]') == (None, [("1", "2")])
    assert read_tests('{"function": "f", "tests": [{"input": [1], "output": 2}]}') == ("f", [([1], 2)])


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_tests_that_cannot_be_read_are_named(capsys):
    evil = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    for columns, metadata, fault in (
        ({}, "{}", "'t' of `tests` is missing or empty"), ({"t": "%%"}, "{}", "cannot be read"),
        ({"t": evil}, "{}", "would run builtins.print"), ({"t": '[{"input": "1"}]'}, "{}", "test 1 needs `input` and"),
        ({"t": json.dumps(CALLED)}, None, "no `func_name`"), ({"t": json.dumps(STDIN)}, "{", "'metadata' is not JSON"),
        ({"t": STDIN + CALLED}, '{"func_name": "f"}', "some tests call a function and others do not"),
        ({"t": [CALLED[0] | {"input": "x"}]}, '{"func_name": "f"}', "one argument a line"),
        ({"t": packed({"a": 1})}, "{}", "does not hold a list"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=fault):
            read_tests(gold_of_row(columns | {"metadata": metadata}, ["t"]))
    assert capsys.readouterr().out == "", "nothing of a pickle is run"
    grader = CodeGrader(SandboxConfig())
    for gold, fault in (
        ("", "not JSON"), (None, "not JSON"), ("[]", "there is no test"), ('{"tests": 3}', "must be a list"),
        ('[{"input": 1, "output": "1"}]', "test 1: `input` and `output` must be texts"),
        ('{"function": "f", "tests": [{"input": "1", "output": 1}]}', "list of arguments of f"),
        ("[" * 100_000, "not JSON"),
    ):  # fmt: skip
        assert fault in (grader.check_gold(gold) or ""), gold
    assert grader.check_gold('[{"input": "1", "output": "2"}]') is None


def test_livecodebench_rows_become_problems(tmp_path):
    rows = [
        {"question_content": "Double.", "question_id": "a", "public_test_cases": json.dumps(STDIN),
         "private_test_cases": packed(STDIN), "metadata": "{}", "starter_code": ""},
        {"question_content": "Add.", "question_id": "b", "public_test_cases": json.dumps(CALLED),
         "private_test_cases": packed(CALLED), "metadata": '{"func_name": "f"}', "starter_code": "class Solution:"},
    ]  # fmt: skip
    (tmp_path / "lcb.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    packaged, _ = find_task("livecodebench")
    values = {name: getattr(packaged, name) for name in ("columns", "tests", "starter", "prompt_template", "grader")}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", "data": str(tmp_path / "lcb.jsonl"), **values}))
    (task,) = build(read_recipe(tmp_path / "mine.yaml"), Task)
    first, second = task.load_problems()
    assert first.problem_id == "a" and len(read_tests(first.gold).cases) == 2
    assert "Begin with" not in first.prompt[-1]["content"]
    assert len(str(first.answer)) < 40 and first.answer != second.answer, "rows repeat a short name, not the tests"
    asked = second.prompt[-1]["content"]
    assert asked.startswith("Add.\n\nBegin with this code:\n```python\nclass Solution:\n```\n\nPlease reason")
    with pytest.raises(RecipeError, match="say `grader: code`"):
        Task("t", "d.jsonl", tests=["a"])
