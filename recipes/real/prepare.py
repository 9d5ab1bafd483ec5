"""Prepare the run on real data: a small untrained model with a real tokenizer, and a split of GSM8K's training set.

    python -m afterglow.recipes.real.prepare --data $AFTERGLOW_DATA --output_dir runs/real/prepared

The trajectories of the run answer GSM8K's *test* problems, so the model is scored on problems of the training set that
its base model has not seen.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from ...core.errors import AfterglowError, DataError
from ...core.trajectory import content_hash, read_rows
from ..demo.tokenizer import init_model
from ..made_folder import write_jsonl

HELD_OUT = 500
FILES = ("problems/gsm8k_train.jsonl.gz", "tokenizers/qwen3/tokenizer_config.json")


def prepare(data: Path, output_dir: Path, base_rows: int) -> None:
    """Write `init/`, `base.jsonl` (solutions written by people) and `heldout.jsonl`, whole or not at all.

    Raises:
        DataError: the folder of real data lacks a file.
    """
    from transformers import AutoTokenizer

    for name in FILES:
        if not (data / name).exists():
            raise DataError(f"{data / name}: no such file. AFTERGLOW_DATA must name the folder that holds {FILES}.")
    rows = [row for _, row in read_rows(data / FILES[0])]
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}-", dir=output_dir.parent))
    try:
        write_jsonl(partial / "base.jsonl", (_base_row(row) for row in rows[:base_rows]))
        write_jsonl(partial / "heldout.jsonl", (_problem(row) for row in rows[-HELD_OUT:]))
        tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "qwen3")
        tokenizer.save_pretrained(partial / "init")
        init_model(tokenizer, seed=0, hidden_size=64, layers=4).save_pretrained(partial / "init")
        partial.chmod(0o755)
        os.replace(partial, output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _problem(row: dict) -> dict:
    return {"problem_id": row["id"], "prompt": row["problem"], "answer": row["answer"]}


def _base_row(row: dict) -> dict:
    solution = row["solution"].split("####")[0].strip()
    completion = f"<think>\n{solution}\n</think>\n\nThe answer is \\boxed{{{row['answer']}}}."
    return _problem(row) | {"id": content_hash(row["id"], solution), "completion": completion, "source": "person"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m afterglow.recipes.real.prepare", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="Folder of real data.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder to make.")
    parser.add_argument("--base_rows", type=int, default=400, help="Problems of the base model's training.")
    values = parser.parse_args(arguments)
    try:
        if not (values.output_dir / "heldout.jsonl").exists():
            prepare(values.data, values.output_dir, values.base_rows)
    except AfterglowError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{values.output_dir}: {', '.join(sorted(path.name for path in values.output_dir.iterdir()))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
