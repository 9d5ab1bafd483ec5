"""Cut the texts of a corpus (MUSE, WMDP) into pieces that the unlearning trainers read: an empty prompt, and the piece.

    python -m afterglow.recipes.unlearning.corpus --source muse-bench/MUSE-News:raw:forget \
        --tokenizer muse-bench/MUSE-News_target --tokens 2048 --output_dir runs/unlearning/muse-news/forget

Texts are cut one by one, so that no piece holds two of them; with the chat template `plain.jinja` a model sees the
piece after its first token and nothing else.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import DataError
from ...core.row_sources import source_rows
from ..made_folder import make_folder, run_command, write_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECES_FILE = "pieces.jsonl"


@dataclass(frozen=True)
class CorpusConfig:
    """Which corpus, and how it is cut."""

    source: str = field(
        default="muse-bench/MUSE-News:raw:forget",
        metadata={"help": "A file of rows, or a dataset on the hub (`owner/name:subset:split`)."},
    )
    tokenizer: str = field(
        default="muse-bench/MUSE-News_target", metadata={"help": "Folder or hub id; its tokens are counted."}
    )
    column: str = field(default="text", metadata={"help": "Column of the text."})
    tokens: int = field(default=2048, metadata={"help": "Tokens of a piece."})
    shortest: int = field(default=16, metadata={"help": "A last piece of fewer tokens is left out."})
    most: int = field(default=0, metadata={"help": "Pieces to make; 0 is all."})


def cut(text: str, tokenizer: "PreTrainedTokenizerBase", tokens: int, shortest: int) -> Iterator[str]:
    """Yield a text in pieces of so many tokens, cut between the characters of two tokens: joined, they are the text."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    starts = [start for start, _ in offsets]
    for first in range(0, len(starts), tokens):
        last = starts[first + tokens] if first + tokens < len(starts) else len(text)
        if min(tokens, len(starts) - first) >= shortest:
            yield text[starts[first] if first else 0 : last]


def write_pieces(folder: Path, config: CorpusConfig) -> None:
    """Write all pieces into an existing folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    rows: list[dict] = []
    for where, row in source_rows(config.source, "train", None):
        if not isinstance(text := row.get(config.column), str):
            raise DataError(
                f"{where}: no text in column {config.column!r}; the row has {sorted(row)}. Name the column."
            )
        for piece in cut(text, tokenizer, config.tokens, config.shortest):
            prompt, completion = (
                [{"role": role, "content": said}] for role, said in (("user", ""), ("assistant", piece))
            )
            rows.append({"problem_id": f"{where}, piece {len(rows)}", "prompt": prompt, "completion": completion})
    write_jsonl(folder / PIECES_FILE, rows[: config.most or None])


def make_pieces(output_dir: str | Path, config: CorpusConfig, overwrite: bool = False) -> Path:
    """Make `output_dir`, or leave it as it is where it was made with the same configuration.

    Raises:
        DataError: the corpus cannot be read.
        RunFolderError: the folder holds something else.
    """
    return make_folder(output_dir, config, write_pieces, overwrite)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    return run_command("afterglow.recipes.unlearning.corpus", __doc__, CorpusConfig, make_pieces, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
