import json
import warnings

import pytest

from afterglow.core.code_grading import CodeGrader, last_program, same_output
from afterglow.core.errors import SandboxError
from afterglow.core.sandbox import SandboxConfig


@pytest.fixture(scope="module")
def grader():
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = CodeGrader(SandboxConfig(sandbox_timeout=2.0), workers=2).__enter__()
    except SandboxError as error:
        pytest.skip(f"no isolation here: {error}")
    yield found
    found.close()


def block(code):
    return f"<think>\n```python\nprint('no')\n```\n</think>Here it is.\n```python\n{code}\n```\n"


DOUBLE = json.dumps([{"input": "4\n", "output": "8\n"}, {"input": "-1", "output": "-2"}])
ADD = json.dumps({"function": "add", "tests": [{"input": [[1, 2], 3], "output": [4, 5]}]})


@pytest.mark.parametrize(
    ("code", "verdict", "reason"),
    [
        ("print(int(input()) * 2)", "correct", "all tests pass"),
        ("import sys\nfor l in sys.stdin.buffer:\n    print(int(l) * 2.0, ' ')", "correct", "all tests pass"),
        ("import sys\nprint(2 * int(open(0).read()))\nprint('debug', file=sys.stderr)\nexit()", "correct",
         "all tests pass"),
        ("def main():\n    print(2 * f())\ndef f():\n    return int(input())\nif __name__ == '__main__':\n    main()",
         "correct", "all tests pass"),
        ("print(abs(int(input()) * 2))", "wrong", "wrong output"),
        ("print(int(input()) * 2)\nraise SystemExit(1)", "wrong", "raised"),
        ("x = 1 / 0", "wrong", "raised"),
        ("print(", "wrong", "raised"),
        ("pass", "wrong", "wrong output"),
    ],
)  # fmt: skip
def test_programs(grader, code, verdict, reason):
    found = grader.grade(block(code), DOUBLE)
    assert (found.verdict, found.reason) == (verdict, reason)


@pytest.mark.parametrize(
    ("code", "verdict", "reason"),
    [
        ("def add(xs, y):\n    return [x + y for x in xs]", "correct", "all tests pass"),
        ("class Solution:\n    def add(self, xs: List[int], y: int) -> List[int]:\n        print('hm')\n"
         "        return tuple(x + y for x in xs)", "correct", "all tests pass"),
        ("def add(xs, y):\n    return xs", "wrong", "wrong value"),
        ("def plus(xs, y):\n    return xs", "wrong", "raised"),
        ("def add(xs, y):\n    return {1}", "wrong", "raised"),
    ],
)  # fmt: skip
def test_functions(grader, code, verdict, reason):
    found = grader.grade(block(code), ADD)
    assert (found.verdict, found.reason) == (verdict, reason)


def test_values_are_compared_after_json(grader):
    for code, value, right in (
        ("return 2", 2.0, True), ("return numpy.arange(2)", [0, 1], True), ("return None", None, True),
        ("return '2'", 2, False), ("return [[1], (2,)]", [[1], [2]], True), ("return float('nan')", 1, False),
    ):  # fmt: skip
        gold = json.dumps({"function": "f", "tests": [{"input": [], "output": value}]})
        assert grader.grade(block(f"import numpy\ndef f():\n    {code}"), gold).correct is right, code


def test_a_program_is_run_as_one(grader):
    """Threads, `atexit`, an output of its own, raw descriptors, classes of `__main__`: as Python itself would."""
    for code in (
        "import threading\nthreading.stack_size(2**24)\n"
        "threading.Thread(target=lambda: print(2 * int(input()))).start()",
        "import atexit\nn = int(input())\natexit.register(lambda: print(2 * n))",
        "import io, os\nsys.stdout = io.StringIO()\nn = int(os.read(0, 99))\nprint(2 * n)\n"
        "sys.__stdout__.write(sys.stdout.getvalue())",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass N:\n    n: int\n"
        "print(2 * N(int(stdin.readline())).n)",
        "def f(n):\n    return 0 if n == 0 else 1 + f(n - 1)\nprint(int(input()) * 2 + f(20_000) - 20_000)",
    ):
        found = grader.grade(block(code), DOUBLE)
        assert found.correct, (code, found)


def test_inputs_longer_than_a_cell_arrive_whole(grader):
    text = "".join(f"{i * i % 1_000_003} é\n" for i in range(60_000))
    code = "lines = sys.stdin.read().split('\\n')\nprint(len(lines), sum(int(l.split()[0]) for l in lines[:-1]))"
    wanted = f"60001 {sum(i * i % 1_000_003 for i in range(60_000))}"
    assert grader.grade(block(code), json.dumps([{"input": text, "output": wanted}])).correct


def test_hostile_programs_are_wrong_and_hurt_nothing(grader):
    """The expected output is not in the session: what a program prints, patches or leaves behind does not help it."""
    endless = grader.grade(block("while True: pass"), DOUBLE)
    assert (endless.verdict, endless.reason) == ("wrong", "timeout")
    attacks = [
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "import builtins\nbuiltins.print = lambda *a, **k: None\ndef add(xs, y):\n    return []",
        "class Same(list):\n    __eq__ = lambda self, other: True\ndef add(xs, y):\n    return Same()",
        "import json\njson.dumps = lambda value, **k: 'true'\ndef add(xs, y):\n    return []",
        "def add(xs, y):\n    print('\\nafterglow returned: ' + '[' * 100_000)\n    raise SystemExit",
        "import os\ndef add(xs, y):\n    os._exit(0)",
        "def add(xs, y):\n    return 'x' * 10**9",
        "def add(xs, y):\n    while True: print('x' * 10**6)",
    ]
    assert [grader.grade(block(code), ADD).correct for code in attacks] == [False] * len(attacks)
    left = (
        "import pathlib\np = pathlib.Path('/tmp/left')\nprint(0 if p.exists() else 2 * int(input()))\np.write_text('')"
    )
    assert grader.grade(block(left), DOUBLE).correct, "every test begins afresh"
    assert grader.grade(block("print(int(input()) * 2)"), DOUBLE).correct


def test_answers_without_a_program(grader):
    for response, reason in (
        ("", "empty response"), ("<think>```python\nprint(1)\n```", "truncated think block"),
        ("print(1)", "no code block"), ("```python\nprint(1)", "no code block"),
        ("```cpp\nint main() {}\n```", "no code block"), ("```x\n" * 200_000, "no code block"),
    ):  # fmt: skip
        found = grader.grade(response, DOUBLE)
        assert (found.correct, found.reason) == (None, reason)


def test_the_last_python_block_counts():
    assert last_program("```python\na\n```\r\nNow:\r\n```py\r\nb\r\n```\r\nOutput:\r\n```text\r\n3\r\n```") == "b\n"
    assert last_program("```text\n1\n```\nprose\n```\nx = 1\n```") == "x = 1\n"
    assert last_program("```Python\ns = '```'\n```") == "s = '```'\n"


def test_outputs_line_by_line():
    assert same_output("1 2\n3\n\n", "1 2 \n3") and same_output("0.50 1e3", "0.5 1000")
    assert not same_output("1\n2", "1 2") and not same_output("", "0") and not same_output("yes", "Yes")
    assert not same_output("1 2", "1") and not same_output("nan", "x") and same_output("", "\n")


def test_walls_without_files_of_their_own(monkeypatch):
    """Landlock lets a session write no file: what is read comes from memory."""
    from afterglow.core import code_grading
    from afterglow.core.sandbox_local import LocalSandbox

    monkeypatch.setattr(code_grading, "open_sandbox", lambda config: LocalSandbox(config, ("landlock",)))
    try:
        walled = CodeGrader(SandboxConfig()).__enter__()
    except SandboxError as error:
        pytest.skip(f"no Landlock here: {error}")
    with walled:
        assert walled.grade(block("print(int(input()) * 2)"), DOUBLE).correct
        assert walled.grade(block("import sys\nprint(int(sys.stdin.buffer.read()) * 2)"), DOUBLE).correct
        assert walled.grade(block("def add(xs, y):\n    return [x + y for x in xs]"), ADD).correct
