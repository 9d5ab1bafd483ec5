"""What accelerate starts: train a model as one recipe says, in one process or as one of many.

    afterglow train RECIPE                                             starts accelerate where it is needed
    accelerate launch --config_file X -m afterglow.launch.train RECIPE the same by hand
    python -m afterglow.launch.train RECIPE                            one process

The run folder is the model's folder: config.json, weights, tokenizer and chat template stand in `output_dir` itself,
so `model: runs/x` is what evaluation and vLLM take. Checkpoints (`checkpoint-*`) are below it; the same command goes on
from the last whole one. With LoRA, `output_dir` holds the merged model and `adapter/` the adapter.
"""

import os
import sys
from pathlib import Path

from ..core.child_process import end_with_parent
from ..core.errors import RecipeError
from ..core.recipe import Section, read_recipe
from .console import guarded, quieten
from .processes import Setup
from .training_recipe import check, check_processes, parse


def run(section: Section, overwrite: bool = False, dry_run: bool = False, setup: Setup | None = None) -> Path:
    """Train as a recipe says, or go on where a killed run stopped, and return the folder of the model.

    Recipe, data, model folder and run folder are checked before the model is loaded.

    Args:
        section: what `core.recipe.read_recipe` returned.
        overwrite: delete what the folder holds and start again.
        dry_run: check everything, show what would be done, and write nothing.
        setup: the processes that a dry run computes for.

    Raises:
        RecipeError: a key, a value or the launch is wrong.
        DataError: a row is wrong.
        ModelError: the model folder is incomplete or has no chat template.
        RunFolderError: the folder belongs to another recipe, other data, or another number of processes.
    """
    training = parse(section)
    if dry_run:
        from .dry_run import show_plan

        show_plan(training, setup or Setup(), overwrite)
        return Path(str(training.args.output_dir))
    from .training_run import run_training

    check_processes(training)
    return run_training(training, overwrite)


def main(arguments: list[str] | None = None) -> int:
    """Run `python -m afterglow.launch.train RECIPE [--key value ...] [--overwrite] [--dry_run]`."""
    quieten()
    words = list(sys.argv[1:] if arguments is None else arguments)
    flags = {name: name in words for name in ("--overwrite", "--dry_run", "--check")}
    words = [word for word in words if word not in flags]

    if "LOCAL_RANK" in os.environ:
        end_with_parent()  # a launcher that is killed cannot end its processes, and other machines would wait for it

    def work() -> None:
        if not words or words[0].startswith("-"):
            raise RecipeError("usage: python -m afterglow.launch.train RECIPE.yaml [--key value ...]")
        section = read_recipe(words[0], words[1:])
        if flags["--check"]:
            check(parse(section), flags["--overwrite"])
        else:
            run(section, flags["--overwrite"], flags["--dry_run"])

    return guarded(work)


if __name__ == "__main__":
    raise SystemExit(main())
