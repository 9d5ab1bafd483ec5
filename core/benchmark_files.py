"""The benchmarks that come with the package: task files, scored by `eval`, kept out of training sets."""

from importlib.resources import files
from pathlib import Path

FOLDER = Path(str(files("afterglow.core"))) / "benchmarks"


def benchmark_names() -> list[str]:
    """Return the names of the benchmarks that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def task_file(name: str) -> Path | None:
    """Return the task file that a name means: of a benchmark of the package, or a path to a YAML, which may be missing.

    None is returned for anything else: a file of problems, a dataset on the hub, a name that is misspelt.
    """
    packaged = FOLDER / f"{name}.yaml"
    if packaged.is_file():
        return packaged
    return Path(name) if Path(name).suffix in (".yaml", ".yml") else None
