"""The command line: `afterglow sample | filter | train | serve | eval | compare | launch | run | report`.

Nothing heavy is imported before it is needed: `afterglow --help` answers at once.
"""

import argparse
import os
import sys
from importlib import metadata
from typing import NamedTuple

from ..core.errors import RecipeError
from .console import guarded, quieten


class Verb(NamedTuple):
    """One word of the command line."""

    takes: str
    help: str


VERBS = {
    "sample": Verb("RECIPE", "draw solutions of problems from a model"),
    "filter": Verb("RECIPE", "choose trajectories for training, and say why each other one is dropped"),
    "train": Verb("RECIPE", "train a model, on one process or many"),
    "serve": Verb("RECIPE", "serve the model of a training that samples from a vLLM server"),
    "eval": Verb("RECIPE", "sample, grade, and score: pass@k, avg@n, maj@k with 95% intervals"),
    "compare": Verb(
        "FOLDER ...", "compare evaluations with the first one (or modes of one), by problem, with intervals"
    ),
    "launch": Verb("slurm|hosts|kubernetes RECIPE", "print the script or manifest that trains on several machines"),
    "run": Verb("PIPELINE", "run several stages, skipping those that are finished"),
    "report": Verb("FOLDER", "write report.html of a finished stage or pipeline"),
    "recipes": Verb("list|show|copy", "the recipes that come with the package"),
    "doctor": Verb("[MODEL]", "what this machine can do, and what would fail later"),
}
NO_RECIPE = ("compare", "report", "recipes", "doctor", "launch")
EXAMPLES = """\
examples:
  afterglow train recipes/glow/qwen3-4b-base-openmath.yaml --learning_rate 2e-5 --dry_run
  afterglow train recipe.yaml --accelerate_config zero2 --num_processes 8
  afterglow launch slurm recipe.yaml --nodes 2 --gpus_per_node 8 > job.sbatch
  afterglow run demo/pipeline.yaml
  afterglow eval --help                      the keys of a recipe
  afterglow recipes copy glow/qwen3-4b-base-openmath.yaml mine.yaml

Any key of a recipe can be replaced by --key value. A killed command goes on when it is given again.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the words that are no recipe keys."""
    parser = argparse.ArgumentParser(
        prog="afterglow",
        description="Post-training of open-weights language models: recipes, resumable stages, honest evaluation.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"afterglow {metadata.version('afterglow')}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        sub = verbs.add_parser(name, help=verb.help.replace("%", "%%"), add_help=False, allow_abbrev=False)
        sub.add_argument("target", nargs="*" if name in ("compare", "launch") else "?")
        sub.add_argument("-h", "--help", action="store_true", dest="show_help")
        if name == "compare":
            sub.add_argument("--k", type=int, nargs="+")
            sub.add_argument("--output_dir", "--output-dir")
        if name == "report":
            sub.add_argument("--export", choices=("lm_eval", "model_card"))
        if name in NO_RECIPE:
            continue
        sub.add_argument("--dry_run", "--dry-run", action="store_true")
        if name != "serve":
            sub.add_argument("--overwrite", action="store_true")
        if name == "filter":
            sub.add_argument("--explain", metavar="ID")
        if name == "serve":
            sub.add_argument("--host", default="127.0.0.1")
            sub.add_argument("--port", type=int, default=8000)
        if name == "train":
            sub.add_argument("--server_gpus", "--server-gpus", type=int)
            sub.add_argument("--accelerate_config", "--accelerate-config")
            for number in ("num_processes", "num_machines", "machine_rank", "main_process_port"):
                sub.add_argument(f"--{number}", f"--{number.replace('_', '-')}", type=int)
            sub.add_argument("--main_process_ip", "--main-process-ip")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    options, overrides = build_parser().parse_known_args(arguments)
    quieten()
    if getattr(options, "dry_run", False):
        os.environ["HF_HUB_OFFLINE"] = "1"  # a dry run downloads nothing
    return guarded(lambda: _work(options, overrides))


def _work(options: argparse.Namespace, overrides: list[str]) -> int | None:
    verb = VERBS[options.verb]
    if options.show_help:
        from .key_help import show_help

        return show_help(options.verb, verb.takes, verb.help)
    if options.verb == "recipes":
        from .recipe_shelf import run_recipes

        return run_recipes(options.target, overrides)
    if options.verb == "doctor" and not overrides:
        from .doctor import run_doctor

        return run_doctor(options.target)
    if options.verb == "launch":
        from .cluster import run_launch

        return run_launch(options.target, overrides)
    if not options.target:
        raise RecipeError(f"afterglow {options.verb}: which {verb.takes}? See `afterglow {options.verb} --help`.")
    if options.verb in NO_RECIPE and overrides:
        raise RecipeError(f"afterglow {options.verb} takes {verb.takes} only, not {overrides[0]}.")
    if options.verb == "compare":
        from ..eval.compare import run_compare

        run_compare(options.target, options.k, options.output_dir)
        return 0
    if options.verb == "report":
        from ..eval.report import find_runs, run_report

        if options.export is None:
            print(run_report(options.target))
            return 0
        from ..eval.export import export_runs

        print(*export_runs(find_runs(options.target), options.export), sep="\n")
        return 0
    if options.verb == "run":
        from .pipeline import run_pipeline

        return run_pipeline(options.target, overrides, options.overwrite, options.dry_run)
    if options.verb == "train":
        return _train(options, overrides)
    from ..core.recipe import read_recipe

    section = read_recipe(options.target, overrides)
    if options.verb == "filter" and options.explain is not None:
        from ..data_filters.explain import show_explanation

        show_explanation(section, options.explain)
        return 0
    if options.verb == "serve":
        from .processes import count_gpus
        from .training_recipe import parse
        from .vllm_server import serve

        return serve(parse(section), count_gpus(), options.host, options.port, options.dry_run)
    if options.verb == "filter":
        from ..data_filters.chain import run
    elif options.verb == "eval":
        from ..eval.evaluate import run
    else:
        from ..eval.evaluate import run_sample as run
    folder = run(section, overwrite=options.overwrite, dry_run=options.dry_run)
    if options.verb == "eval" and not options.dry_run:
        from .model_card import add_evaluation

        add_evaluation(folder)
    return 0


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    from ..core.recipe import read_recipe
    from .processes import CPU, SINGLE, Machines, choose_setup, count_gpus, hide_gpus, launch_training, use_one_gpu

    section = read_recipe(options.target, overrides)  # the cheap mistakes first
    if options.accelerate_config == CPU:
        hide_gpus()
    gpus = count_gpus()
    machines = Machines(
        options.num_machines or 1, options.machine_rank or 0, options.main_process_ip or "",
        options.main_process_port or 0,
    )  # fmt: skip
    server = None
    if options.server_gpus is not None:
        from .training_recipe import parse
        from .vllm_server import beside_training

        server, gpus, more = beside_training(parse(section), options.server_gpus)
        overrides = [*overrides, *more]
    setup = choose_setup(options.accelerate_config, options.num_processes, gpus, machines)
    if (setup.name != SINGLE or server) and not options.dry_run:
        return launch_training(options.target, overrides, setup, gpus, options.overwrite, server)
    if gpus > 1:
        use_one_gpu()
    from .train import run

    run(section, options.overwrite, options.dry_run, setup)
    return 0


if __name__ == "__main__":
    sys.exit(main())
