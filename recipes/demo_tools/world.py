"""Make the world of the tools demo: problems, trajectories with and without tools, a tokenizer, an untrained model.

    python -m afterglow.recipes.demo_tools.world --output_dir runs/demo-tools/world --seed 0

The same arguments give the same files, byte for byte. The folder appears whole or not at all; where it is already
complete, nothing is done.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from ...core.tool_protocol import TOOL_NAME, TOOLS
from ..demo.problems import Problem, problem_stream
from ..made_folder import make_folder, run_command, write_jsonl
from .problems import LARGE, SMALL
from .teachers import solve_in_head, solve_with_tools

TEMPLATE = Path(__file__).with_name("template.jinja").read_text(encoding="utf-8")
# The frame of a call and the tool's description are one token each: to be learnt are when to call, and with what.
PHRASES = (TOOLS[0]["function"]["description"], f'{{"name": "{TOOL_NAME}", "arguments": {{"code": "', '"}}')


@dataclass(frozen=True)
class WorldConfig:
    """Size of the world. A problem of one set is in no other set."""

    seed: int = field(default=0, metadata={"help": "Decides every file."})
    tools_large: int = field(default=5760, metadata={"help": "Large problems that teachers solve with tools offered."})
    tools_small: int = field(default=640, metadata={"help": "Small ones with tools offered, mostly not used."})
    text_small: int = field(default=6400, metadata={"help": "Small problems solved without tools."})
    rl_large: int = field(default=600, metadata={"help": "Large problems of the reinforcement learning."})
    rl_small: int = field(default=100, metadata={"help": "Small ones of it, without tools."})
    heldout_large: int = field(default=100, metadata={"help": "Held-out large problems."})
    heldout_small: int = field(default=100, metadata={"help": "Held-out small problems."})
    vocab_size: int = field(default=640, metadata={"help": "Largest size of the tokenizer."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the model; a multiple of 64."})
    layers: int = field(default=3, metadata={"help": "Layers of the model."})


def make_problems(config: WorldConfig) -> dict[str, list[Problem]]:
    """Draw the disjoint sets of problems, by the name of the setting that holds their number."""
    streams = {
        ("small", False): problem_stream(SMALL, f"{config.seed}/small", heldout=False),
        ("large", False): problem_stream(LARGE, f"{config.seed}/large", heldout=False),
        ("small", True): problem_stream(SMALL, f"{config.seed}/heldout-small", heldout=True),
        ("large", True): problem_stream(LARGE, f"{config.seed}/heldout-large", heldout=True),
    }
    names = ("tools_large", "tools_small", "text_small", "rl_large", "rl_small", "heldout_large", "heldout_small")
    return {
        name: list(islice(streams[name.rpartition("_")[2], name.startswith("heldout")], getattr(config, name)))
        for name in names
    }


def chat_texts(rows: Iterable[dict]) -> Iterator[str]:
    """Yield the text that the tokenizer learns its words from, tools block and calls included."""
    from transformers.utils.chat_template_utils import render_jinja_template

    for row in rows:
        chat = [*row["prompt"], *row["completion"]]
        texts, _ = render_jinja_template([chat], tools=row["tools"], chat_template=TEMPLATE)
        yield texts[0]


def write_world(folder: Path, config: WorldConfig) -> None:
    """Write all files of the world into an existing folder."""
    from ..demo.tokenizer import init_model, train_tokenizer

    sets, seed = make_problems(config), str(config.seed)
    with_tools = [solve_with_tools(problem, seed) for name in ("tools_large", "tools_small") for problem in sets[name]]
    text = [solve_in_head(problem) for problem in sets["text_small"]]
    write_jsonl(folder / "trajectories.jsonl", with_tools + text)
    write_jsonl(folder / "problems_large.jsonl", (problem.row() for problem in sets["heldout_large"]))
    write_jsonl(folder / "problems_small.jsonl", (problem.row() for problem in sets["heldout_small"]))
    for_rl = [(problem, TOOLS) for problem in sets["rl_large"]] + [(problem, None) for problem in sets["rl_small"]]
    write_jsonl(folder / "problems_rl.jsonl", (problem.row() | {"tools": tools} for problem, tools in for_rl))

    tokenizer = train_tokenizer(chat_texts([*with_tools[:400], *text[:400]]), config.vocab_size, TEMPLATE, PHRASES)
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
    return run_command("afterglow.recipes.demo_tools.world", __doc__, WorldConfig, make_world, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
