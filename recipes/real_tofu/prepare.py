"""Prepare unlearning on the real TOFU files: a small untrained model with a tokenizer of its own, and what it learns.

    python -m afterglow.recipes.real_tofu.prepare --data $AFTERGLOW_DATA --output_dir runs/real-tofu/prepared

The model learns forget01 (two authors, 40 questions) and the 400 retained questions that TOFU evaluates, so that every
metric of the suite has its real questions. Real authors and world facts it never learns: a model of this size knows
neither, and what the suite says of them is chance.
"""

from dataclasses import dataclass, field
from pathlib import Path

from ...core.row_sources import read_rows
from ..demo.tokenizer import init_model, train_tokenizer
from ..demo_forget.world import CHAT_TEMPLATE
from ..made_folder import make_folder, real_file, run_command, write_jsonl

SETS = ("forget01_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")


@dataclass(frozen=True, kw_only=True)
class RealTofuConfig:
    """Where TOFU's files lie, and how large the model is."""

    data: str = field(default="", metadata={"help": "Folder of real data, with unlearning/tofu/*.jsonl.gz."})
    vocab_size: int = field(default=4096, metadata={"help": "Largest size of the tokenizer."})
    hidden_size: int = field(default=192, metadata={"help": "Width of the model; a multiple of 64."})
    layers: int = field(default=4, metadata={"help": "Layers of the model."})


def make_real_tofu(output_dir: str | Path, config: RealTofuConfig, overwrite: bool = False) -> Path:
    """Write `init/`, the four evaluated sets, and `full`, `forget01` and `retain` to learn from.

    Raises:
        DataError: the folder of real data lacks a file.
        RunFolderError: the folder holds something else.
    """
    for name in SETS:
        _file(config, name)
    return make_folder(output_dir, config, _write, overwrite)


def _file(config: RealTofuConfig, name: str) -> Path:
    return real_file(config.data, f"unlearning/tofu/{name}.jsonl.gz")


def _write(folder: Path, config: RealTofuConfig) -> None:
    rows = {name: [row for _, row in read_rows(_file(config, name))] for name in SETS}
    rows["forget01"], rows["retain"] = rows["forget01_perturbed"], rows["retain_perturbed"]
    rows["full"] = rows["forget01"] + rows["retain"]
    for name, of in rows.items():
        write_jsonl(folder / f"{name}.jsonl", of)
    texts = [f"user\n{row['question']}\nassistant\n{row['answer']}" for row in rows["full"]]
    tokenizer = train_tokenizer(texts, config.vocab_size, CHAT_TEMPLATE)
    tokenizer.save_pretrained(folder / "init")
    init_model(tokenizer, 0, config.hidden_size, config.layers).save_pretrained(folder / "init")


if __name__ == "__main__":
    raise SystemExit(run_command("afterglow.recipes.real_tofu.prepare", __doc__, RealTofuConfig, make_real_tofu))
