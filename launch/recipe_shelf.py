"""`afterglow recipes list | show | copy`: the recipes that come with the package, to read, copy and own."""

import shutil
from importlib.resources import files
from pathlib import Path

from ..core.errors import RecipeError
from ..core.recipe import Section, find_recipe, read_recipe

# What only the recipe of one verb has, in the order in which it decides.
DECIDING_KEYS = {
    "stages": "run", "method": "train", "suite": "eval", "steps": "filter", "samples": "eval", "k": "eval",
    "tasks": "sample",
}  # fmt: skip


def verb_of(section: Section) -> str | None:
    """Tell which verb takes a recipe, or None for what is none (a benchmark's task)."""
    return next((verb for key, verb in DECIDING_KEYS.items() if key in section.values), None)


def describe(path: Path) -> str:
    """Return the first sentence of a recipe's header comment."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or not line.strip("# "):
            break
        lines.append(line.strip("# "))
    sentence, dot, _ = " ".join(lines).partition(". ")
    return sentence.rstrip(".") + ("." if dot or sentence else "")


def packaged_recipes() -> dict[str, Path]:
    """Return name -> file of every recipe that comes with the package; `name` is what every verb takes."""
    folder = Path(str(files("afterglow.recipes")))
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def list_recipes(word: str | None = None) -> None:
    """Print the packaged recipes, or those with a word in their name or description."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("recipe", "afterglow", "what", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, path in packaged_recipes().items():
        what = describe(path)
        verb = verb_of_text(path.read_text(encoding="utf-8"))
        if verb and (word is None or word.lower() in f"{name} {what}".lower()):
            table.add_row(Text(name, style="cyan"), Text(verb), Text(what))
    if not table.row_count:
        raise RecipeError(f"no recipe has {word!r} in its name or description. See `afterglow recipes list`.")
    Console(highlight=False).print(table)


def verb_of_text(text: str) -> str | None:
    """As `verb_of`, without reading values: some are environment variables that need not be set to look around."""
    keys = {line.split(":")[0] for line in text.splitlines() if line[:1].isalpha()}
    return None if "name" in keys else next((verb for key, verb in DECIDING_KEYS.items() if key in keys), None)


def copy_recipe(name: str, target: str | None = None) -> list[Path]:
    """Copy a recipe, and with a pipeline the recipes beside it that it names; return the files that were written.

    Args:
        name: of the recipe.
        target: file, or folder (for a pipeline, always a folder); default: here, under its own name.

    Raises:
        RecipeError: there is no such recipe, or a file is there already.
    """
    source = find_recipe(name)
    beside = [source.parent / stage for stage in _stage_recipes(source)]
    if beside:
        folder = Path(target or source.parent.name)
        pairs = [(path, folder / path.name) for path in (source, *beside)]
    else:
        to = Path(target or source.name)
        pairs = [(source, to / source.name if to.is_dir() else to)]
    if taken := [str(to) for _, to in pairs if to.exists()]:
        raise RecipeError(f"{', '.join(taken)}: there already. Name another target: afterglow recipes copy {name} TO")
    for path, to in pairs:
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to)
    return [to for _, to in pairs]


def _stage_recipes(source: Path) -> list[str]:
    """Name the recipes beside a pipeline that its stages take, each once."""
    if verb_of_text(source.read_text(encoding="utf-8")) != "run":
        return []
    names: list[str] = []
    for stage in read_recipe(source).values["stages"]:
        for inner in stage.values.values():
            values = inner.values if isinstance(inner, Section) else {}
            names += [value for value in values.values() if isinstance(value, str) and value.endswith(".yaml")]
    return [name for name in dict.fromkeys(names) if (source.parent / name).is_file()]


def run_recipes(action: str | None, words: list[str]) -> int:
    """Do `afterglow recipes ACTION WORDS`.

    Raises:
        RecipeError: the words are no such command.
    """
    usage = "usage: afterglow recipes list [WORD] | show NAME | copy NAME [TO]"
    if action in (None, "list") and len(words) <= 1:
        list_recipes(*words)
    elif action == "show" and len(words) == 1:
        print(find_recipe(words[0]).read_text(encoding="utf-8"), end="")
    elif action == "copy" and 1 <= len(words) <= 2:
        for path in copy_recipe(*words):
            print(path)
    else:
        raise RecipeError(usage)
    return 0
