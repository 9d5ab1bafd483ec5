"""The table of recipes under accelerate configurations: its cells are isolated, kept, and told as they are."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import smoke_table
from smoke_table import FAILED, KINDS, REFUSED, TWO_STEPS, fill, in_two_processes, table

from afterglow.core.errors import RecipeError


def only(rank: int) -> bool:
    return os.environ["RANK"] == str(rank)


def refuse() -> None:
    raise RecipeError("StableUN needs the\nwhole gradient")


def fail_in_one() -> None:
    if only(1):
        raise ValueError("no such expert\nand more")
    time.sleep(60)  # as a collective that waits for the other


def refuse_in_one() -> None:
    if only(0):
        refuse()


def die() -> None:
    if only(1):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "work, result",
    [
        (lambda: None, (TWO_STEPS, "")),
        (refuse, (REFUSED, "StableUN needs the\nwhole gradient")),
        (fail_in_one, (FAILED, "ValueError: no such expert")),
        (refuse_in_one, (FAILED, "one process of two refused: StableUN needs the\nwhole gradient")),
        (die, (FAILED, "a process ended with code -9")),
    ],
)
def test_a_cell_takes_none_along(tmp_path, monkeypatch, work, result):
    monkeypatch.setattr(smoke_table, "OTHER_SECONDS", 0.2)
    assert in_two_processes(work, {"CELL": "1"}, tmp_path / "logs") == result
    assert "CELL" not in os.environ and {path.name for path in (tmp_path / "logs").iterdir()} == {"0.log", "1.log"}


def test_a_cell_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(smoke_table, "CELL_SECONDS", 0.3)
    assert in_two_processes(lambda: time.sleep(60), {}, tmp_path)[0] == FAILED


def test_cells_are_kept_and_what_failed_is_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(smoke_table, "environment", lambda config: {"CONFIG": config})
    name, ran, broken = "glow/qwen3-8b-base-openmath.yaml", tmp_path / "ran", tmp_path / "broken"
    broken.touch()

    def work(section, config):
        assert os.environ["CONFIG"] == config and section.values["model_name_or_path"].endswith("models/qwen3")
        assert section.values.get("bf16") is (config == "ddp")
        with ran.open("a") as file:
            file.write(f"{config}\n")
        if config == "zero2":
            raise RecipeError("/some/where/a.yaml:3: the\nreason")
        assert config != "fsdp2" or not broken.exists()

    rows = fill(tmp_path, [name], work)
    assert [(row["config"], row["result"]) for row in rows] == [
        ("ddp", TWO_STEPS), ("fsdp2", FAILED), ("zero2", REFUSED), ("zero3", TWO_STEPS)
    ]  # fmt: skip
    broken.unlink()
    ran.write_text("")
    rows = fill(tmp_path, [name], work)
    assert ran.read_text() == "fsdp2\nfsdp2\n", "both processes of the one cell that failed"
    assert table(rows).splitlines() == [
        "| recipe | ddp | fsdp2 | zero2 | zero3 |",
        "|---|---|---|---|---|",
        "| `glow/qwen3-8b-base-openmath` | ✓ | ✓ | refused (1) | ✓ |",
        "",
        "1. the reason",
    ]
    assert smoke_table.summary(rows).startswith("4 cells: 3 two steps, 1 refused, 0 failed; ")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_recipe_with_an_adapter_trains_in_two_real_processes(tmp_path):
    script = Path(smoke_table.__file__)
    subprocess.run([sys.executable, str(script), str(tmp_path), "zephyr-7b-npo"], check=True, timeout=250)
    rows = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert [(row["config"], row["result"], row["reason"]) for row in rows] == [(name, TWO_STEPS, "") for name in KINDS]
    assert "4 two steps, 0 refused, 0 failed" in (tmp_path / "table.md").read_text()
