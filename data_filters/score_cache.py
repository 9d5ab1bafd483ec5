"""Scores that several runs and processes share: a trajectory is scored once under a student, ever.

    <folder>/<student>/0.jsonl, 1.jsonl, ...    one line per scored trajectory; each writer has a file of its own

The student's name is a hash of everything that a score depends on (`student.Student.key`), a line's key one of the
trajectory's content (`row_key`). A killed writer loses at most the line it was writing.
"""

import fcntl
import json
import os
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.errors import DataError
from ..core.run_folder import JsonlLog
from ..core.trajectory import content_hash


def default_folder() -> Path:
    """Return where scores lie unless a recipe says: `scores` in AFTERGLOW_CACHE, else in ~/.cache/afterglow."""
    return Path(os.environ.get("AFTERGLOW_CACHE") or Path.home() / ".cache" / "afterglow") / "scores"


def row_key(row: dict[str, Any]) -> str:
    """Return a hash of what a student reads of a trajectory; ids, labels and sources do not count."""
    return content_hash(row["prompt"], row["completion"], row.get("tools"))


class ScoreCache:
    """The scores of one student."""

    def __init__(self, folder: Path, student: str):
        self._folder = folder / student

    def find(self, keys: Container[str]) -> dict[str, dict]:
        """Return the lines with one of these keys, by key.

        Raises:
            DataError: a whole line is no JSON: the file was edited by hand.
        """
        found: dict[str, dict] = {}
        for file in sorted(self._folder.glob("*.jsonl")):
            with open(file, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.endswith(b"\n"):  # cut off by a kill, or being written
                        break
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise DataError(
                            f"{file}:{number}: not valid JSON ({error.msg}). Delete the file: what "
                            "stood in it is scored again."
                        ) from None
                    if row["key"] in keys:
                        found.setdefault(row["key"], row)
        return found

    @contextmanager
    def writer(self) -> Iterator[JsonlLog]:
        """Open the first file that no other process writes to, to append to it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        number = 0
        while True:
            with open(self._folder / f".{number}.lock", "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    number += 1
                    continue
                log = JsonlLog(self._folder / f"{number}.jsonl")
                try:
                    yield log
                finally:
                    log.close()
                return
