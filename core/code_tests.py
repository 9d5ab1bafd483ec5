r"""The gold answer of a program: the tests that it must pass, as text, in the layout of LiveCodeBench or a plainer one.

    [{"input": "4\n", "output": "8\n"}, ...]                              what is read and what is printed
    {"function": "add", "tests": [{"input": [1, 2], "output": 3}, ...]}     arguments, and the value returned

An entry of `tests` may also be a whole column of LiveCodeBench (arXiv 2403.07974): its tests as JSON, or the same
pickled, compressed and in base64, as its private tests come. They stay packed in memory until they are needed: a
problem may have hundreds of megabytes. Nothing but text is unpickled.
"""

import base64
import binascii
import io
import json
import pickle
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from .errors import DataError


class Case(NamedTuple):
    """One test: what the program reads and prints, or the arguments and the value of its function."""

    input: Any
    output: Any


class CodeTests(NamedTuple):
    """All tests of a problem, and the function that they call; None: the program reads and prints."""

    function: str | None
    cases: list[Case]


def gold_of_row(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """Return the gold answer of a row of LiveCodeBench and its like, still packed.

    Args:
        row: `metadata` holds the name of the function (`func_name`), where tests are `functional`.
        columns: columns of tests: a list, or text (see the module's docstring).

    Raises:
        DataError: a column is missing or empty, or `metadata` is not JSON.
    """
    if missing := [name for name in columns if not row.get(name)]:
        raise DataError(f"column {missing[0]!r} of `tests` is missing or empty")
    metadata = row.get("metadata") or {}
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError as error:
            raise DataError(f"column 'metadata' is not JSON: {error}") from None
    return json.dumps({"function": metadata.get("func_name"), "tests": [row[name] for name in columns]})


def read_tests(gold: str | None) -> CodeTests:
    """Unpack a gold answer.

    Raises:
        DataError: it cannot be read, or a test is not what its kind needs; says which.
    """
    try:
        found = json.loads(gold or "")
    except (ValueError, RecursionError) as error:
        raise DataError(f"tests are not JSON: {error}") from None
    function, entries = (found.get("function"), found.get("tests")) if isinstance(found, dict) else (None, found)
    if not isinstance(entries, list):
        raise DataError("tests must be a list, or an object with `function` and a list of `tests`")
    tests: list[Any] = []
    for entry in entries:
        tests += entry if isinstance(entry, list) else _column(entry) if isinstance(entry, str) else [entry]
    if not tests:
        raise DataError("there is no test")
    kinds = {test.get("testtype") for test in tests if isinstance(test, dict)}
    if {"stdin", "functional"} <= kinds:
        raise DataError("some tests call a function and others do not")
    if "functional" in kinds and not function:
        raise DataError("tests call a function, but `metadata` has no `func_name`")
    if "stdin" in kinds:
        function = None
    return CodeTests(function, [_case(number, test, function) for number, test in enumerate(tests, 1)])


def _case(number: int, test: Any, function: str | None) -> Case:
    if not isinstance(test, dict) or not {"input", "output"} <= test.keys():
        raise DataError(f"test {number} needs `input` and `output`")
    given, wanted = test["input"], test["output"]
    if function is None:
        if not (isinstance(given, str) and isinstance(wanted, str)):
            raise DataError(f"test {number}: `input` and `output` must be texts, as no `function` is called")
        return Case(given, wanted)
    if test.get("testtype") == "functional":
        try:  # one argument a line
            given, wanted = [json.loads(line) for line in given.split("\n") if line.strip()], json.loads(wanted)
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise DataError(f"test {number}: arguments and value must be JSON, one argument a line: {error}") from None
    if not isinstance(given, list):
        raise DataError(f"test {number}: `input` must be the list of arguments of {function}")
    return Case(given, wanted)


class _TextOnly(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise pickle.UnpicklingError(f"it would run {module_name}.{global_name}")


def _column(text: str) -> list[Any]:
    try:
        if not text.lstrip().startswith("["):
            text = _TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(text, validate=True)))).load()
        found = json.loads(text)
    except (ValueError, TypeError, EOFError, binascii.Error, zlib.error, pickle.UnpicklingError) as error:
        raise DataError(f"a column of tests cannot be read: {error}") from None
    if not isinstance(found, list):
        raise DataError("a column of tests does not hold a list")
    return found
