"""`afterglow VERB --help`: the keys of its recipe, from the fields of the dataclasses that read it."""

import dataclasses
import importlib
import inspect
import typing
from enum import Enum
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

FLAGS = {
    "--dry_run": "Check everything, show what would be done; write and download nothing.",
    "--overwrite": "Delete what the output folder holds and start again.",
}
FILTER_FLAGS = {"--explain ID": "Say why a row was kept or dropped, step by step, with its scores. Needs a run."}
COMPARE_FLAGS = {
    "--k": "Values of k whose pass@k are compared. Default: 1 and the largest that both runs can answer.",
    "--output_dir": "Where compare.json and compare.html are written. Default: nowhere.",
}
REPORT_FLAGS = {
    "--export": "lm_eval: results and samples as lm-evaluation-harness has them; model_card: a table with intervals; "
    "in the folder of each finished evaluation, in place of report.html.",
}
TRAIN_FLAGS = {
    "--accelerate_config": "ddp, fsdp2, zero2, zero3, zero3_offload, single, cpu, or the path of an accelerate YAML. "
    "Default: ddp on several GPUs, single otherwise.",
    "--num_processes": "Processes to train with, on all machines together. Default: the GPUs that are visible, or 1.",
    "--server_gpus": "With `vllm_mode: server`: start the server on that many of this machine's GPUs, the last ones.",
    "--num_machines": "Machines that train together; the same command runs on each (`afterglow launch` writes it).",
    "--machine_rank": "Which of them this is, from 0 on.",
    "--main_process_ip": "Address of machine 0.",
    "--main_process_port": "A free port of machine 0.",
}
SERVE_FLAGS = {
    "--dry_run": "Check the recipe and print vLLM's command.",
    "--host": "Address to listen on: 127.0.0.1 unless given. vLLM's development endpoints are open to whoever reaches "
    "it: 0.0.0.0 only in a network that you trust.",
    "--port": "Port to listen on. Default: 8000.",
}
PIPELINE_KEYS = {
    "output_dir": "Folder of summary.json and stages.json.",
    "stages": "List, in order. `- VERB: recipe.yaml`, or `- VERB: {recipe: ..., label: ..., key: value}`: recipes are "
    "found beside the pipeline, other keys replace those of the recipe.",
    "- make": "`- make: {module: package.module, output_dir: ..., key: value}` runs `python -m package.module` with "
    "`--key value`, for data that a program makes.",
    "- report": "`- report: FOLDER` writes its report.html.",
}


def show_help(verb: str, takes: str, what: str) -> int:
    """Print usage and recipe keys of a verb."""
    from .cluster import OPTIONS

    console = Console(highlight=False)
    own = {"report": REPORT_FLAGS, "recipes": {}, "doctor": {}, "compare": COMPARE_FLAGS, "train": FLAGS | TRAIN_FLAGS}
    own |= {"serve": SERVE_FLAGS, "launch": {f"--{name}": f"{text}." for name, (_, text) in OPTIONS.items()}}
    own["filter"] = FLAGS | FILTER_FLAGS
    flags = own.get(verb, FLAGS)
    keys = "" if verb in own and verb not in ("train", "filter", "serve", "launch") else " [--key value ...]"
    console.print(Text(f"usage: afterglow {verb} {takes}{keys}{''.join(f' [{flag}]' for flag in flags)}"))
    console.print(Text(f"\n{what[0].upper()}{what[1:]}.\n"))
    _print(console, "options", [(flag, "", text) for flag, text in flags.items()])
    if verb == "run":
        _print(console, "keys of a pipeline", [(key, "", text) for key, text in PIPELINE_KEYS.items()])
    shown: set[str] = set()
    for title, config in _configs(verb):
        for name, rows in _keys_by_class(config):
            if name not in shown:  # several methods extend the same class
                _print(console, title if config.__name__ == name else f"{title}: keys of {name}", rows)
                shown.add(name)
    return 0


def _configs(verb: str) -> list[tuple[str, type]]:
    """The dataclasses that a verb's recipe fills, with a title each."""
    from ..core.trajectory import DataConfig

    if verb == "train":
        from trl.trainer.model_config import ModelConfig

        from .training_recipe import METHODS, TrainStage

        methods = {
            name: getattr(importlib.import_module(module), config) for name, (module, config, _) in METHODS.items()
        }
        first = [("stage", TrainStage), ("data", DataConfig), ("model", ModelConfig)]
        return first + [(f"method: {name}", config) for name, config in methods.items()]
    if verb == "filter":
        from ..data_filters.chain import STEPS, FilterConfig

        first = [("stage", FilterConfig), ("data", DataConfig)]
        return first + [(f"step: {name}", step.config) for name, step in STEPS.items()]
    if verb in ("eval", "sample"):
        from ..core.generation import EngineConfig
        from ..core.rollout import RolloutConfig
        from ..core.sandbox import SandboxConfig
        from ..eval.evaluate import EvalConfig, SampleConfig
        from ..eval.sweep import SweepConfig

        engine = [("engine", EngineConfig), ("tools and thinking", RolloutConfig), ("sandbox", SandboxConfig)]
        if verb == "sample":
            return [("stage", SampleConfig), *engine]
        from ..eval.unlearning import STUDIES, SUITES

        suites = [(f"suite: {name}", config) for name, (config, _) in (SUITES | STUDIES).items()]
        return [("stage", EvalConfig), *engine, ("many checkpoints", SweepConfig), *suites]
    return []


def _keys_by_class(config: type) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Group the keys of a dataclass by the class that defines them, its own first."""
    hints = typing.get_type_hints(config)
    fields = {f.name: f for f in dataclasses.fields(config) if f.init}
    groups = []
    for cls in config.__mro__:
        own = [fields.pop(name) for name in list(fields) if name in inspect.get_annotations(cls)]
        if own:
            groups.append((cls.__name__, [(f.name, _kind(f, hints[f.name]), _text(f)) for f in own]))
    return groups


def _kind(f: dataclasses.Field, hint: Any) -> str:
    """Say type and default: `[float = 1e-05]`, or `[str, required]`."""
    name = getattr(hint, "__name__", "") if isinstance(hint, type) else str(hint).replace("typing.", "")
    if f.default is not dataclasses.MISSING:
        default = f.default.value if isinstance(f.default, Enum) else f.default
        return f"[{name} = {default}]"
    return (
        f"[{name} = {f.default_factory()}]" if f.default_factory is not dataclasses.MISSING else f"[{name}, required]"
    )


def _text(f: dataclasses.Field) -> str:
    text = str(f.metadata.get("help", "")).replace("%%", "%")
    choices = [c for c in f.metadata.get("choices") or [] if str(c) not in text]
    return text + (f" One of {', '.join(map(str, choices))}." if choices else "")


def _print(console: Console, title: str, rows: list[tuple[str, str, str]]) -> None:
    if not rows:
        return
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(ratio=1)
    for key, kind, text in rows:
        table.add_row(Text(key), Text.assemble(text, " " if text else "", (kind, "dim")))
    console.print(Text(title, style="bold"))
    console.print(table)
    console.print()
