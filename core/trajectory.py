"""The record that everything reads and writes: one trajectory is one sampled solution of one problem.

A table of trajectories is a `datasets.Dataset` (memory-mapped, so its size does not matter); on disk it is JSONL
(optionally gzipped) or Parquet. Foreign files are read through a `columns` mapping, never by editing code.
"""

import functools
import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Json, List, Value
from datasets.exceptions import DatasetGenerationError

from .errors import DataError
from .row_sources import source_rows

ROLES = ("system", "user", "assistant", "tool")
FINISH_REASONS = ("stop", "length", "tool_limit", "error")

# The columns that every table has, in this order; filters and evaluators add one column per score.
FEATURES = {
    "id": Value("string"),
    "problem_id": Value("string"),
    "prompt": List(Json()),  # Json: tool arguments differ from call to call, a fixed struct would fill them with nulls
    "completion": List(Json()),
    "answer": Value("string"),
    "source": Value("string"),
    "sample_index": Value("int64"),
    "correct": Value("bool"),
    "finish_reason": Value("string"),
}
MAX_ERRORS_SHOWN = 20
WRITE_ROWS = 1_000


@dataclass
class DataConfig:
    """Where trajectories (or problems) come from and how their columns are called there."""

    data: str | list[str] = field(
        metadata={
            "help": "JSONL(.gz), JSON or Parquet file(s), or a dataset on the hub (`owner/name[:subset[:split]]`), of "
            "trajectories."
        }
    )
    columns: dict[str, str] = field(
        default_factory=dict,
        metadata={"help": "Our column name -> the file's column name, where they differ."},
    )
    split: str = field(default="train", metadata={"help": "Split, for a dataset on the hub."})
    subset: str | None = field(default=None, metadata={"help": "Configuration name, for a dataset on the hub."})
    problems: str | None = field(
        default=None,
        metadata={"help": "File of problems joined on `problem_id`, where the trajectories do not carry the prompt."},
    )
    problem_columns: dict[str, str] = field(
        default_factory=dict, metadata={"help": "Like `columns`, for the file of problems."}
    )
    answer_after: str | None = field(
        default=None,
        metadata={"help": "The gold answer is what follows the last of these marks in its column (GSM8K: '####')."},
    )
    prompt_template: str = field(
        default="{problem}",
        metadata={"help": "Wraps a prompt that is a plain string; must contain {problem}."},
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "Put before a prompt that has no system message."}
    )
    max_rows: int | None = field(default=None, metadata={"help": "Read only the first rows: for smoke runs."})
    drop_invalid: bool = field(
        default=False,
        metadata={"help": "Leave invalid rows out (they are listed) instead of refusing the file."},
    )

    def __post_init__(self):
        if "{problem}" not in self.prompt_template:
            raise DataError(f"prompt_template must contain {{problem}}, got {self.prompt_template!r}")


def content_hash(*parts: Any) -> str:
    """Return a stable 16-digit hexadecimal hash of JSON-able values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def trajectory_id(row: dict) -> str:
    """Return the content hash that identifies a trajectory: problem, messages, source and sample index."""
    keys = ("problem_id", "prompt", "completion", "source", "sample_index")
    return content_hash(*(row.get(key) for key in keys))


def completion_text(completion: list[dict]) -> str:
    """Return what the assistant wrote in all its turns, tool results left out."""
    return "\n".join(m.get("content") or "" for m in completion if m["role"] == "assistant")


def final_text(completion: list[dict]) -> str:
    """Return the last assistant turn: where the final answer stands."""
    return next((m.get("content") or "" for m in reversed(completion) if m["role"] == "assistant"), "")


def prompt_text(prompt: list[dict]) -> str:
    """Return the last user turn: the problem."""
    return next((m.get("content") or "" for m in reversed(prompt) if m["role"] == "user"), "")


# ---------------------------------------------------------------------------------------------------------------------
# reading


def _rename(row: dict, columns: dict[str, str], where: str) -> dict:
    """Give the file's columns our names; a column that the mapping names must exist."""
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing:
        raise DataError(f"{where}: no column {missing[0]!r} (named by `columns`); the row has {sorted(row)}.")
    taken = set(columns.values())
    renamed = {key: value for key, value in row.items() if key not in taken}
    return renamed | {ours: row[theirs] for ours, theirs in columns.items()}


def _messages(value: Any, role: str) -> list[dict]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _message_fault(messages: Any, name: str) -> str | None:
    """Say what is wrong with a list of chat messages, or None."""
    if not isinstance(messages, list) or not messages:
        return f"`{name}` must be a non-empty list of chat messages or a string, got {type(messages).__name__}"
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            return f"`{name}[{i}]` needs a `role` out of {', '.join(ROLES)}"
        content = message.get("content")
        if not isinstance(content, str | None) or (content is None and not message.get("tool_calls")):
            return f"`{name}[{i}].content` must be text"
        if half := _half_character(content or ""):
            return f"`{name}[{i}].content` has half a character at {half} (an escape like \\ud83d alone); mend the text"
    return None


def _half_character(text: str) -> str:
    """Say where a text holds a lone surrogate, which no table can store; empty where it holds none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"position {error.start}"
    return ""


def normalise_row(row: dict, config: DataConfig) -> dict:
    """Bring one row (already under our column names) into the record's form. Purely structural; see `fault`."""
    row = dict(row)
    if "messages" in row and "completion" not in row:
        messages = row.pop("messages") or []
        first = next((i for i, m in enumerate(messages) if m.get("role") == "assistant"), len(messages))
        row["prompt"], row["completion"] = messages[:first], messages[first:]
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": config.prompt_template.replace("{problem}", prompt)}]
    if config.system_prompt and isinstance(prompt, list) and not any(m.get("role") == "system" for m in prompt):
        prompt = [{"role": "system", "content": config.system_prompt}, *prompt]
    row["prompt"] = prompt
    row["completion"] = _messages(row.get("completion"), "assistant")
    for name in ("prompt", "completion"):
        if isinstance(row[name], list):  # keys that a struct column filled with nulls are not part of the message
            row[name] = [
                {k: v for k, v in m.items() if v is not None or k == "content"} if isinstance(m, dict) else m
                for m in row[name]
            ]
    answer = row.get("answer")
    if isinstance(answer, list):  # several answers, all needed (OlympiadBench)
        answer = ", ".join(map(str, answer))
    answer = answer if answer is None or isinstance(answer, str) else str(answer)
    row["answer"] = answer.rpartition(config.answer_after)[2].strip() if answer and config.answer_after else answer
    problem_id = row.get("problem_id")
    row["problem_id"] = str(problem_id) if problem_id is not None else content_hash(row["prompt"])
    for name in ("source", "sample_index", "correct", "finish_reason"):
        row.setdefault(name, None)
    return row


def row_fault(row: dict, require: tuple[str, ...]) -> str | None:
    """Say what makes a normalised row unusable and how to mend it, or None when it is sound."""
    for name in require:
        if row.get(name) is None:
            return f"no `{name}`; map it with `columns: {{{name}: <your column>}}` or add it"
    if fault := _message_fault(row["prompt"], "prompt"):
        return fault
    if "completion" in require:
        if fault := _message_fault(row["completion"], "completion"):
            return fault
        said = [m for m in row["completion"] if m["role"] == "assistant"]
        if not any((m.get("content") or "").strip() or m.get("tool_calls") for m in said):
            return "empty completion; delete the row or set `drop_invalid: true`"
    if row["finish_reason"] not in (None, *FINISH_REASONS):
        return f"finish_reason {row['finish_reason']!r} is none of {', '.join(FINISH_REASONS)}"
    if not isinstance(row["correct"], bool | None):
        return f"correct must be true, false or null, got {row['correct']!r}"
    if not isinstance(row["sample_index"], int | None) or isinstance(row["sample_index"], bool):
        return f"sample_index must be a whole number, got {row['sample_index']!r}"
    return None


class _Reader:
    """Walks the source rows of one configuration, normalised, joined, with ids, and collects what is wrong."""

    def __init__(self, config: DataConfig, require: tuple[str, ...]):
        self.config, self.require = config, require
        self.faults: list[str] = []
        # Ids are compared by 8-byte digests; a dict of a million ids and places would hold 250 MB.
        self._digests = array("Q")
        self._repeated: set[int] = set()
        self.joined = self._load_problems() if config.problems else None

    def _load_problems(self) -> dict[str, dict]:
        joined: dict[str, dict] = {}
        for where, row in source_rows(self.config.problems or "", self.config.split, self.config.subset):
            row = _rename(row, self.config.problem_columns, where)
            if row.get("problem_id") is None:
                raise DataError(f"{where}: no `problem_id`; map it with `problem_columns: {{problem_id: ...}}`.")
            joined[str(row["problem_id"])] = {
                "prompt": row.get("prompt", row.get("problem")),
                "answer": row.get("answer"),
            }
        return joined

    def __iter__(self) -> Iterator[dict]:
        config, seen, samples = self.config, {}, {}
        self.faults, self._digests = [], array("Q")
        for count, (where, row) in enumerate(source_rows(config.data, config.split, config.subset)):
            if config.max_rows is not None and count >= config.max_rows:
                return
            row = _rename(row, config.columns, where)
            if self.joined is not None:
                problem = self.joined.get(str(row.get("problem_id")))
                if problem is None:
                    self.faults.append(f"{where}: problem_id {row.get('problem_id')!r} is not in {config.problems}.")
                    continue
                row = {**{k: v for k, v in problem.items() if v is not None}, **row}
            row = normalise_row(row, config)
            if fault := row_fault(row, self.require):
                self.faults.append(f"{where}: {fault}.")
                continue
            if row["sample_index"] is None:
                of_source = samples.setdefault(row["source"], {})
                row["sample_index"] = of_source[row["problem_id"]] = of_source.get(row["problem_id"], -1) + 1
            own_id = row.get("id") is not None
            row["id"] = str(row["id"]) if own_id else trajectory_id(row)
            digest = _digest(row["id"])
            self._digests.append(digest)
            if row["id"] in seen:
                self.faults.append(
                    f"{where}: id {row['id']!r} stands at {seen[row['id']]} already; ids must be unique "
                    "(leave the column out to have them made from the content)."
                    if own_id
                    else f"{where}: the same trajectory stands at {seen[row['id']]} already. Delete one, or say what "
                    "tells them apart: `columns: {source: <your column>}`, or `sample_index`."
                )
                continue
            if digest in self._repeated:
                seen[row["id"]] = where
            yield row

    def ids_repeat(self) -> bool:
        """Whether the walk that ended met an id twice; the next walks then find the places and leave the copies out."""
        digests, counts = np.unique(np.frombuffer(self._digests, dtype=np.uint64), return_counts=True)
        self._repeated = set(digests[counts > 1].tolist())
        return bool(self._repeated)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def _look_through(reader: _Reader) -> tuple[int, dict[str, set[str]]]:
    """Return the number of sound rows, and the kinds of values in each column beyond the record's own."""
    kinds: dict[str, set[str]] = {}
    count = 0
    for row in reader:
        count += 1
        for name, value in row.items():
            if name not in FEATURES:
                seen = kinds.setdefault(name, set())
                if value is not None:
                    seen.add(_kind(value))
    return count, kinds


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64"
    if isinstance(value, float):
        return "float64"
    return "string" if isinstance(value, str) else "json"


def _extra_features(kinds: dict[str, set[str]]) -> dict[str, Any]:
    """One type per column beyond the record's own; columns of mixed types are kept as JSON."""
    features: dict[str, Any] = {}
    for name, seen in kinds.items():
        if seen == {"int64", "float64"}:
            seen = {"float64"}
        features[name] = Value(next(iter(seen))) if len(seen) == 1 and "json" not in seen else Json()
        if not seen:
            features[name] = Value("string")
    return features


def load_trajectories(
    config: DataConfig,
    require: tuple[str, ...] = ("prompt", "completion"),
    on_invalid: Callable[[str], None] = lambda message: None,
) -> Dataset:
    """Read, check and normalise a table of trajectories.

    Every row is checked before anything is returned, so a bad row stops a run before a model is loaded. All faults
    come in one message.

    Args:
        config: where the rows come from.
        require: columns that may not be missing or null.
        on_invalid: called with one line per row left out, when `config.drop_invalid` is set.

    Raises:
        DataError: file, row and mend of up to 20 faults.
    """
    reader = _Reader(config, require)
    count, kinds = _look_through(reader)
    if reader.ids_repeat():
        count, kinds = _look_through(reader)
    if reader.faults and not (config.drop_invalid and count):
        shown = "\n  ".join(reader.faults[:MAX_ERRORS_SHOWN])
        more = len(reader.faults) - MAX_ERRORS_SHOWN
        raise DataError(
            f"{len(reader.faults)} invalid row(s){'' if count else ' and no sound one'}:\n  {shown}"
            + (f"\n  ... and {more} more" if more > 0 else "")
        )
    if not count:
        raise DataError(f"{config.data}: no usable row. Check the file and `max_rows`.")
    for fault in reader.faults:
        on_invalid(fault)
    return table_of(reader, Features(FEATURES | _extra_features(kinds)))


def table_of(rows: Any, features: Features) -> Dataset:
    """Write rows (any re-iterable of dicts) to a memory-mapped table that lives as long as this process."""
    columns = list(features)

    def generate() -> Iterator[dict]:
        for row in rows:
            yield {name: row.get(name) for name in columns}

    folder = tempfile.mkdtemp(dir=_scratch().name)
    try:
        return Dataset.from_generator(generate, features=features, cache_dir=folder, fingerprint=content_hash(folder))
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    """Folder for memory-mapped tables; it goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="afterglow-")


# ---------------------------------------------------------------------------------------------------------------------
# writing


def write_trajectories(table: Dataset, path: str | Path) -> Path:
    """Write a table as JSONL or Parquet (by its suffix), whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    if path.suffix == ".parquet":
        table.to_parquet(str(partial))
    else:
        with open(partial, "w", encoding="utf-8") as out:
            # Row by row would look up each row of a selection by itself.
            for start in range(0, len(table), WRITE_ROWS):
                batch: dict[str, list] = table[start : start + WRITE_ROWS]
                for row in zip(*batch.values(), strict=True):
                    out.write(json.dumps(dict(zip(batch, row, strict=True)), ensure_ascii=False) + "\n")
    os.replace(partial, path)
    return path
