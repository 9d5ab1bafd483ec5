"""A training recipe: the method, the data, the model and the method's own keys, checked before a model is loaded."""

import dataclasses
import difflib
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..core.errors import RecipeError
from ..core.recipe import Section, build, defaults_of, packaged_file
from ..core.run_folder import RunFolder
from ..core.trajectory import DataConfig, load_trajectories
from .console import print_error
from .model_folder import check_model
from .processes import PROCESSES

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from trl.trainer.model_config import ModelConfig
    from trl.trainer.sft_config import SFTConfig

# Method -> module, configuration, trainer. Imported when it is named: TRL costs seconds.
METHODS = {
    "glow": ("afterglow.trainers.glow", "GLOWConfig", "GLOWTrainer"),
    "sft": ("trl", "SFTConfig", "SFTTrainer"),
    "tool_rlvr": ("afterglow.trainers.tool_rlvr", "ToolRLVRConfig", "ToolRLVRTrainer"),
    "async_tool_rlvr": ("afterglow.trainers.async_tool_rlvr", "AsyncToolRLVRConfig", "AsyncToolRLVRTrainer"),
    "unlearn": ("afterglow.trainers.unlearning", "UnlearnConfig", "UnlearnTrainer"),
    "stable_unlearn": ("afterglow.trainers.stable_unlearning", "StableUnlearnConfig", "StableUnlearnTrainer"),
}
# What a trainer reads of a trajectory, and what it may read besides.
COLUMNS = ("id", "prompt", "completion")
OPTIONAL_COLUMNS = ("tools", "chat_template_kwargs", "sample_weight", "correct", "alternative")
RL_COLUMNS = ("id", "prompt", "answer")  # of a method that writes its completions itself
# Further tables of a method, read like `data`: key of its configuration -> argument of its trainer.
TABLES = {"retain_data": "retain_dataset"}
FILES = (*TABLES, "alternatives", "heldout_problems")  # keys of a method that name what it reads
PACKAGED = ("chat_template_path", "alternatives")  # keys that may name a file beside the packaged recipes
# How the processes are driven, not what is computed; and what must not be stored.
NO_IDENTITY = frozenset(
    {"use_cpu", "ddp_backend", "dataloader_pin_memory", "hub_token", "vllm_server_base_url", "vllm_server_host",
     "vllm_server_port", "vllm_server_timeout", "vllm_group_port"}
)  # fmt: skip
REFUSED = {
    "resume_from_checkpoint": "a run goes on by itself from its last checkpoint; delete the key",
    "eval_strategy": "evaluate the checkpoints with `afterglow eval`; delete the key",
}


@dataclass
class TrainStage:
    """How to train. The other keys are those of the data, of the model, and of the method."""

    method: str = field(metadata={"help": "Trainer: " + ", ".join(METHODS) + ".", "choices": list(METHODS)})


@dataclass
class Training:
    """A training recipe, parsed and checked."""

    stage: TrainStage
    data: DataConfig
    model: "ModelConfig"
    args: "SFTConfig"
    trainer: type
    config: dict[str, Any]  # resolved: what config.yaml holds
    given: list[str]  # keys that the recipe sets, and those we set for this machine
    defaults: dict[str, Any]  # of the keys of `config`

    @property
    def columns(self) -> tuple[str, ...]:
        """What its trainer reads of a row."""
        return RL_COLUMNS if self.stage.method.endswith("tool_rlvr") else COLUMNS

    @property
    def state(self) -> Any:
        """Accelerate's state: the processes, and how they are joined."""
        return self.args.distributed_state

    @property
    def inputs(self) -> dict[str, str | list[str]]:
        """What this run reads, by the name of the key that says so."""
        inputs = {"data": self.data.data, "model_name_or_path": str(self.model.model_name_or_path)}
        inputs |= {"problems": self.data.problems} if self.data.problems else {}
        return inputs | {key: source for key in FILES if (source := getattr(self.args, key, None))}


def parse(section: Section) -> Training:
    """Turn a recipe into configurations.

    Raises:
        RecipeError: everything that is wrong with it.
    """
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which TRL imports, would warn of what is no fault
    from trl.trainer.model_config import ModelConfig

    wanted = Section({k: v for k, v in section.values.items() if k == "method"}, section.lines, section.where)
    (stage,) = build(wanted, TrainStage)
    module, config_class, trainer = METHODS[stage.method]
    config_class = getattr(importlib.import_module(module), config_class)
    section = _with_defaults(section)
    stage, data, model, args = build(section, TrainStage, DataConfig, ModelConfig, config_class)
    _refuse(section, model, args)
    config: dict[str, Any] = {}
    for part in (stage, data, model, args):
        names = [f.name for f in dataclasses.fields(part) if f.init and f.name not in NO_IDENTITY]
        config |= {name: getattr(part, name) for name in names}
    for key in PACKAGED:  # the recipe's own words stay in its identity: the package lies elsewhere on another machine
        if named := getattr(args, key, None):
            setattr(args, key, packaged_file(named))
    return Training(
        stage, data, model, args, getattr(importlib.import_module(module), trainer), config, list(section.values),
        defaults_of(TrainStage, DataConfig, ModelConfig, config_class),
    )  # fmt: skip


def _with_defaults(section: Section) -> Section:
    """Set what TRL's defaults get wrong here, where the recipe is silent."""
    import torch

    defaults: dict[str, Any] = {"report_to": "none"}  # transformers would report to every tracker that is installed
    if not torch.accelerator.is_available():
        # Without `use_cpu`, several processes on a CPU train independently of each other; DeepSpeed alone must not
        # hear of it and needs gloo. TRL's default bf16 is slower than float32 on most CPUs.
        defaults |= {"bf16": False, "dataloader_pin_memory": False}
        deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
        defaults |= {"ddp_backend": "gloo"} if deepspeed else {"use_cpu": True}
    return Section(defaults | section.values, section.lines, section.where)


def _refuse(section: Section, model: "ModelConfig", args: "SFTConfig") -> None:
    given = {key for key, value in section.values.items() if value not in (None, "no", False)}
    errors = [f"{section.place(key)}: `{key}`: {mend}." for key, mend in REFUSED.items() if key in given]
    if not model.model_name_or_path:
        errors.append(f"{section.where}: `model_name_or_path` is missing. Folder of the model, or its id on the hub.")
    plain_model = type(model)()
    for key in section.values:
        of_lora = key.startswith("lora_") or key in ("use_dora", "use_rslora")
        if of_lora and not model.use_peft and getattr(model, key) != getattr(plain_model, key):
            errors.append(f"{section.place(key)}: `{key}` does nothing without `use_peft: true`.")
    errors += [f"{section.place('report_to')}: `report_to`: {error}" for error in _tracker_errors(args.report_to)]
    if errors:
        raise RecipeError("\n".join(errors))


def _tracker_errors(names: Any) -> Iterator[str]:
    """Say which trackers transformers would refuse, which it does after the model was loaded."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    here = {*get_available_reporting_integrations(), "flyte"}  # which transformers does not look for
    for name in names or ():
        if name not in INTEGRATION_TO_CALLBACK:
            near = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            yield f"{name!r} is none of {', '.join(INTEGRATION_TO_CALLBACK)}{hint}"
        elif name not in here:
            yield f"the package of {name} is not installed. `pip install {name}`, or `report_to: none`."


def check_processes(training: Training, kind: str | None = None) -> None:
    """Refuse a launch that would silently be another one than was asked for.

    Args:
        training: its arguments have set up the process group.
        kind: accelerate's distributed type once the trainer stands; before, FSDP shows as what it is built on.

    Raises:
        RecipeError: what was asked for, what it is, and how to mend it.
    """
    env = os.environ
    got = training.args.world_size
    built = kind is not None
    kind = kind or str(training.state.distributed_type.value)
    asked = max(int(env.get("WORLD_SIZE", 1)), int(env.get(PROCESSES, 1)))
    if asked != got:
        raise RecipeError(
            f"{asked} processes were asked for, this training has {got}: each would train alone, into the same folder. "
            "Delete `use_cpu: false` from the recipe and start it with `afterglow train --accelerate_config ddp`."
        )
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in env
    if by_accelerate and got == 1 and "WORLD_SIZE" not in env and env.get("MASTER_ADDR") == "127.0.0.1":
        raise RecipeError(
            "accelerate was asked for several processes and started one: `--cpu` and `MULTI_CPU` need mpirun. Use "
            "`afterglow train --accelerate_config ddp`, or `accelerate launch --multi_gpu` with "
            "ACCELERATE_USE_CPU=true. (For one process, unset MASTER_ADDR.)"
        )
    for name in ("FSDP", "DEEPSPEED"):
        is_other = kind != name if built else kind in ("NO", "MULTI_CPU")
        if env.get(f"ACCELERATE_USE_{name}") == "true" and is_other:
            raise RecipeError(
                f"{name} was asked for, and accelerate made {'DDP' if got > 1 else 'one plain process'} of it, as it "
                "does on a CPU. Use `--accelerate_config ddp`, or a machine with GPUs."
            )
    offloaded = env.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") != "none"
    optim: Any = training.args.optim
    if kind == "DEEPSPEED" and offloaded and "adam" not in optim:
        raise RecipeError(
            f"`optim: {optim.value}`: with an offloaded optimizer accelerate silently makes Adam of it. "
            "Use `optim: adamw_torch`, or `--accelerate_config zero3`."
        )
    if training.args.n_gpu > 1:
        raise RecipeError(
            f"one process sees {training.args.n_gpu} GPUs. Start it with `afterglow train` (all of them), or set "
            "CUDA_VISIBLE_DEVICES=0."
        )


def load_table(data: DataConfig, columns: tuple[str, ...] = COLUMNS) -> "Dataset":
    """Read and check every row, and keep the columns that a trainer reads.

    Raises:
        DataError: a row is wrong.
    """
    first = os.environ.get("RANK", "0") == "0"
    told = lambda row: print_error(row, "left out:") if first else None  # noqa: E731
    table = load_trajectories(data, require=columns[1:], on_invalid=told)
    wanted = [*columns, *(name for name in OPTIONAL_COLUMNS if name in table.column_names)]
    return table.select_columns(wanted)


def refuse_ignored_weights(training: Training, table: "Dataset") -> None:
    """Refuse weights that the method would not read.

    Raises:
        RecipeError: the data have some, and TRL's own trainer is asked for.
    """
    if training.stage.method == "sft" and "sample_weight" in table.column_names:
        raise RecipeError(
            "`method: sft` is TRL's trainer and ignores the column `sample_weight`. Use `method: glow` with "
            "`weighting: none`, or drop the column."
        )


def load_further_tables(training: Training) -> "dict[str, Dataset]":
    """Read and check what a trainer reads besides `data`, by the name of its argument.

    Raises:
        RecipeError: the recipe does not name one of them.
        DataError: a row is wrong.
    """
    tables = {}
    for key, argument in TABLES.items():
        if not hasattr(training.args, key):
            continue
        if not (source := getattr(training.args, key)):
            raise RecipeError(f"`{key}` is missing. Trajectories to keep, read like `data`.")
        columns = {ours: theirs for ours, theirs in training.data.columns.items() if ours in COLUMNS}
        tables[argument] = load_table(dataclasses.replace(training.data, data=source, columns=columns))
    return tables


def check(training: Training, overwrite: bool = False) -> None:
    """Check data, model and run folder, and write nothing.

    Raises:
        DataError, ModelError, RunFolderError: what would stop the run.
    """
    refuse_ignored_weights(training, load_table(training.data, training.columns))
    load_further_tables(training)
    check_the_model(training)
    if not overwrite:
        RunFolder.check(
            str(training.args.output_dir), "train", training.config, inputs=training.inputs, defaults=training.defaults
        )


def check_the_model(training: Training) -> "PreTrainedTokenizerBase":
    """Check the model of a recipe and return its tokenizer."""
    model, args = training.model, training.args
    return check_model(
        str(model.model_name_or_path),
        revision=model.model_revision,
        template_given=bool(getattr(args, "chat_template_path", None)),
    )
