"""Make the demo world: problems, teachers' trajectories, a tokenizer and an untrained model, all from one seed.

    python -m afterglow.recipes.demo.world --output_dir runs/demo/world --seed 0

The same arguments give the same files, byte for byte. The folder appears whole or not at all; where it is already
complete, nothing is done.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from ..made_folder import make_folder, run_command, write_jsonl
from .problems import IN_DOMAIN, OUT_OF_DOMAIN, Problem, problem_stream
from .teachers import PLAIN, TEACHERS, Teacher, solve


@dataclass(frozen=True)
class WorldConfig:
    """Size of the world. A problem of one set is in no other set."""

    seed: int = field(default=0, metadata={"help": "Decides every file."})
    pretrain_problems: int = field(default=5500, metadata={"help": "Problems of the base model's training."})
    train_problems: int = field(default=2200, metadata={"help": "Problems that the teachers solve."})
    heldout_id: int = field(default=200, metadata={"help": "Held-out problems of the same families."})
    heldout_ood: int = field(default=100, metadata={"help": "Problems of unseen families, longer or larger."})
    vocab_size: int = field(default=640, metadata={"help": "Largest size of the tokenizer."})
    hidden_size: int = field(default=192, metadata={"help": "Width of the model; a multiple of 64."})
    layers: int = field(default=2, metadata={"help": "Layers of the model."})


def make_problems(config: WorldConfig) -> dict[str, list[Problem]]:
    """Draw the four disjoint sets of problems: pretrain, train, heldout_id, heldout_ood."""
    known = problem_stream(IN_DOMAIN, f"{config.seed}/train", heldout=False)
    held = problem_stream(IN_DOMAIN, f"{config.seed}/heldout", heldout=True)
    unseen = problem_stream(OUT_OF_DOMAIN, f"{config.seed}/ood", heldout=None)
    return {
        "pretrain": list(islice(known, config.pretrain_problems)),
        "train": list(islice(known, config.train_problems)),
        "heldout_id": list(islice(held, config.heldout_id)),
        "heldout_ood": list(islice(unseen, config.heldout_ood)),
    }


def make_trajectories(problems: list[Problem], teachers: tuple[Teacher, ...], seed: int) -> Iterator[dict]:
    """Let the teachers solve the problems."""
    for problem in problems:
        for teacher in teachers:
            if row := solve(problem, teacher, str(seed)):
                yield row


def chat_texts(rows: Iterable[dict]) -> Iterator[str]:
    """Yield the text that the tokenizer learns its words from."""
    for row in rows:
        yield f"user\n{row['prompt'][0]['content']}\nassistant\n{row['completion'][0]['content']}"


def write_world(folder: Path, config: WorldConfig) -> None:
    """Write all files of the world into an existing folder."""
    from .tokenizer import init_model, train_tokenizer

    sets = make_problems(config)
    pretrain = list(make_trajectories(sets["pretrain"], (PLAIN,), config.seed))
    trajectories = list(make_trajectories(sets["train"], TEACHERS, config.seed))
    write_jsonl(folder / "pretrain.jsonl", pretrain)
    write_jsonl(folder / "trajectories.jsonl", trajectories)
    for name in ("train", "heldout_id", "heldout_ood"):
        write_jsonl(folder / f"problems_{name}.jsonl", (problem.row() for problem in sets[name]))

    tokenizer = train_tokenizer(chat_texts(pretrain[:2000] + trajectories[:6000]), config.vocab_size)
    model = init_model(tokenizer, config.seed, config.hidden_size, config.layers)
    tokenizer.save_pretrained(folder / "init")
    model.save_pretrained(folder / "init")


def make_world(output_dir: str | Path, config: WorldConfig, overwrite: bool = False) -> Path:
    """Make the world in `output_dir`, or leave it as it is where it was made with the same configuration.

    Raises:
        RunFolderError: the folder holds something else.
    """
    return make_folder(output_dir, config, write_world, overwrite)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    return run_command("afterglow.recipes.demo.world", __doc__, WorldConfig, make_world, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
