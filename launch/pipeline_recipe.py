"""A pipeline: stages in order, read and checked as a whole before the first one starts.

    output_dir: runs/demo
    stages:
      - make: {module: afterglow.recipes.demo.world, output_dir: runs/demo/world, seed: 0}
      - train: base.yaml
      - eval: {recipe: eval.yaml, label: base, model: runs/demo/base, output_dir: runs/demo/eval-base}
      - train: {recipe: glow.yaml, each_seed: [0, 1, 2], output_dir: "runs/demo/glow-{seed}"}
      - report: runs/demo

Recipes are found beside the pipeline; paths inside them are relative to where the command is given. A stage with
`each_seed` is as many stages, one after another: `seed` is set, `{seed}` in its other keys is replaced, the labels are
`glow-0`, `glow-1`, ...
"""

import difflib
import importlib.util
import json
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ..core.errors import RecipeError
from ..core.recipe import Section, build, find_recipe, plain, read_recipe

RECIPE, MODULE, FOLDER = "recipe", "module", "folder"
TARGETS = {"sample": RECIPE, "filter": RECIPE, "train": RECIPE, "eval": RECIPE, "make": MODULE, "report": FOLDER}
FLAGS = ("accelerate_config", "num_processes")  # of `afterglow train`, beside the keys of its recipe
RESERVED = ("seconds", "peak_memory_gb")  # what summary.json holds beside the labels
INPUTS = ("data", "problems", "model", "model_name_or_path", "samples", "tasks", "retain_data", "original", "retrained",
          "forget", "benign")  # fmt: skip
DATA_SUFFIXES = (".jsonl", ".gz", ".json", ".parquet")


@dataclass
class PipelineConfig:
    """A list of stages."""

    output_dir: str = field(metadata={"help": "Folder of summary.json and stages.json."})
    stages: list[Any] = field(metadata={"help": "Stages in order, each `- VERB: recipe.yaml` or a mapping."})
    study: dict[str, Any] | None = field(
        default=None, metadata={"help": "What the runs are to show and what decides; read by afterglow.evidence."}
    )


@dataclass
class Stage:
    """One stage: a verb, what it takes, and the keys that replace those of its recipe."""

    verb: str
    label: str
    target: str
    keys: dict[str, Any]
    where: str
    flags: dict[str, Any] = field(default_factory=dict)
    group: str | None = None  # label of the stage with `each_seed` that it is one of

    @property
    def name(self) -> str:
        """What a person would call it; no other stage is called so."""
        return self.verb if self.label == self.verb else f"{self.verb} {self.label}"

    @property
    def takes(self) -> str:
        """What its target is: a recipe, a module or a folder."""
        return TARGETS[self.verb]

    @property
    def overrides(self) -> list[str]:
        """The keys as words of a command line."""
        return [f"--{key}={_word(value)}" for key, value in self.keys.items()]

    def section(self) -> Section:
        """Read its recipe, the keys of the stage laid over it."""
        return read_recipe(self.target, self.overrides)

    @property
    def output_dir(self) -> str | None:
        """The folder that it writes, where that can be known."""
        if self.takes == RECIPE:
            return plain(self.section().values.get("output_dir"))
        return self.keys.get("output_dir")

    def identity(self) -> dict[str, Any]:
        """What it computes: another identity is another run."""
        keys = plain(self.section()) if self.takes == RECIPE else self.keys
        return {"verb": self.verb, "target": self.target, "keys": keys, "flags": self.flags}

    def command(self, overwrite: bool) -> list[str]:
        """Return the command that runs it, in the interpreter that runs us."""
        last = ["--overwrite"] if overwrite else []
        if self.verb == "make":
            return [sys.executable, "-m", self.target, *self.overrides, *last]
        flags = [f"--{name}={value}" for name, value in self.flags.items()]
        if self.verb == "report":
            last = []
        return [sys.executable, "-m", "afterglow.launch.cli", self.verb, self.target, *self.overrides, *flags, *last]


def _word(value: Any) -> str:
    """Write a value so that the command line reads the same one."""
    if isinstance(value, str) and yaml.safe_load(value) == value:
        return value
    return json.dumps(value)


def parse_pipeline(path: str, overrides: list[str]) -> tuple[Path, list[Stage]]:
    """Read a pipeline and return its folder and stages.

    Raises:
        RecipeError: a key, a verb or a label is wrong; all errors in one message.
    """
    section = read_recipe(path, overrides)
    (config,) = build(section, PipelineConfig)
    stages: list[Stage] = []
    errors: list[str] = []
    taken: set[str] = set()
    for item in config.stages:
        try:
            stage = _parse_stage(item, path, section.place("stages"))
            of_seeds = _over_seeds(stage)
            names = {stage.name, *(one.name for one in of_seeds)}
            if names & taken or stage.label in RESERVED:
                raise RecipeError(f"{stage.where}: the label `{stage.label}` is taken. Give the stage another `label`.")
            taken |= names
            stages += of_seeds
        except RecipeError as error:
            errors.append(str(error))
    if errors or not stages:
        raise RecipeError("\n".join(errors) or f"{section.place('stages')}: `stages` is empty.")
    return Path(config.output_dir), stages


def _parse_stage(item: Any, pipeline: str, where: str) -> Stage:
    if not isinstance(item, Section):
        raise RecipeError(f"{where}: a stage is `- VERB: recipe.yaml` or `- VERB: {{recipe: ..., key: value}}`.")
    verb, inner = next(iter(item.values.items()))
    where = item.place(verb)
    if verb not in TARGETS:
        near = difflib.get_close_matches(verb, TARGETS, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise RecipeError(f"{where}: unknown verb `{verb}`.{hint} Verbs are {', '.join(TARGETS)}.")
    keys = plain(inner)
    name = TARGETS[verb]
    target = keys.pop(verb, None) or keys.pop(name, None)
    if not isinstance(target, str):
        raise RecipeError(f"{where}: `{name}` is missing: `- {verb}: {{{name}: ...}}`.")
    label = keys.pop("label", None) or {RECIPE: Path(target).stem, MODULE: target.split(".")[-1], FOLDER: verb}[name]
    flags = {key: keys.pop(key) for key in FLAGS if verb == "train" and key in keys}
    if name == RECIPE and (beside := find_recipe(pipeline).parent / target).is_file():
        short = Path(pipeline).parent / target  # which may name a packaged recipe, as `pipeline` may
        target = str(short if find_recipe(short).samefile(beside) else beside)
    if verb == "report" and keys:
        raise RecipeError(f"{where}: a report has no key `{next(iter(keys))}`.")
    return Stage(verb, str(label), target, keys, where, flags)


def _over_seeds(stage: Stage) -> list[Stage]:
    """Return the stages that one stage stands for: one for each of its `each_seed`, or itself."""
    if "each_seed" not in stage.keys:
        return [stage]
    seeds = stage.keys.pop("each_seed")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise RecipeError(f"{stage.where}: `each_seed` is a list of whole numbers, such as [0, 1, 2]; got {seeds!r}.")
    return [
        replace(stage, label=f"{stage.label}-{seed}", keys=_with_seed(stage.keys, seed) | {"seed": seed},
                group=stage.label)
        for seed in seeds
    ]  # fmt: skip


def _with_seed(value: Any, seed: int) -> Any:
    """Replace `{seed}` in every string of a value."""
    if isinstance(value, str):
        return value.replace("{seed}", str(seed))
    if isinstance(value, dict):
        return {key: _with_seed(inner, seed) for key, inner in value.items()}
    return [_with_seed(inner, seed) for inner in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------------------------------------
# checks


def check_stages(stages: list[Stage]) -> None:
    """Parse every recipe and look for every input, whether it is here or will be made by an earlier stage.

    Raises:
        RecipeError: everything that is wrong, in one message.
    """
    errors: list[str] = []
    written: dict[str, str] = {}  # folder -> name of the stage
    for stage in stages:
        try:
            if stage.takes == RECIPE:
                section = stage.section()
                parse_recipe(stage.verb, section)
                errors += [f"{stage.where}: {fault}" for fault in _missing_inputs(plain(section), written)]
            elif stage.verb == "make" and not _is_module(stage.target):
                raise RecipeError(f"{stage.where}: no module `{stage.target}`.")
            output = stage.output_dir
        except RecipeError as error:
            errors.append(str(error))
            continue
        if output is not None:
            output = os.path.normpath(output)
            if output in written:
                errors.append(f"{stage.where}: `output_dir: {output}` is that of stage `{written[output]}` already.")
            written[output] = stage.name
    if errors:
        raise RecipeError("\n".join(dict.fromkeys(errors)))


def parse_recipe(verb: str, section: Section) -> None:
    """Parse a recipe as its stage would, and do nothing more.

    Raises:
        RecipeError: everything that is wrong with it.
    """
    if verb == "train":
        from .training_recipe import parse

        parse(section)
    elif verb == "filter":
        from ..data_filters.chain import parse as parse_chain

        parse_chain(section)
    else:
        from ..eval.evaluate import STAGE_CONFIGS, EvalConfig, SampleConfig
        from ..eval.score_samples import ScoreConfig

        if verb == "eval" and "suite" in section.values:
            from ..eval.unlearning import parse_suite

            parse_suite(section)
        elif verb == "eval" and "samples" in section.values:
            build(section, ScoreConfig)
        else:
            build(section, EvalConfig if verb == "eval" else SampleConfig, *STAGE_CONFIGS)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _missing_inputs(recipe: dict[str, Any], written: dict[str, str]) -> list[str]:
    """Name the files and folders that are neither here nor below the folder of an earlier stage."""
    faults = []
    for key in INPUTS:
        given = recipe.get(key)
        for value in given if isinstance(given, list) else [given]:
            if not isinstance(value, str) or not _is_path(value) or Path(value).exists():
                continue
            path = Path(os.path.normpath(value))
            if not any(Path(folder) in (path, *path.parents) for folder in written):
                faults.append(f"`{key}: {value}` is not here, and no earlier stage writes it.")
    return faults


def _is_path(value: str) -> bool:
    """Tell a path from an id on the hub (`owner/name`) or the name of a benchmark."""
    return value.endswith(DATA_SUFFIXES) or value.startswith((".", "/", "~")) or value.count("/") > 1
