"""Prepare the run on real data: a small untrained model with a real tokenizer, and a split of GSM8K's training set.

    python -m afterglow.recipes.real.prepare --data $AFTERGLOW_DATA --output_dir runs/real/prepared

The trajectories of the run answer GSM8K's *test* problems, so the model is scored on problems of the training set that
its base model has not seen.
"""

from dataclasses import dataclass, field
from pathlib import Path

from ...core.row_sources import read_rows
from ...core.trajectory import content_hash
from ..demo.tokenizer import init_model
from ..made_folder import make_folder, real_file, run_command, write_jsonl

HELD_OUT = 500
FILES = ("problems/gsm8k_train.jsonl.gz", "tokenizers/qwen3/tokenizer_config.json")


@dataclass(frozen=True, kw_only=True)
class RealConfig:
    """Where the real data lie, and how much the base model sees."""

    data: str = field(default="", metadata={"help": "Folder of real data."})
    base_rows: int = field(default=400, metadata={"help": "Problems of the base model's training."})


def make_real(output_dir: str | Path, config: RealConfig, overwrite: bool = False) -> Path:
    """Write `init/`, `base.jsonl` (solutions written by people) and `heldout.jsonl`, whole or not at all.

    Raises:
        DataError: the folder of real data lacks a file.
        RunFolderError: the folder holds something else.
    """
    for name in FILES:
        real_file(config.data, name)
    return make_folder(output_dir, config, _write, overwrite)


def _write(folder: Path, config: RealConfig) -> None:
    from transformers import AutoTokenizer

    data = Path(config.data)
    rows = [row for _, row in read_rows(data / FILES[0])]
    write_jsonl(folder / "base.jsonl", (_base_row(row) for row in rows[: config.base_rows]))
    write_jsonl(folder / "heldout.jsonl", (_problem(row) for row in rows[-HELD_OUT:]))
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "qwen3")
    tokenizer.save_pretrained(folder / "init")
    init_model(tokenizer, seed=0, hidden_size=64, layers=4).save_pretrained(folder / "init")


def _problem(row: dict) -> dict:
    return {"problem_id": row["id"], "prompt": row["problem"], "answer": row["answer"]}


def _base_row(row: dict) -> dict:
    solution = row["solution"].split("####")[0].strip()
    completion = f"<think>\n{solution}\n</think>\n\nThe answer is \\boxed{{{row['answer']}}}."
    return _problem(row) | {"id": content_hash(row["id"], solution), "completion": completion, "source": "person"}


if __name__ == "__main__":
    raise SystemExit(run_command("afterglow.recipes.real.prepare", __doc__, RealConfig, make_real))
