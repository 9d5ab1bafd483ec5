"""Every `afterglow` command of the README and the documentation is run, dry, on tiny models and a few rows."""

import json
import re
import shlex
from pathlib import Path

import pytest
from smoke import Smoke

from afterglow.launch import cli, processes

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
LINE = re.compile(rf"^(?:\|[^`]*)?`?(afterglow +(?:{'|'.join(cli.VERBS)})\b[^`#>]*)")
NAMES = re.compile(
    r"\b(?:[A-Z]{2,}(?:_ID)?|A|B|PIPELINE\.yaml)\b|\|"
)  # what stands for a name, or for words to choose from
HUB = "path/or/hub-id"
MINE = {"train": "glow/qwen3-4b-base-openmath.yaml", "launch": "glow/qwen3-4b-base-openmath.yaml",
        "eval": "eval/qwen3-4b-base.yaml", "filter": "filters/qwen3-4b-base-openmath.yaml"}  # fmt: skip
DRY = ("train", "filter", "eval", "sample")
NOT_HERE = ("--checkpoints", "--server_url", "--server_gpus", "--explain")  # need what another command makes


def commands() -> dict[str, str]:
    """Return command -> the first place that prints it."""
    found: dict[str, str] = {}
    for document in DOCUMENTS:
        for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), 1):
            for match in (LINE.match(line), *re.finditer(r"`(afterglow +[a-z]+ [^`]+)`", line)):
                words = " ".join(match[1].split()) if match else ""
                if len(words.split()) > 2 and words.split()[1] in cli.VERBS:
                    found.setdefault(words.partition(" > ")[0], f"{document.relative_to(ROOT)}:{number}")
    return {command: place for command, place in found.items() if not NAMES.search(command)}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return Smoke(tmp_path_factory.mktemp("documented"))


@pytest.fixture(autouse=True)
def eight_gpus_and_a_tracker(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trackers = "transformers.integrations.integration_utils.get_available_reporting_integrations"
    monkeypatch.setattr(trackers, lambda: ["tensorboard"])
    monkeypatch.setenv("AFTERGLOW_DATA", "/data")
    monkeypatch.setattr(processes, "count_gpus", lambda: 8)
    for name in ("use_one_gpu", "hide_gpus"):
        monkeypatch.setattr(processes, name, lambda: None)


@pytest.mark.parametrize("command", commands())
def test_a_documented_command_runs_dry(command, smoke, tmp_path, capsys):
    _, verb, *words = shlex.split(command)
    words = [MINE[verb] if word in ("mine.yaml", "recipe.yaml") and verb in MINE else word for word in words]
    if verb in DRY and not any(option in command for option in NOT_HERE):
        name = words[0].removeprefix("recipes/")
        keys = smoke.keys(name, tmp_path) | {"output_dir": str(tmp_path / "run")}
        words = [word for word in words if word != "--dry_run"]
        words += [f"--{key}={json.dumps(value)}" for key, value in keys.items()] + ["--dry_run"]
    elif verb not in ("launch", "recipes"):
        cli.build_parser().parse_known_args([verb, *words])
        return
    code = cli.main([verb, *words])
    assert code == 0, f"{commands()[command]}: {capsys.readouterr().err}"
    assert not (tmp_path / "run").exists()


def test_commands_are_found_in_every_shape():
    found = commands()
    assert len(found) > 20
    assert {command.split()[1] for command in found} >= {"train", "filter", "eval", "sample", "launch", "recipes"}
    assert any("cluster.md" in place for place in found.values()), "in a table"
    assert "afterglow recipes list glow" in found, "in a block"
