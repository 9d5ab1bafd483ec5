"""Imports go down only: launch -> eval, trainers, data_filters -> core, and what is on disk is what is packaged."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "core": {"core"},
    "data_filters": {"core", "data_filters"},
    "trainers": {"core", "trainers"},
    "eval": {"core", "eval"},
    "launch": {"core", "data_filters", "trainers", "eval", "launch"},
    "evidence": {"core", "eval", "launch", "evidence"},
    "recipes": {"core", "recipes"},
}
FILES = [(top, path) for top in MAY_IMPORT for path in sorted((ROOT / top).rglob("*.py"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def imports(path: Path) -> list[tuple[int, str]]:
    """Every import of a file, inside functions too, as (line, dotted name from the root of the project)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.lineno, node.module or ""))
        elif isinstance(node, ast.ImportFrom):
            base = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(node.lineno, ".".join(("afterglow", *base, name))) for name in names]
    return found


@pytest.mark.parametrize("top, path", FILES, ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_imports_go_down_only(top, path):
    for line, name in imports(path):
        where = f"{path.relative_to(ROOT)}:{line}: import {name}"
        first, _, rest = name.partition(".")
        assert first not in MAY_IMPORT, f"{where}: a bare name is a second identity; import it relatively"
        if first == "afterglow":
            assert rest.split(".")[0] in MAY_IMPORT[top], f"{where}: {top} may import {sorted(MAY_IMPORT[top])}"


def test_the_package_imports_itself_relatively():
    for _, path in FILES:
        absolute = re.findall(r"^\s*(?:from|import) afterglow\b.*", path.read_text(), re.MULTILINE)
        assert not absolute, f"{path}: {absolute[0].strip()}: write it relatively"


def test_every_package_is_declared():
    folders = [path.parent for top in MAY_IMPORT for path in (ROOT / top).rglob("__init__.py")]
    on_disk = {".".join(("afterglow", *folder.relative_to(ROOT).parts)) for folder in folders}
    assert on_disk == set(PROJECT["packages"])
    mapped = {name: path.replace("/", ".") for name, path in PROJECT["package-dir"].items()}
    assert mapped == {name: name.removeprefix("afterglow.") for name in PROJECT["packages"]}


def test_every_folder_with_code_is_a_package():
    for _, path in FILES:
        assert (path.parent / "__init__.py").exists(), f"{path.parent} has code and no __init__.py"


def test_no_module_shadows_a_library():
    libraries = {"datasets", "accelerate", "transformers", "trl", "torch", "types", "logging", "json", "math", "random"}
    for _, path in FILES:
        assert path.stem not in libraries, f"{path}: named like a library"


def test_a_report_is_drawn_without_torch():
    """Importing torch and transformers takes longer than drawing."""
    code = (
        "import sys, afterglow.eval.report; print(sorted({'torch', 'transformers', 'trl', 'vllm'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
