"""The pages of the site that are made from the source, and the tables that name recipes."""

import importlib.util
import re
from pathlib import Path

from afterglow.launch.recipe_shelf import packaged_recipes, verb_of_text

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("glow", "tir_sft", "tool_rlvr", "unlearning")  # folders of recipes for models that people use
spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)


def test_a_docstring_becomes_markdown():
    text = "Do it.\n\nArgs:\n    a: what\n        it is.\n    b: more.\n\nRaises:\n    ValueError: no."
    assert reference.markdown_of(text).split("\n") == [
        "Do it.", "", "", "**Args**", "", "- `a`: what", "    it is.", "- `b`: more.", "",
        "", "**Raises**", "", "- `ValueError`: no.",
    ]  # fmt: skip


def test_every_module_has_a_page_with_its_keys():
    pages = reference.pages()
    modules = [path for folder in reference.FOLDERS for path in (ROOT / folder).glob("[!_]*.py")]
    assert len(pages) == len(modules) > 100
    page = pages["reference/core/trajectory.md"]
    assert page.startswith("# afterglow.core.trajectory\n")
    assert "| `split` | `str` | `'train'` | Split, for a dataset on the hub. |" in page
    assert "load_trajectories(config: DataConfig" in page and "- `DataError`: file, row and mend" in page
    assert "| `glow_alpha` | `float` | `1.0` | Height of the sigmoid. |" in pages["reference/trainers/glow.md"]


def test_the_table_of_recipes_names_those_that_are():
    table = (ROOT / "docs" / "recipes.md").read_text()
    named = {f"{name}.yaml" for name in re.findall(r"`(\w+/[^`]+)`", table)}
    shelf = packaged_recipes()
    folders = {name.split("/")[0] for name in shelf}
    assert named and not {name for name in named if name.split("/")[0] in folders} - set(shelf)
    training = {
        n for n, path in shelf.items() if verb_of_text(path.read_text()) == "train" and n.split("/")[0] in MODELS
    }
    assert not training - named, "docs/recipes.md does not name these"


def test_the_readme_names_the_folders_of_the_shelf():
    table = re.findall(r"`recipes/(\w+)/`", (ROOT / "README.md").read_text())
    folders = {name.split("/")[0] for name in packaged_recipes()}
    assert set(table) <= folders and {*MODELS, "filters", "eval"} <= set(table)


def test_the_smoke_table_names_recipes_that_are():
    text = (ROOT / "docs" / "smoke.md").read_text()
    named = {f"{name}.yaml" for name in re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)}
    assert len(named) > 50 and named <= set(packaged_recipes())
    assert "| recipe | ddp | fsdp2 | zero2 | zero3 |" in text
