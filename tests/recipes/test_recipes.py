"""Every recipe of the package is read and built, and every command that is printed somewhere is one."""

import re
import shlex
from pathlib import Path

import pytest

from afterglow.core.errors import AfterglowError
from afterglow.core.recipe import read_recipe
from afterglow.eval.tasks import load_tasks
from afterglow.launch.cli import NO_RECIPE, VERBS, build_parser
from afterglow.launch.pipeline_recipe import RECIPE, parse_pipeline, parse_recipe
from afterglow.launch.processes import choose_setup

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.yaml"))
TASKS = [path for path in FILES if "\nname: " in (ROOT / path).read_text()]  # a task to sample from, not a recipe
RECIPES = [path for path in FILES if path not in TASKS]
TEXTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "Makefile"]
DOCUMENTS = [*FILES, *(path.relative_to(ROOT) for path in TEXTS)]
COMMAND = re.compile(rf"^[#\s`]*(?:\$\s*|\$\(BIN\)/)?(afterglow (?:{'|'.join(VERBS)}) [^`#]+?)(?:\s{{3,}}.*|`.*|#.*)?$")
PLACEHOLDERS = ("recipe.yaml", "mine.yaml", "RECIPE", "PIPELINE", "FOLDER")


def verb_of(values: dict) -> str:
    """Tell what a recipe is for by the key that only it has."""
    keys = {"stages": "run", "method": "train", "suite": "eval", "steps": "filter", "samples": "eval", "k": "eval"}
    return next(verb for key, verb in (keys | {"tasks": "sample"}).items() if key in values)


def commands() -> list[tuple[str, str]]:
    found = []
    for document in DOCUMENTS:
        for number, line in enumerate((ROOT / document).read_text(encoding="utf-8").splitlines(), 1):
            if (match := COMMAND.match(line)) and "--help" not in line and " ..." not in line:
                found.append((f"{document}:{number}", match[1]))
    return found


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("AFTERGLOW_DATA", "/data")


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_a_recipe_is_read_and_built(path):
    section = read_recipe(path)
    verb = verb_of(section.values)
    if verb == "run":
        _, stages = parse_pipeline(str(path), [])
        assert stages
        for stage in stages:
            if stage.takes == RECIPE:
                parse_recipe(stage.verb, stage.section())
    else:
        parse_recipe(verb, section)


@pytest.mark.parametrize("path", TASKS, ids=str)
def test_a_task_is_read(path):
    (task,), _ = load_tasks([str(path)], {})
    assert task.name and task.data


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_a_recipe_says_how_it_is_run(path):
    header = [line for line in (ROOT / path).read_text().splitlines() if line.startswith("#")]
    assert len(header) >= 3 and any("afterglow" in line or "make " in line for line in header), f"{path}: no command"


@pytest.mark.parametrize("where, command", commands(), ids=lambda value: value if ":" in value else "")
def test_a_printed_command_is_one(where, command):
    options, overrides = build_parser().parse_known_args(shlex.split(command)[1:])
    if options.verb in NO_RECIPE or options.target in PLACEHOLDERS:
        return
    try:
        if options.verb == "run":
            parse_pipeline(options.target, overrides)
        else:
            parse_recipe(options.verb, read_recipe(options.target, overrides))
        if options.verb == "train":
            choose_setup(options.accelerate_config, options.num_processes, gpus=8)
    except AfterglowError as error:
        raise AssertionError(f"{where}: {command}: {error}") from error


def test_commands_are_found():
    assert len(commands()) > 15
