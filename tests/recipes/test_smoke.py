"""Every recipe that trains, filters, samples or evaluates, run for two steps on a tiny model of the family it names."""

import json
import shutil

import pytest
from smoke import Smoke

from afterglow.launch.recipe_shelf import packaged_recipes, verb_of_text

VERBS = {name: verb_of_text(path.read_text()) for name, path in packaged_recipes().items()}
# Pipelines chain recipes that stand here. What needs no model, a server, a ledger or longer rows has its own tests.
ELSEWHERE = (
    "diagnostics/", "filters/judge-branching.yaml", "filters/coreset-", "filters/clean-text.yaml",
    "tool_rlvr/scalerl-8b-async.yaml",
)  # fmt: skip
SMOKED = [name for name, verb in VERBS.items() if verb not in (None, "run") and not name.startswith(ELSEWHERE)]
FEW = [
    "glow/qwen2.5-7b-openmath.yaml",
    "filters/tir-tool-qwen3-30b-a3b-thinking.yaml",
    "unlearning/wmdp-cyber-zephyr-7b-rmu.yaml",
    "eval/llama3.1-8b.yaml",
]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return Smoke(tmp_path_factory.mktemp("smoke"))


@pytest.fixture(autouse=True)
def anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AFTERGLOW_DATA", "/data")


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in SMOKED])
def test_a_recipe_runs_for_two_steps(name, smoke):
    folder = smoke.run(name)
    assert json.loads((folder / "manifest.json").read_text())["finished"]
    shutil.rmtree(folder)


def test_the_few_exist():
    assert set(FEW) <= set(SMOKED)
