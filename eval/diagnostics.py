"""`suite: diagnostics`: what one forward pass over expert trajectories says of every checkpoint of a training.

    suite: diagnostics                  output_dir: runs/diagnostics
    checkpoints: [runs/rlvr/checkpoint-*]
    data: trajectories.jsonl            max_rows: 2000

Each checkpoint reads every trajectory once. From that pass: the eighty proxies (`proxy_metrics`), RankMe and alpha-ReQ
in both definitions (`geometry`), and of a mixture of experts the pathway metrics (`pathways`). `rows.jsonl` has one
flat row per checkpoint with its `step`, so that `suite: scaling` fits and forecasts any of them. No sample is drawn.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ..core.chat_encoding import encode_chat
from ..core.checkpoint import read_checkpoint
from ..core.errors import DataError, ModelError, RecipeError
from ..core.generation import EngineConfig
from ..core.progress import progress
from ..core.recipe import plain
from ..core.routing import RouterProbabilities, find_routers
from ..core.run_folder import RunFolder, write_atomic
from ..core.token_stats import ScoredSequence, TokenStats, body_and_head, score_tokens
from . import pathways
from .geometry import RunningCovariance, describe_geometry
from .proxy_metrics import LAST_TOKENS, NAMES, SHOWN, ExpertTokens, proxy_metrics
from .suite_base import ROWS_FILE, SCORES_FILE
from .sweep import find_checkpoints
from .unlearning_data import SPEC_HELP, messages_of, read_set
from .unlearning_measure import measured, opened


@dataclass(kw_only=True)
class DiagnosticsConfig:
    """Which checkpoints read which trajectories."""

    output_dir: str = field(metadata={"help": "Folder of this run."})
    suite: str = field(metadata={"help": "diagnostics."})
    checkpoints: list[str] = field(metadata={"help": "Checkpoint folders, with wildcards: 'runs/glow/checkpoint-*'."})
    data: str = field(metadata={"help": f"Expert trajectories: prompt and completion. {SPEC_HELP}"})
    columns: dict[str, str] = field(default_factory=dict, metadata={"help": "Our column name -> the file's."})
    last_tokens: int = field(default=LAST_TOKENS, metadata={"help": "Expert tokens of each trajectory, from its end."})
    geometry_at: int | None = field(
        default=None,
        metadata={
            "help": "Token whose state stands for the sequence, counted from 1: shorter sequences are left out. "
            "Default: the last one that is read."
        },
    )
    pairs: int = field(default=500, metadata={"help": "Pairs of samples for the pathway distance."})
    max_rows: int | None = field(default=None, metadata={"help": "First trajectories only."})
    max_length: int | None = field(default=None, metadata={"help": "Cut trajectories to this many tokens."})
    token_budget: int = field(default=4096, metadata={"help": "Most tokens of one forward pass, padding included."})
    seed: int = field(default=0, metadata={"help": "Of the pairs."})

    def __post_init__(self):
        for name in ("last_tokens", "geometry_at", "pairs", "max_rows", "max_length", "token_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name} is {value}: use at least 1")


def run(config: DiagnosticsConfig, overwrite: bool = False, dry_run: bool = False) -> Path:
    """Read the trajectories with every checkpoint, or go on where a killed run stopped; returns the run's folder.

    Raises:
        RecipeError: no such checkpoint.
        DataError: a trajectory cannot be used.
        ModelError: a checkpoint cannot be read.
    """
    path, checkpoints = Path(config.output_dir), find_checkpoints(config.checkpoints, "recipe")
    rows = read_set(config.data, "data", ("prompt", "completion"), config.columns, config.max_rows)
    inputs: dict[str, str | list[str]] = {"data": config.data}
    if dry_run:
        print(yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
        print(f"{len(checkpoints)} checkpoints, {len(rows):,} trajectories. Nothing was written.")
        return path
    sequences = encode(config, read_checkpoint(next(iter(checkpoints.values()))).tokenizer, rows)
    extra = {"suite": "diagnostics", "seed": config.seed}
    with RunFolder.open(path, "eval", plain(config), inputs=inputs, overwrite=overwrite, extra=extra) as folder:
        if not folder.finished:
            found = _measure(config, folder, checkpoints, sequences)
            scores = {"diagnostics": _scores(found)}
            write_atomic(path / SCORES_FILE, json.dumps(scores, indent=1) + "\n")
            folder.finish(scores)
    show([json.loads(line) for line in (path / ROWS_FILE).read_text(encoding="utf-8").splitlines()], path)
    return path


def encode(config: DiagnosticsConfig, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> list[ScoredSequence]:
    """Encode trajectories by the chat template; the last expert tokens of each are scored.

    Raises:
        ModelError: the tokenizer has no chat template.
        DataError: nothing of a trajectory is left to score.
    """
    if not tokenizer.chat_template:
        raise ModelError(f"{tokenizer.name_or_path}: no chat template. Put `chat_template.jinja` into the folder.")
    sequences = []
    for i, row in enumerate(rows):
        completion = row["completion"]
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        chat = encode_chat(
            tokenizer, messages_of(row["prompt"]), completion, tools=row.get("tools"), max_length=config.max_length,
            include_end_token=True,
        )  # fmt: skip
        expert = np.flatnonzero(chat.assistant)
        if not len(expert):
            raise DataError(f"`data`: row {i + 1}: no token of the assistant is left. Raise `max_length`, or drop it.")
        scored = np.zeros(len(chat.input_ids), dtype=bool)
        scored[expert[-config.last_tokens :]] = True
        sequences.append(ScoredSequence(i, chat.input_ids, scored))
    return sequences


def _measure(
    config: DiagnosticsConfig, folder: RunFolder, checkpoints: dict[str, str], sequences: Sequence[ScoredSequence]
) -> dict[str, dict[str, Any]]:
    def draw(log: Any, done: set[str]) -> None:
        with progress("read trajectories", len(checkpoints)) as bar:
            for place, (name, model) in enumerate(checkpoints.items()):
                if name not in done:
                    step = name.rpartition("-")[2]
                    with opened(EngineConfig(model=model, engine="transformers")) as checkpoint:
                        row = diagnose(checkpoint.model, sequences, config)
                    log.append({"key": name, "step": int(step) if step.isdigit() else place, **row})
                bar.advance()

    return measured(folder, ROWS_FILE, list(checkpoints), draw)


def diagnose(model: Any, sequences: Sequence[ScoredSequence], config: DiagnosticsConfig) -> dict[str, Any]:
    """Return all diagnostics of one model from one pass over the sequences, as a flat row.

    Args:
        model: a causal language model.
        sequences: of `encode`.
        config: `geometry_at`, `pairs`, `token_budget`, `seed`.

    Raises:
        DataError: no sequence is as long as `geometry_at`.
        ModelError: the model's tokens cannot be scored.
    """
    vocabulary = len(body_and_head(model)[1].weight)
    routers = find_routers(model)
    top_k = int(routers[0].top_k) if routers else 0  # pyright: ignore[reportArgumentType]
    embeddings = [router.weight.detach().float().cpu().numpy() for router in routers]  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    covariance = RunningCovariance(model.get_input_embeddings().embedding_dim)
    tokens: dict[int, ExpertTokens] = {}
    ways: dict[int, np.ndarray] = {}
    smooth: dict[int, float | None] = {}
    with _Pass(model, routers) as states:
        for key, stats in score_tokens(model, sequences, token_budget=config.token_budget, entropy=True):
            i = int(str(key))
            read = int(np.flatnonzero(sequences[i].scored)[-1])  # the last scored token is not read
            row = states.next_row()
            at = config.geometry_at or read
            if at <= read:
                covariance.add(states.hidden[row, at - 1][None])
            tokens[i] = _expert(sequences[i], stats)
            if routers:
                probabilities = states.routing.mean_of(row, len(states.hidden), read).numpy()
                ways[i] = pathways.pathway(probabilities, top_k)
                smooth[i] = pathways.consistency(probabilities, embeddings, top_k)
    if not covariance.count:
        raise DataError(f"geometry_at is {config.geometry_at}: no trajectory has so many tokens")
    in_order = sorted(tokens)  # not the order of batches, which hangs on the token budget
    found = {"trajectories": len(tokens), **describe_geometry(covariance)}
    if routers:
        found["pathway_distance"] = pathways.mean_distance([ways[i] for i in in_order], config.pairs, config.seed)
        values = [value for i in in_order if (value := smooth[i]) is not None]
        found["pathway_consistency"] = float(np.mean(values)) if values else None
    return found | proxy_metrics([tokens[i] for i in in_order], vocabulary)


def _expert(sequence: ScoredSequence, stats: TokenStats) -> ExpertTokens:
    assert stats.entropy is not None and stats.confidence is not None  # asked for
    ids = np.asarray(sequence.input_ids)[np.asarray(sequence.scored)]
    columns = (stats.nll, stats.entropy, stats.rank, stats.confidence)
    return ExpertTokens(ids, *(column.double().numpy() for column in columns))


class _Pass:
    """The last layer's states of the running forward pass, and which of its rows comes next.

    `score_tokens` yields the rows of a batch in their order before it starts the next forward pass.
    """

    def __init__(self, model: Any, routers: list[torch.nn.Module]):
        self.hidden = torch.empty(0)
        self.routing = RouterProbabilities(routers)
        self._row = -1
        self._handle = body_and_head(model)[0].register_forward_hook(self._keep)

    def _keep(self, body: torch.nn.Module, args: tuple, output: Any) -> None:
        self.hidden, self._row = output.last_hidden_state.detach(), -1

    def next_row(self) -> int:
        """Return the row of the batch that belongs to what was yielded last."""
        self._row += 1
        return self._row

    def __enter__(self) -> "_Pass":
        return self

    def __exit__(self, *exc_info) -> None:
        self._handle.remove()
        self.routing.close()


def _scores(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what fits a table; a checkpoint on given texts has no interval."""
    return {
        f"{name} {key}": {"value": row[key], "low": row[key], "high": row[key], "method": "on the texts given"}
        for name, row in found.items()
        for key in SHOWN
        if row.get(key) is not None
    }


def show(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Print a few of the numbers of every checkpoint."""
    from rich.console import Console
    from rich.table import Table

    keys = [key for key in SHOWN if any(row.get(key) is not None for row in rows)]
    table = Table("checkpoint", *(key.replace("_", " ") for key in keys))
    for row in rows:
        table.add_row(row["key"], *("–" if row.get(key) is None else f"{row[key]:.4g}" for key in keys))
    console = Console()
    console.print(table)
    if not all(row["enough"] for row in rows):
        console.print(
            "Fewer than four sequences per dimension: RankMe and alpha say more of the sample than of the model."
        )
    print(f"{len(NAMES)} proxies and all else: {folder / ROWS_FILE}")
