"""Rows of a file or of a dataset on the hub, each with the words that say where it stands."""

import gzip
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, load_dataset

from .errors import DataError


def read_rows(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yield `("file:line", row)` of a JSONL(.gz), JSON or Parquet file.

    Raises:
        DataError: the file is missing, of an unknown kind, or a line is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file. Check `data` in the recipe (paths are relative to {Path.cwd()}).")
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{where}: not valid JSON ({error.msg} at column {error.colno}). Mend or delete this line."
                    ) from None
                if not isinstance(row, dict):
                    raise DataError(f"{where}: a row must be a JSON object, this is a {type(row).__name__}.")
                yield where, row
    elif name.endswith(".json"):
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: not valid JSON ({error.msg}).") from None
        if not isinstance(rows, list):
            raise DataError(f"{path}: expected a JSON list of rows, this is a {type(rows).__name__}.")
        yield from ((f"{path}: row {i}", row) for i, row in enumerate(rows))
    elif name.endswith(".parquet"):
        with tempfile.TemporaryDirectory() as cache:
            table = Dataset.from_parquet(str(path), cache_dir=cache)
            yield from ((f"{path}: row {i}", dict(row)) for i, row in enumerate(table))
    else:
        raise DataError(f"{path}: cannot tell its kind; use .jsonl, .jsonl.gz, .json or .parquet.")


def is_file(source: str) -> bool:
    """Whether a source of rows is a file (which may be missing), not a dataset on the hub."""
    return Path(source).suffix in (".jsonl", ".gz", ".json", ".parquet") or Path(source).exists()


def source_rows(data: str | list[str], split: str, subset: str | None) -> Iterator[tuple[str, dict]]:
    """Yield `("where", row)` of files, and of datasets on the hub, which may name a subset and split of their own.

    Raises:
        DataError: a file cannot be read, or the hub has no such dataset.
    """
    for source in [data] if isinstance(data, str) else data:
        if is_file(source):
            yield from read_rows(source)
            continue
        name, *named = source.split(":")  # owner/name[:subset[:split]]
        try:
            table = load_dataset(name, named[0] if named else subset, split=named[1] if named[1:] else split)
        except Exception as error:
            raise DataError(
                f"{source}: neither a file here nor a dataset that the hub could give ({type(error).__name__}: "
                f"{str(error)[:200]}). Check the path, the hub id, `subset` and `split`."
            ) from error
        yield from ((f"{source}[{table.split}] row {i}", dict(row)) for i, row in enumerate(table))
