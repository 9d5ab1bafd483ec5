r"""Does this program pass its tests? Programs run in the sandbox and are judged outside of it.

    with CodeGrader(SandboxConfig(), workers=2) as grader:
        grader.grade("```python\nprint(int(input()) * 2)\n```", '[{"input": "4", "output": "8"}]').correct   # True

Each test runs in a new session that holds the program and the input, never the expected output: whatever the program
reads, patches or prints, it has to know the answer. Outputs are compared as LiveCodeBench does (arXiv 2403.07974,
`testing_util.py`): line by line, without the white space at the ends of a line, numbers by value (1.0 is 1); values of
functions by Python's `==` after JSON, so that a tuple is a list. The names that its runner imports are there too.
What differs: a program is run as one (`__main__`, descriptor 0, threads, `atexit`), not as the body of a function.
"""

import base64
import json
import zlib
from contextlib import closing
from dataclasses import replace
from decimal import Decimal, InvalidOperation

from .answer_extraction import after_think
from .code_tests import Case, read_tests
from .errors import DataError, SandboxError
from .grading import Grade
from .sandbox import MOST_CODE_BYTES, CellResult, Sandbox, SandboxConfig, open_sandbox

PYTHON = ("", "python", "python3", "py")
MOST_OUTPUT = 4_000_000  # characters that a test may print
_PIECE = MOST_CODE_BYTES - 1_000
_MARK = "afterglow returned: "

# The last cell of a session; `packed` was built by the ones before it, since inputs may be longer than a cell.
_BEGIN = """
import atexit, base64, io, json, os, sys, tempfile, threading, types, zlib
def given():
    return json.loads(zlib.decompress(base64.b64decode(packed)))
def module(name, code):
    made = sys.modules[name] = types.ModuleType(name)
    exec(PRELUDE, made.__dict__)
    exec(compile(code, "solution.py", "exec"), made.__dict__)
    return made.__dict__
def end():
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
names = ("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics",
         "itertools", "functools", "operator", "io", "sys", "json")
PRELUDE = "\\n".join([f"from {name} import *" for name in (*names, "builtins", "typing")]
                    + [f"import {name}" for name in names] + ["sys.setrecursionlimit(50000)"])
sys.stderr = sys.__stderr__ = io.StringIO()
"""
# A real file where the walls allow one: programs read input(), sys.stdin.buffer, open(0) or os.read(0, ...).
_READ_AND_PRINT = """
program, text = given()
sys.__stdout__ = sys.stdout
try:
    file = tempfile.TemporaryFile()
    file.write(text.encode()); file.seek(0)
    os.dup2(file.fileno(), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
except OSError:
    sys.stdin = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")
try:
    module("__main__", program)
except SystemExit as ended:
    if ended.code not in (None, 0):
        raise RuntimeError("exit code " + str(ended.code)) from None
end()
if not sys.stdout.closed:
    sys.stdout.flush()
"""
_CALL = """
program, name, arguments, mark = given()
space = module("solution", program)
owner = space["Solution"]() if "Solution" in space else None
function = getattr(owner, name) if hasattr(owner, name) else space[name]
value = json.dumps(function(*arguments), default=lambda other: other.tolist())  # numpy's numbers and arrays
print("\\n" + mark + value, flush=True)
"""


class CodeGrader:
    """Grades programs; use it in a `with` statement, which starts its sandbox.

    Args:
        sandbox: where programs run; its time limit is that of one test.
        workers: programs that the evaluation runs at once.

    Raises:
        SandboxError: (on entering) the machine allows no isolation.
    """

    kind = "code"

    def __init__(self, sandbox: SandboxConfig, workers: int = 2):
        self.workers = workers
        self._config = replace(sandbox, sandbox_output_chars=MOST_OUTPUT)
        self._sandbox: Sandbox | None = None

    def __enter__(self) -> "CodeGrader":
        self._sandbox = open_sandbox(self._config)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the sandbox."""
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None

    def grade(self, response: str | None, gold: str | None) -> Grade:
        """Run the last Python block of a response against its tests, up to the first that fails; from any thread.

        Raises:
            DataError: the tests cannot be read (`check_gold` says so beforehand).
            SandboxError: the sandbox failed, which says nothing about the program.
        """
        if not response or not response.strip():
            return Grade("not_gradable", "empty response")
        text = after_think(response)
        if text is None:
            return Grade("not_gradable", "truncated think block")
        program = last_program(text)
        if program is None:
            return Grade("not_gradable", "no code block")
        function, cases = read_tests(gold)
        for case in cases:
            result = self._run(program, function, case)
            if result.status != "ok":
                return Grade("wrong", {"error": "raised"}.get(result.status, result.status))
            if function is None and not same_output(result.output, case.output):
                return Grade("wrong", "wrong output")
            if function is not None and not same_value(result.output, case.output):
                return Grade("wrong", "wrong value")
        return Grade("correct", "all tests pass")

    def check_gold(self, gold: str | None) -> str | None:
        """Why tests cannot be run, or None if they can."""
        try:
            read_tests(gold)
        except DataError as error:
            return str(error)
        return None

    def _run(self, program: str, function: str | None, case: Case) -> CellResult:
        if self._sandbox is None:
            raise RuntimeError("a CodeGrader runs inside its `with` statement")
        given = [program, case.input] if function is None else [program, function, case.input, _MARK]
        packed = base64.b64encode(zlib.compress(json.dumps(given).encode(), 1)).decode()
        with closing(self._sandbox.session()) as session:
            for start in range(0, len(packed), _PIECE):
                before = "packed + " if start else ""
                handed = session.run(f"packed = {before}'{packed[start : start + _PIECE]}'")
                if handed.status != "ok":
                    raise SandboxError(f"the input of a test could not be handed over: {handed.output.strip()}")
            return session.run(_BEGIN + (_READ_AND_PRINT if function is None else _CALL))


def last_program(text: str) -> str | None:
    """Return the last complete fenced block of Python, or of no named language; None: there is none."""
    program, language, block = None, None, list[str]()
    for line in text.replace("\r\n", "\n").split("\n"):
        if language is None:
            if line.startswith("```"):
                language, block = line.strip("` \t").lower(), []
        elif line.rstrip() == "```":
            program = "\n".join(block) + "\n" if language in PYTHON else program
            language = None
        else:
            block.append(line)
    return program


def same_output(printed: str, expected: str) -> bool:
    """Whether two outputs agree line by line, but for white space around lines and how numbers are written."""
    found, wanted = (text.strip().split("\n") for text in (printed, expected))
    return len(found) == len(wanted) and all(map(_same_line, found, wanted))


def _same_line(one: str, other: str) -> bool:
    if one.strip() == other.strip():
        return True
    try:
        numbers = [[Decimal(word) for word in line.split()] for line in (one, other)]
        return numbers[0] == numbers[1]
    except InvalidOperation:
        return False


def same_value(output: str, expected: object) -> bool:
    """Whether the value that the call printed last is the expected one; the program may have written anything there."""
    try:
        return json.loads(output.rpartition(_MARK)[2]) == expected
    except (ValueError, RecursionError):
        return False
