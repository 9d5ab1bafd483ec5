"""Runs a packaged recipe for two steps, or on a handful of rows, with a tiny model of the family it names.

What is replaced: the model (random weights, same architecture, template and special tokens), the data (a few rows in
the shape that the recipe's `columns` describe), the numbers of rows, steps and tokens, and vLLM by transformers. All
else is the recipe's: method, loss, optimizer, types, adapters, steps of a filter, modes of an evaluation.
"""

import json
import math
from pathlib import Path
from typing import Any

from families import family_of, save_family
from unlearning_world import write_rows, write_sets

from afterglow.core.recipe import Section, find_recipe, plain, read_recipe
from afterglow.core.tool_protocol import TOOLS
from afterglow.launch.recipe_shelf import verb_of

CODE = {"type": "function", "function": {"name": "python", "arguments": {"code": "print(2 + 2)"}}}
TRAIN = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "logging_steps": 1,
         "save_strategy": "no", "warmup_steps": 0}  # fmt: skip
ROLLOUTS = {"num_generations": 2, "max_completion_length": 48, "use_vllm": False, "routing_replay": False,
            "tool_result_tokens": 16, "answer_tokens": 8, "probe_every": 1}  # fmt: skip
THINKING = {"think_tokens_from": 8, "think_tokens": 16}
SAMPLING = {"engine": "transformers", "n": 2, "k": [1, 2], "max_tokens": 24, "max_model_len": 1500, "max_problems": 2,
            "tool_result_tokens": 16, "answer_tokens": 8, "max_tool_calls": 2}  # fmt: skip
SUITES: dict[str, dict[str, Any]] = {
    "tofu": {"engine": "transformers", "max_tokens": 4, "retrained": "none"},
    "muse": {"engine": "transformers", "retrained": "none", "max_rows": 2},
    "wmdp": {},
    "leakage": {"engine": "transformers", "n": 2, "k": [1, 2], "max_tokens": 4},
    "relearning": {"samples": 4, "steps": [0, 1, 2], "seeds": [0, 1], "batch_size": 2},
    "path_dependence": {},
}


def chain(problem: int, kind: str, right: bool) -> dict[str, Any]:
    """Return one solution of `problem + 2`: as text, or with a call of Python."""
    said = f"First, {problem} + 2.\n\nWait, let me check.\n\nSo \\boxed{{{problem + 2 + (not right)}}}."
    turns: list[dict[str, Any]] = [{"role": "assistant", "content": said}]
    if kind == "tool":
        call = {"role": "assistant", "content": "Let me compute.", "tool_calls": [CODE]}
        turns = [call, {"role": "tool", "content": "4"}, *turns]
    return {
        "problem_id": f"p{problem}", "prompt": [{"role": "user", "content": f"How much is {problem} + 2?"}],
        "completion": turns, "answer": str(problem + 2), "source": kind, "correct": right, "finish_reason": "stop",
        "tools": TOOLS if kind == "tool" else None, "n_calls": 2 if kind == "tool" else 0, "n_failed": 0,
    }  # fmt: skip


def trajectories(kinds: tuple[str, ...] = ("tool", "text"), samples: int = 8) -> list[dict[str, Any]]:
    """Return solutions of three problems; with the tool all are right, without half of them."""
    return [
        chain(problem, kind, kind == "tool" or i % 2 == 0) | {"sample_index": i}
        for problem in range(3) for kind in kinds for i in range(samples)
    ]  # fmt: skip


def foreign(row: dict[str, Any], recipe: dict[str, Any], columns: str = "columns") -> dict[str, Any]:
    """Give a row the shape that a recipe reads: its columns' names, plain text where it maps text."""
    row = {key: value for key, value in row.items() if value is not None}
    for ours, theirs in recipe.get(columns, {}).items():
        value = row.pop(ours)
        row[theirs] = value[-1]["content"] if isinstance(value, list) else value
    if mark := recipe.get("answer_after"):
        row["answer"] = f"{row['problem_id']} plus two. {mark} {row['answer']}"
    return row


def overridden(name: str, keys: dict[str, Any]) -> Section:
    """Read a recipe with other values for some keys."""
    return read_recipe(name, [f"--{key}={json.dumps(value)}" for key, value in keys.items()])


class Smoke:
    """Smoke runs below one folder, which keeps the models that they share."""

    def __init__(self, folder: Path):
        self.folder = folder

    def run(self, name: str) -> Path:
        """Run a recipe and return its run folder, having checked what it wrote."""
        folder = self.folder / name.replace("/", "-").removesuffix(".yaml")
        section = self.section(name, folder)
        verb = verb_of(section)
        if verb == "train":
            from afterglow.launch.train import run
        elif verb == "filter":
            from afterglow.data_filters.chain import run
        elif verb == "eval":
            from afterglow.eval.evaluate import run
        else:
            from afterglow.eval.evaluate import run_sample as run
        run(section)
        manifest = json.loads((folder / "run" / "manifest.json").read_text())
        assert manifest["finished"], f"{name}: not finished"
        if verb == "train":
            check_training(folder / "run")
        elif verb == "filter":
            counts = [len((folder / "run" / f"{part}.jsonl").read_text().splitlines()) for part in ("kept", "dropped")]
            assert counts[0] and sum(counts) == len(trajectories()), f"{name}: kept and dropped {counts}"
        return folder / "run"

    def model_of(self, name: str) -> Path:
        """Return the tiny model of the family that a recipe is about."""
        family = family_of(name, find_recipe(name).read_text())
        return save_family(self.folder / "models" / family, family)

    def section(self, name: str, folder: Path, changes: dict[str, Any] | None = None) -> Section:
        """Write what a recipe reads below a folder, and return the recipe over it."""
        return overridden(name, self.keys(name, folder) | {"output_dir": str(folder / "run")} | (changes or {}))

    def keys(self, name: str, folder: Path) -> dict[str, Any]:
        """Write what a recipe reads below a folder, and return the keys that make it small."""
        recipe = plain(read_recipe(name))
        folder.mkdir(parents=True, exist_ok=True)
        return getattr(self, f"_{verb_of(Section(recipe))}")(recipe, folder, str(self.model_of(name)))

    def _train(self, recipe: dict[str, Any], folder: Path, model: str) -> dict[str, Any]:
        rlvr = recipe["method"].endswith("tool_rlvr")
        with_tools = rlvr or recipe.get("assistant_only_loss", False)
        rows = trajectories(("tool", "text") if with_tools else ("text",), samples=2)
        if rlvr:
            rows = [row | {"problem_id": f"p{i}"} for i, row in enumerate(rows)]
            rows = [{key: row[key] for key in ("problem_id", "prompt", "answer", "tools")} for row in rows]
        data = str(write_rows(folder / "data.jsonl", [foreign(row, recipe) for row in rows]))
        keys = TRAIN | {"model_name_or_path": model, "data": data}
        if rlvr:
            keys |= ROLLOUTS | (THINKING if recipe.get("think_tokens") else {})
        if "retain_data" in recipe:
            keys["retain_data"] = data
        return keys

    def _filter(self, recipe: dict[str, Any], folder: Path, model: str) -> dict[str, Any]:
        files = {kind: trajectories((kind,)) for kind in ("tool", "text")}
        paths = [
            str(write_rows(folder / f"{kind}.jsonl", [foreign(row, recipe) for row in rows]))
            for kind, rows in files.items()
        ]
        keys: dict[str, Any] = {"data": paths}
        if "problems" in recipe:
            problems = [foreign(chain(i, "text", True), recipe, "problem_columns") for i in range(3)]
            keys["problems"] = str(write_rows(folder / "problems.jsonl", problems))
        samples = write_rows(folder / "samples.jsonl", trajectories())
        for step in recipe["steps"]:
            for kind, inner in step.items():
                replaced = {"model": model, "samples": str(samples), "benchmarks": [self._benchmark(folder)]}
                keys |= {f"steps.{kind}.{key}": value for key, value in replaced.items() if key in (inner or {})}
        return keys

    def _benchmark(self, folder: Path) -> str:
        """Write a file of problems, none of which is a trajectory's."""
        return str(
            write_rows(folder / "benchmark.jsonl", [{"problem_id": "b", "prompt": "Name a prime.", "answer": "7"}])
        )

    def _sample(self, recipe: dict[str, Any], folder: Path, model: str) -> dict[str, Any]:
        rows = [{"problem_id": f"p{i}", "prompt": f"{i} + 2?", "answer": str(i + 2)} for i in range(3)]
        tasks = [str(write_rows(folder / "problems.jsonl", [foreign(row, recipe) for row in rows]))]
        keys = SAMPLING | {"model": model, "tasks": tasks}
        return keys if "k" in recipe else {key: value for key, value in keys.items() if key != "k"}

    def _eval(self, recipe: dict[str, Any], folder: Path, model: str) -> dict[str, Any]:
        if "suite" not in recipe:
            return self._sample(recipe, folder, model)
        sets = write_sets(folder)
        texts = [{"text": f"{i} " * 8, "prompt": "Once", "gt": "upon a time"} for i in range(3)]
        choices = [{"question": f"{i}?", "choices": list("abcd"), "answer": i} for i in range(3)]
        sets |= {"benign": sets["retain"]}
        keys = {name: path for name, path in sets.items() if name in recipe}
        keys |= SUITES[recipe["suite"]] | {name: model for name in ("model", "original", "retrained") if name in recipe}
        if recipe["suite"] == "muse":
            parts = [f"knowmem_{part}{end}" for part in ("forget", "retain") for end in ("", "_icl")]
            keys |= dict.fromkeys(parts, sets["forget"])
            keys |= {name: str(write_rows(folder / "t.jsonl", texts)) for name in ("verbmem", "members", "holdout")}
        if recipe["suite"] in ("tofu", "muse"):
            keys["retrained"] = "none"
        if recipe["suite"] == "wmdp":
            keys["questions"] = [str(write_rows(folder / "questions.jsonl", choices))]
        if recipe["suite"] == "path_dependence":
            keys |= self._paths(recipe, folder, model, sets)
        return keys

    def _paths(self, recipe: dict[str, Any], folder: Path, model: str, sets: dict[str, str]) -> dict[str, Any]:
        """Train the two paths that an audit compares."""
        from afterglow.launch.train import run

        paths = []
        for number, path in enumerate(recipe["paths"][:2]):
            keys = TRAIN | {
                "model_name_or_path": model, "data": sets["forget"], "retain_data": sets["retain"], "save_steps": 1,
                "save_strategy": "steps", "output_dir": str(folder / f"path-{number}"), "save_total_limit": 3,
            }  # fmt: skip
            run(overridden("unlearning/tofu-llama3.2-1b-npo.yaml", keys))
            paths.append(path | {"start": model, "run": keys["output_dir"]})
        return {"paths": paths, "probes": {"tofu": sets["retain"]}, "max_rows": 3}


def check_training(folder: Path) -> None:
    """Two logged steps with finite losses, and a model that another stage can read."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert all(math.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert (folder / "config.json").exists() and list(folder.glob("*.safetensors"))
