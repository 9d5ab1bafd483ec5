"""The folder of one stage: resolved config, manifest, metrics and rows, safe against a kill at any moment.

config.yaml     the recipe as resolved, the identity of the run: another config is refused
manifest.json   code, versions, seeds, data, machine, command, parents, when it started and finished
metrics.jsonl   numbers over time
*.jsonl         rows, appended as they are made, each with its key
report.html     what a person reads
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from .errors import DataError, RunFolderError
from .fingerprint import fingerprint
from .provenance import describe_code, describe_machine, describe_versions
from .recipe import plain

# Keys that say how to run, not what to compute: they may differ when a run is resumed. What the global batch is made of
# has rules of its own (launch/spread.py).
RUNTIME_KEYS = frozenset(
    {"overwrite", "logging_steps", "disable_tqdm", "report_to", "dataloader_num_workers", "server_url", "workers",
     "gpu_memory_utilization", "max_num_seqs", "output_dir", "per_device_train_batch_size",
     "gradient_accumulation_steps", "num_processes", "score_cache"}
)  # fmt: skip


class JsonlLog:
    """Append-only JSONL file. A line cut off by a kill is dropped at the next opening, whole lines survive."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab+")  # noqa: SIM115  open for the life of the log
        self._drop_partial_line()

    def _drop_partial_line(self) -> None:
        size = self._file.seek(0, os.SEEK_END)
        end = size
        while end > 0:
            start = max(0, end - 65536)
            self._file.seek(start)
            newline = self._file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end != size:
            self._file.truncate(end)

    def append(self, row: dict) -> None:
        """Write one row; it is on its way to the disk when this returns."""
        self._file.write(json.dumps(row, ensure_ascii=False, default=plain).encode() + b"\n")
        self._file.flush()

    def rows(self) -> Iterator[dict]:
        """Yield the rows written so far.

        Raises:
            DataError: a whole line is not JSON: the file was edited by hand.
        """
        self._file.flush()
        with open(self.path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{self.path}:{number}: not valid JSON ({error.msg}). Mend the line, or delete the file to "
                        "make its rows again."
                    ) from None

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def write_atomic(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


class RunFolder:
    """One stage's output folder, opened to write. Use `RunFolder.open`."""

    def __init__(self, path: Path, manifest: dict, lock: Any):
        self.path, self.manifest, self._lock = path, manifest, lock
        self.resumed = bool(manifest["resumed"])

    @classmethod
    def open(
        cls,
        path: str | Path,
        stage: str,
        config: dict[str, Any],
        *,
        inputs: dict[str, str | list[str]] | None = None,
        overwrite: bool = False,
        extra: dict[str, Any] | None = None,
        defaults: dict[str, Any] | None = None,
    ) -> "RunFolder":
        """Start a run folder, or resume the one that is there.

        Args:
            path: the folder.
            stage: verb of the command line (`filter`, `train`, ...).
            config: resolved recipe; its plain form is the identity of the run.
            inputs: name -> file(s) this stage reads; a changed input is a different run.
            overwrite: delete what is there and start again.
            extra: further facts for the manifest, such as seeds and the chat-template hash.
            defaults: of the config's keys; a key younger than the run is no other config while it has its default.

        Raises:
            RunFolderError: the folder belongs to another config, other input data, or a run that is still alive.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
        try:
            if overwrite and (path / "manifest.json").exists():  # a folder that is no run is nobody's to delete
                _empty(path)
            old, data = _check(path, stage, config, inputs or {}, defaults or {})
            now = datetime.now(UTC).isoformat(timespec="seconds")
            if old is None:
                manifest = _new_manifest(stage, data, inputs or {}, extra or {}, now)
            else:
                manifest = old | {"resumed": [*old["resumed"], now]}
            # The config goes last: its presence says that the manifest is there too.
            write_atomic(path / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
            write_atomic(path / "config.yaml", yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
        except BaseException:
            lock.close()
            raise
        return cls(path, manifest, lock)

    @classmethod
    def check(
        cls,
        path: str | Path,
        stage: str,
        config: dict[str, Any],
        *,
        inputs: dict[str, str | list[str]] | None = None,
        defaults: dict[str, Any] | None = None,
    ) -> None:
        """Raise what `open` without `overwrite` would raise, and write nothing."""
        _check(Path(path), stage, config, inputs or {}, defaults or {})

    @property
    def finished(self) -> bool:
        """Whether an earlier run of this folder ended well."""
        return self.manifest["finished"] is not None

    @property
    def summary(self) -> dict:
        """What `finish` stored."""
        return self.manifest.get("summary") or {}

    def log(self, name: str) -> JsonlLog:
        """Open an append-only file of this folder, e.g. `samples.jsonl`."""
        return JsonlLog(self.path / name)

    def record(self, **facts: Any) -> None:
        """Add facts to the manifest."""
        self.manifest |= plain(facts)
        write_atomic(self.path / "manifest.json", json.dumps(self.manifest, indent=2, ensure_ascii=False) + "\n")

    def finish(self, summary: dict) -> None:
        """Mark the stage as done; from now on the same command only reports."""
        self.record(finished=datetime.now(UTC).isoformat(timespec="seconds"), summary=summary)

    def close(self) -> None:
        """Release the lock (a killed process releases it too)."""
        self._lock.close()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def is_current(path: str | Path) -> bool:
    """Whether a run folder holds a finished run whose inputs are still what they were."""
    manifest = _read_manifest(Path(path))
    if manifest is None or manifest["finished"] is None:
        return False
    return all(fingerprint(source) == manifest["data"][name] for name, source in manifest["inputs"].items())


def _lock(path: Path):
    lock = open(path / ".lock", "w")  # noqa: SIM115  held while the run lives
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise RunFolderError(f"{path}: another process is running in this folder. Wait for it or stop it.") from None
    return lock


def _check(
    path: Path, stage: str, config: dict[str, Any], inputs: dict, defaults: dict[str, Any]
) -> tuple[dict | None, dict]:
    """Return the manifest of the run to resume (None where there is none) and the fingerprints of the inputs."""
    data = {name: fingerprint(source) for name, source in inputs.items()}
    old = _read_manifest(path)
    if old is not None:
        _refuse_other_run(path, stage, _identity(plain(config)), plain(defaults), data, old)
        return old, data
    # A manifest without a config is a run that was killed between the two: nothing was computed yet.
    entries = path.iterdir() if path.is_dir() else ()
    if leftovers := [p.name for p in entries if not p.name.startswith(".") and p.name != "manifest.json"]:
        raise RunFolderError(
            f"{path}: not empty and not a run folder (holds {leftovers[0]!r}). Choose another `output_dir` or "
            "empty this one yourself."
        )
    return None, data


def _empty(path: Path) -> None:
    for entry in path.iterdir():
        if entry.name == ".lock":
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _read_manifest(path: Path) -> dict | None:
    file = path / "manifest.json"
    if not file.exists() or not (path / "config.yaml").exists():
        return None
    return json.loads(file.read_text(encoding="utf-8"))


def _new_manifest(stage: str, data: dict, inputs: dict, extra: dict, now: str) -> dict:
    return {
        "stage": stage,
        "started": now,
        "finished": None,
        "resumed": [],
        "command": _command(),
        "code": describe_code(),
        "versions": describe_versions(),
        "machine": describe_machine(),
        "inputs": inputs,
        "data": data,
        "parents": _parents(inputs),
        **plain(extra),
    }


def _command() -> str:
    import shlex
    import sys

    module = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m module`
    return shlex.join([*(("python", "-m", module.name) if module else (Path(sys.argv[0]).name,)), *sys.argv[1:]])


def _parents(inputs: dict[str, str | list[str]]) -> dict[str, str]:
    """Which run folders this stage's inputs came from."""
    parents = {}
    for name, source in inputs.items():
        for file in [source] if isinstance(source, str) else source:
            folder = Path(file) if Path(file).is_dir() else Path(file).parent
            while folder != folder.parent and not (folder / "manifest.json").exists():
                folder = folder.parent
            if (folder / "manifest.json").exists():
                parents[name] = str(folder)
    return parents


def _identity(config: Any) -> Any:
    """Leave out what only says how to run, at any depth: the steps of a chain have keys of their own."""
    if isinstance(config, dict):
        return {k: _identity(v) for k, v in config.items() if k not in RUNTIME_KEYS}
    return [_identity(v) for v in config] if isinstance(config, list) else config


def _refuse_other_run(path: Path, stage: str, identity: dict, defaults: dict, data: dict, old: dict) -> None:
    stored = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")) or {}
    stored = _identity(stored)
    mend = "Choose another `output_dir`, or pass --overwrite to start again."
    if old["stage"] != stage:
        raise RunFolderError(f"{path}: holds a `{old['stage']}` run, this is `{stage}`. {mend}")
    missing = object()
    stored = {key: value for key, value in defaults.items() if key in identity} | stored
    changed = [k for k in sorted({*stored, *identity}) if stored.get(k, missing) != identity.get(k, missing)]
    if changed:
        lines = [f"`{k}` was {stored.get(k, 'not set')!r}, is {identity.get(k, 'not set')!r}" for k in changed[:8]]
        raise RunFolderError(f"{path}: holds a run of another config: {'; '.join(lines)}. {mend}")
    for name in data:
        if old["data"].get(name) != data[name]:
            raise RunFolderError(f"{path}: `{name}` has changed since this run started. {mend}")
