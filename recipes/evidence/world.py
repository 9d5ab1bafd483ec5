"""Make the data of the small studies: chains on some of the demo's families of problems, held-out problems of all.

    python -m afterglow.recipes.evidence.world --output_dir runs/evidence/world --seed 0

The demo's base model has seen every family. Teachers solve problems of four families only, so that two things can be
asked of a model that learned from them: what it gained on these, and what became of what it knew before (`unseen`: the
other four, its out-of-domain set, where the base model is neither at 0 nor at 100%). Right and wrong chains come from
the same styles in the same shares: correctness is not length by another name.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from ..demo.problems import IN_DOMAIN, Problem, problem_stream
from ..demo.teachers import Teacher, branching, stepwise, terse
from ..demo.world import WorldConfig, make_trajectories
from ..made_folder import make_folder, run_command, write_jsonl

SEEN = ("keeping", "packing", "more_than", "reading")


@dataclass(frozen=True)
class EvidenceConfig:
    """Size of the data."""

    seed: int = field(default=0, metadata={"help": "Decides every file; that of the demo's world."})
    train_problems: int = field(default=250, metadata={"help": "Problems of the seen families that teachers solve."})
    accuracy: float = field(default=0.5, metadata={"help": "How often each teacher ends right."})
    heldout_seen: int = field(default=200, metadata={"help": "Held-out problems of the families in training."})
    heldout_unseen: int = field(default=200, metadata={"help": "Held-out problems of the others."})


def take(problems: Iterator[Problem], seen: bool, count: int) -> list[Problem]:
    """Return the first problems of the seen families, or of the others."""
    return list(islice((problem for problem in problems if (problem.family in SEEN) == seen), count))


def write_world(folder: Path, config: EvidenceConfig) -> None:
    """Write all files into an existing folder."""
    known = problem_stream(IN_DOMAIN, f"{config.seed}/train", heldout=False)
    after_the_base = islice(known, WorldConfig().pretrain_problems, None)
    teachers = tuple(Teacher(style.__name__, style, accuracy=config.accuracy) for style in (terse, stepwise, branching))
    train = take(after_the_base, True, config.train_problems)
    write_jsonl(folder / "trajectories.jsonl", make_trajectories(train, teachers, config.seed))
    for name, seen, count in (("seen", True, config.heldout_seen), ("unseen", False, config.heldout_unseen)):
        held = problem_stream(IN_DOMAIN, f"{config.seed}/heldout", heldout=True)
        write_jsonl(folder / f"problems_{name}.jsonl", (problem.row() for problem in take(held, seen, count)))


def make_world(output_dir: str | Path, config: EvidenceConfig, overwrite: bool = False) -> Path:
    """Make the data in `output_dir`, or leave them as they are where they were made with the same configuration.

    Raises:
        RunFolderError: the folder holds something else.
    """
    return make_folder(output_dir, config, write_world, overwrite)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    return run_command("afterglow.recipes.evidence.world", __doc__, EvidenceConfig, make_world, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
