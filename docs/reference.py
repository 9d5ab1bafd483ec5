"""A hook of MkDocs: one page per module, written from its docstrings and the help texts of its dataclasses' fields.

The source is parsed, never imported: the site is built without torch.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("core", "data_filters", "trainers", "eval", "launch", "evidence")
SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Attributes):\s*$")
ITEM = re.compile(r"^ {4}(\S[^:]*): (.*)$")


def markdown_of(docstring: str) -> str:
    """Turn a Google-style docstring into Markdown: its sections become lists."""
    out: list[str] = []
    section = False
    for line in docstring.splitlines():
        if match := SECTION.match(line):
            section = True
            out += ["", f"**{match[1]}**", ""]
        elif section and line and not line.startswith(" "):
            section = False
            out += ["", line]
        elif section and (match := ITEM.match(line)):
            out.append(f"- `{match[1]}`: {match[2]}")
        elif section and line.strip():
            out.append(f"    {line.strip()}" if out[-1].startswith(("-", "    ")) else line.strip())
        else:
            out.append(line)
    return "\n".join(out)


def module_page(path: Path) -> str:
    """Return the page of one module: its docstring, and its public classes and functions with theirs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    name = ".".join(("afterglow", *path.relative_to(ROOT).with_suffix("").parts))
    parts = [f"# {name}", markdown_of(ast.get_docstring(tree) or "")]
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            parts += _class(node)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            parts += _function(node, "##")
    return "\n\n".join(parts) + "\n"


def _class(node: ast.ClassDef) -> Iterator[str]:
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    yield f"## {node.name}"
    yield f"```python\nclass {node.name}({bases})\n```" if bases else f"```python\nclass {node.name}\n```"
    yield markdown_of(ast.get_docstring(node) or "")
    rows = [row for child in node.body if isinstance(child, ast.AnnAssign) and (row := _key(child))]
    if rows:
        yield "\n".join(["| key | type | default | what |", "|---|---|---|---|", *rows])
    for child in node.body:
        if isinstance(child, ast.FunctionDef) and not child.name.startswith("_") and ast.get_docstring(child):
            yield from _function(child, "###")


def _key(node: ast.AnnAssign) -> str | None:
    """Return the table row of a field that has a help text."""
    call = node.value
    if not isinstance(call, ast.Call) or ast.unparse(call.func) != "field":
        return None
    given = {word.arg: word.value for word in call.keywords}
    if not isinstance(metadata := given.get("metadata"), ast.Dict):
        return None
    texts = {ast.literal_eval(key): value for key, value in zip(metadata.keys, metadata.values, strict=True) if key}
    if "help" not in texts:
        return None
    default = next((ast.unparse(given[name]) for name in ("default", "default_factory") if name in given), "required")
    cells = (f"`{ast.unparse(node.target)}`", f"`{ast.unparse(node.annotation)}`", f"`{default}`", _text(texts["help"]))
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _text(node: ast.expr) -> str:
    """Return a help text; what it computes stands as its expression in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return "{" + ast.unparse(node.value if isinstance(node, ast.FormattedValue) else node) + "}"


def _function(node: ast.FunctionDef, heading: str) -> Iterator[str]:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    yield f"{heading} {node.name}"
    yield f"```python\n{node.name}({ast.unparse(node.args)}){returns}\n```"
    yield markdown_of(ast.get_docstring(node) or "")


def pages() -> dict[str, str]:
    """Return page -> text of every module."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*.py")):
            if not path.name.startswith("_"):
                found[f"reference/{folder}/{path.stem}.md"] = module_page(path)
    return found


def on_files(files: Any, config: Any) -> Any:
    """Add the pages to the site (called by MkDocs)."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files
