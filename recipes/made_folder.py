"""Folders that a module of recipes makes from settings: whole or not at all, same settings, same bytes."""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..core.errors import AfterglowError, DataError, RunFolderError

CONFIG_FILE = "world.json"


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write rows as JSON lines."""
    with open(path, "w", encoding="utf-8", newline="\n") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def real_file(data: str, name: str) -> Path:
    """Return a file of the folder of real data.

    Raises:
        DataError: it is not there.
    """
    path = Path(data) / name
    if not path.exists():
        raise DataError(f"{path}: no such file. AFTERGLOW_DATA must name the folder that holds {name}.")
    return path


def make_folder(
    output_dir: str | Path, config: Any, write: Callable[[Path, Any], None], overwrite: bool = False
) -> Path:
    """Let `write(folder, config)` fill a new folder, or leave it as it is where it was made with the same `config`.

    Args:
        output_dir: the folder; it appears when all is written.
        config: a dataclass of the settings, kept in `world.json`.
        write: fills an empty folder.
        overwrite: replace what the folder holds.

    Raises:
        RunFolderError: the folder holds something else.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not overwrite:
        made = output_dir / CONFIG_FILE
        if made.is_file() and json.loads(made.read_text(encoding="utf-8")) == asdict(config):
            return output_dir
        raise RunFolderError(
            f"{output_dir}: exists and is not the world of these settings. "
            "Pass --overwrite to make it anew, or another --output_dir."
        )
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}-", dir=output_dir.parent))
    try:
        partial.chmod(0o755)
        write(partial, config)
        (partial / CONFIG_FILE).write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
        if output_dir.exists():
            shutil.rmtree(output_dir)
        os.replace(partial, output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output_dir


def run_command(
    module: str, about: str | None, config: type, make: Callable[..., Path], arguments: list[str] | None = None
) -> int:
    """Run `python -m MODULE --output_dir FOLDER [--overwrite] [--SETTING VALUE ...]`.

    Args:
        module: its full name.
        about: its docstring.
        config: the dataclass of its settings, each with a default and a `help`.
        make: called with the folder, the settings and `overwrite`.
        arguments: words of the command line; the process's own where they are None.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    parser.add_argument("--output_dir", required=True, help="Folder to make.")
    parser.add_argument("--overwrite", action="store_true", help="Replace what the folder holds.")
    for item in fields(config):
        parser.add_argument(f"--{item.name}", type=type(item.default), default=item.default, help=item.metadata["help"])
    values = vars(parser.parse_args(arguments))
    output_dir, overwrite = values.pop("output_dir"), values.pop("overwrite")
    try:
        folder = make(output_dir, config(**values), overwrite)
    except AfterglowError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0
