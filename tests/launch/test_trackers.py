"""Trackers go through transformers: what a trainer logs arrives; a missing package is told before a model is loaded."""

import struct

import pytest
from launch_recipes import read_jsonl, training_recipe
from tensorboardX.proto.event_pb2 import Event

from afterglow.core.errors import RecipeError
from afterglow.core.recipe import read_recipe
from afterglow.launch import training_recipe as recipes
from afterglow.launch.train import run


def scalars(folder) -> dict[str, dict[int, float]]:
    """Read tag -> step -> value from the event files of a folder: records of length, checksum, event, checksum."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


@pytest.mark.parametrize("method, metric", [("glow", "glow/weight_mean"), ("sft", "mean_token_accuracy")])
def test_the_metrics_of_a_trainer_arrive(tmp_path, tiny_folder, method, metric):
    folder = run(read_recipe(training_recipe(tmp_path, tiny_folder, method=method, report_to="tensorboard")))
    found = scalars(folder)
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if metric in row]
    assert rows
    for name in ("loss", metric):
        assert found[f"train/{name}"] == pytest.approx({row["step"]: row[name] for row in rows}, rel=1e-6), name


@pytest.mark.parametrize(
    "trackers, says",
    [
        ("neptune", r":\d+: `report_to`: the package of neptune is not installed. `pip install neptune`"),
        (["tensorboard", "wand"], r"'wand' is none of .*; did you mean wandb\?"),
    ],
)
def test_a_missing_tracker_is_told_before_the_model_is_loaded(tmp_path, tiny_folder, monkeypatch, trackers, says):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_neptune_available", lambda: False)
    with pytest.raises(RecipeError, match=says):
        recipes.parse(read_recipe(training_recipe(tmp_path, tiny_folder, report_to=trackers)))
    assert not (tmp_path / "run").exists()
