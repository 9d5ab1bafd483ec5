"""`suite: path_dependence`: unlearn several models that learned the same in other orders, and compare where they end.

    suite: path_dependence                output_dir: runs/audit
    forget: forget_perturbed.jsonl        probes: {math: math.jsonl, facts: retain.jsonl}
    paths:
      - {order: [forget, facts, math], method: npo, seed: 0, start: runs/p1, run: runs/p1-npo-0}
      - {order: [facts, math, forget], method: npo, seed: 0, start: runs/p2, run: runs/p2-npo-0}

`start` is the model before unlearning, `run` the folder of the training that unlearned it, with its checkpoints
(`save_strategy: steps`). Every checkpoint is probed once (`rows.jsonl`), then `audit.json` has the eight parts of the
report and `scores.json` what fits a table. Nothing is trained here.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from ..core.checkpoint import read_checkpoint
from ..core.errors import ModelError, RecipeError
from ..core.progress import progress
from ..core.recipe import Section, build, plain
from ..core.run_folder import RunFolder, write_atomic
from ..core.token_stats import ScoredSequence, score_tokens
from .path_dependence import AUDIT_FILE, audit
from .path_report import show
from .suite_base import NO_MODEL, ROWS_FILE, SCORES_FILE
from .unlearning_data import SPEC_HELP, Text, encode_answer, read_set, text_of
from .unlearning_measure import measured

FURTHER = {
    "paraphrase": "paraphrased_answer",
    "alternative": "alternative",
}  # kind of answer -> column of the forget set
# Keys of a training recipe that may differ between the paths of one method: everything else must be the same.
MAY_DIFFER = {"model_name_or_path", "output_dir", "seed", "data_seed", "run_name"}


@dataclass(kw_only=True)
class PathEntry:
    """One unlearning run."""

    order: list[str] = field(metadata={"help": "Stages in the order in which the model learned them."})
    method: str = field(metadata={"help": "Name of the unlearning method: paths of one method are compared."})
    start: str = field(metadata={"help": "The model before unlearning."})
    run: str = field(metadata={"help": "Folder of its unlearning, with checkpoint-N folders."})
    seed: int = field(default=0, metadata={"help": "Seed of the unlearning."})

    @property
    def path(self) -> str:
        """What names the path."""
        return " > ".join(self.order)


@dataclass(kw_only=True)
class PathAuditConfig:
    """Which runs, and what they are asked."""

    output_dir: str = field(metadata={"help": "Folder of this run."})
    suite: str = field(metadata={"help": "path_dependence."})
    paths: list[dict[str, Any]] = field(
        metadata={"help": "One mapping per unlearning run: order, method, start, run, seed."}
    )
    forget: str = field(
        metadata={
            "help": "Forget set: question, answer, and, one or several each, paraphrased_answer and alternative (what "
            f"the model might say instead). {SPEC_HELP}"
        }
    )
    probes: dict[str, str] = field(
        default_factory=dict, metadata={"help": "Name of another stage -> questions and answers that it taught."}
    )
    columns: dict[str, str] = field(default_factory=dict, metadata={"help": "Our column name -> the file's."})
    forget_stage: str = field(default="forget", metadata={"help": "How `order` calls the stage that is unlearned."})
    retrained: str = field(default=NO_MODEL, metadata={"help": "A model retrained without it, for the distance to it."})
    target: float = field(default=1.0, metadata={"help": "Forget score in nats per token whose steps are reported."})
    depth_threshold: float = field(default=0.5, metadata={"help": "Depth index from which forgetting is called deep."})
    max_rows: int | None = field(default=None, metadata={"help": "First rows of each set: for smoke runs."})
    token_budget: int = field(default=4096, metadata={"help": "Most tokens of one forward pass, padding included."})

    def __post_init__(self):
        self.entries = [
            build(Section(item, {}, f"paths, entry {i}"), PathEntry)[0] for i, item in enumerate(self.paths, 1)
        ]
        if len(self.entries) < 2:
            raise RecipeError("paths has fewer than two entries: there is nothing to compare")
        keys = [(entry.path, entry.method, entry.seed) for entry in self.entries]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise RecipeError(f"paths: {min(twice)} stands twice; one entry per order, method and seed")
        for entry in self.entries:
            if self.forget_stage not in entry.order:
                raise RecipeError(f"paths: order {entry.order} has no stage {self.forget_stage!r} (forget_stage)")


class Probe(NamedTuple):
    """A checkpoint that is probed."""

    key: str
    entry: PathEntry | None  # None: the retrained model
    step: int
    folder: str


def run(config: PathAuditConfig, overwrite: bool = False, dry_run: bool = False) -> Path:
    """Probe every checkpoint, or go on where a killed run stopped, and return the run's folder.

    Raises:
        RecipeError: runs of one method were trained differently, or have no common checkpoints.
        DataError: a row cannot be used.
        ModelError: a checkpoint cannot be read.
    """
    path = Path(config.output_dir)
    check_same_training(config.entries)
    probes = list(_probes(config))
    sets = _read(config)
    inputs: dict[str, str | list[str]] = {"forget": config.forget, **config.probes}
    if dry_run:
        print(yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
        print(f"{len(probes)} checkpoints, {sum(map(len, sets.values())):,} questions each. Nothing was written.")
        return path
    tokenizer = read_checkpoint(config.entries[0].start).tokenizer
    texts = _encode(tokenizer, sets)
    extra = {"suite": "path_dependence", "seeds": sorted({entry.seed for entry in config.entries})}
    with RunFolder.open(path, "eval", plain(config), inputs=inputs, overwrite=overwrite, extra=extra) as folder:
        if not folder.finished:
            rows = _probe_all(folder, probes, texts, config.token_budget)
            paths = [_with_entry(rows[probe.key], probe) for probe in probes if probe.entry]
            control = next((rows[probe.key] for probe in probes if probe.entry is None), None)
            found = audit(paths, config.forget_stage, config.target, control, config.depth_threshold)
            write_atomic(path / AUDIT_FILE, json.dumps(found, indent=1) + "\n")
            scores = {"path_dependence": _scores(found)}
            write_atomic(path / SCORES_FILE, json.dumps(scores, indent=1) + "\n")
            folder.finish(scores)
    show(json.loads((path / AUDIT_FILE).read_text(encoding="utf-8")), path)
    return path


def _read(config: PathAuditConfig) -> dict[str, list[dict[str, Any]]]:
    specs = {"forget": config.forget, **config.probes}
    return {
        name: read_set(spec, name, ("question", "answer"), config.columns, config.max_rows)
        for name, spec in specs.items()
    }


def check_same_training(entries: Sequence[PathEntry]) -> None:
    """Refuse runs of one method whose recipes or data differ: their difference would not be the path's.

    A folder that `afterglow train` did not write has no recipe to compare and is taken as it is.

    Raises:
        RecipeError: names the key and both runs.
    """
    seen: dict[str, tuple[str, dict[str, Any]]] = {}
    for entry in entries:
        config, manifest = Path(entry.run) / "config.yaml", Path(entry.run) / "manifest.json"
        if not config.is_file() or not manifest.is_file():
            continue
        recipe = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
        data = json.loads(manifest.read_text(encoding="utf-8")).get("data") or {}
        facts = {key: value for key, value in recipe.items() if key not in MAY_DIFFER}
        facts |= {f"content of {key}": value for key, value in data.items() if "model" not in key}
        other, theirs = seen.setdefault(entry.method, (entry.run, facts))
        if differing := [key for key in sorted({*facts, *theirs}) if facts.get(key) != theirs.get(key)]:
            key = differing[0]
            raise RecipeError(
                f"paths: {other} and {entry.run} are both {entry.method}, but `{key}` is {theirs.get(key)!r} in one "
                f"and {facts.get(key)!r} in the other. An audit compares paths under the same unlearning."
            )


def _probes(config: PathAuditConfig) -> Iterator[Probe]:
    """List the checkpoints at the steps that all runs of a method have, the start included."""
    found = {id(entry): _checkpoints(entry) for entry in config.entries}
    for entry in config.entries:
        alike = [set(found[id(other)]) for other in config.entries if other.method == entry.method]
        common = sorted(set.intersection(*alike))
        if not common:
            raise RecipeError(f"paths: the runs of {entry.method} have no checkpoint at a common step")
        name = f"{entry.path}|{entry.method}|{entry.seed}"
        yield Probe(f"{name}|0", entry, 0, entry.start)
        yield from (Probe(f"{name}|{step}", entry, step, str(found[id(entry)][step])) for step in common)
    if config.retrained != NO_MODEL:
        yield Probe("retrained", None, 0, config.retrained)


def _checkpoints(entry: PathEntry) -> dict[int, Path]:
    folders = {
        int(folder.name.removeprefix("checkpoint-")): folder
        for folder in Path(entry.run).glob("checkpoint-*")
        if folder.name.removeprefix("checkpoint-").isdigit()
    }
    if not folders:
        raise RecipeError(
            f"paths: {entry.run} has no checkpoint-N folder. Train it with `save_strategy: steps`, `save_steps: 5` or "
            "so, and without `save_total_limit`."
        )
    return folders


def _encode(tokenizer: Any, sets: dict[str, list[dict[str, Any]]]) -> list[Text]:
    texts = []
    for name, rows in sets.items():
        for i, row in enumerate(rows):
            texts.append(encode_answer(tokenizer, f"{name}/{i}/answer", row["question"], text_of(row["answer"])))
            if name == "forget":
                for kind, column in FURTHER.items():
                    given = row.get(column)
                    for j, other in enumerate(given if isinstance(given, list) else [given] if given else []):
                        key = f"{name}/{i}/{kind}/{j}"
                        texts.append(encode_answer(tokenizer, key, row["question"], text_of(other)))
    return texts


def _probe_all(
    folder: RunFolder, probes: Sequence[Probe], texts: Sequence[Text], token_budget: int
) -> dict[str, dict[str, Any]]:
    def draw(log: Any, done: set[str]) -> None:
        start: tuple[str, dict[str, torch.Tensor]] = ("", {})
        with progress("probe checkpoints", len(probes)) as bar:
            for probe in probes:
                if probe.key not in done:
                    if probe.entry and start[0] != probe.entry.start:
                        start = (probe.entry.start, _parameters(_load(probe.entry.start)))
                    model = _load(probe.folder)
                    row = probe_model(model, texts, token_budget)
                    row["distance"] = _distance(_parameters(model), start[1]) if probe.entry else None
                    row["grad_norm"] = _gradient_norm(Path(probe.folder))
                    log.append({"key": probe.key, **row})
                bar.advance()

    return measured(folder, ROWS_FILE, [probe.key for probe in probes], draw)


def _load(model: str) -> Any:
    """Load a checkpoint, adapters included (transformers puts them on their base model)."""
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    except (OSError, ValueError) as error:
        raise ModelError(f"{model}: its weights could not be loaded: {error}") from error
    return loaded.to("cuda") if torch.cuda.is_available() else loaded


def _parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}


def _distance(now: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float | None:
    """||theta_t - theta_0||; None where the names differ, as with adapters."""
    if now.keys() != start.keys():
        return None
    return float(sum(float((now[name].double() - start[name].double()).square().sum()) for name in now) ** 0.5)


def _gradient_norm(folder: Path) -> float | None:
    """Return the gradient's length in the last step that the checkpoint's training logged; None where none is known."""
    state = folder / "trainer_state.json"
    if not state.is_file():
        return None
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    return next((entry["grad_norm"] for entry in reversed(history) if "grad_norm" in entry), None)


def probe_model(model: Any, texts: Sequence[Text], token_budget: int) -> dict[str, Any]:
    """Return what a row of the audit needs of one model: mean log-probabilities per token, and the entropy.

    Args:
        model: a causal language model.
        texts: keys `forget/i/answer`, `forget/i/paraphrase/j`, `forget/i/alternative/j`, and `<stage>/i/answer`.
        token_budget: most tokens of a forward pass.
    """
    sequences = [ScoredSequence(text.key, text.input_ids, text.words) for text in texts]
    found = {
        str(key): (-stats.nll.double().mean().item(), stats.entropy.mean().item() if stats.entropy is not None else 0.0)
        for key, stats in score_tokens(model, sequences, token_budget=token_budget, entropy=True, compiled=False)
    }
    questions: dict[str, list[float]] = {}
    stages: dict[str, list[float]] = {}
    alternatives: list[float] = []
    for text in texts:
        stage, i, kind = text.key.split("/", 2)
        if kind.startswith("alternative"):
            alternatives.append(found[text.key][0])
        elif stage == "forget":
            questions.setdefault(i, []).append(found[text.key][0])
        else:
            stages.setdefault(stage, []).append(found[text.key][0])
    paraphrases = [value for values in questions.values() for value in values[1:]]
    return {
        "answer": float(np.mean([values[0] for values in questions.values()])),
        "paraphrase": float(np.mean(paraphrases)) if paraphrases else None,
        "paraphrase_variance": float(np.var(paraphrases)) if paraphrases else None,
        "alternative": float(np.mean(alternatives)) if alternatives else None,
        "forget": list(questions.values()),
        "stages": {name: float(np.mean(values)) for name, values in stages.items()},
        "probes": [found[text.key][0] for text in texts],
        "entropy": float(np.mean([found[text.key][1] for text in texts if text.key.endswith("/answer")])),
    }


def _with_entry(row: dict[str, Any], probe: Probe) -> dict[str, Any]:
    entry = probe.entry
    names = ("path", "order", "method", "seed")
    return row | {name: getattr(entry, name) for name in names} | {"step": probe.step}


def _scores(found: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of the last step that fit a table; a spread over the given paths has no interval."""
    scores: dict[str, Any] = {}
    for method, of_method in found.items():
        for name, points in of_method["spread"].items():
            value = points[-1]["spread"]
            scores[f"{method}_{name}_spread"] = {
                "value": value, "low": value, "high": value, "method": "max - min over the paths given",
                **{key: points[-1][key] for key in ("ratio", "p_value")},
            }  # fmt: skip
        if of_method["recency_index"] is not None:
            index = of_method["recency_index"]
            scores[f"{method}_recency_index"] = {"value": index, "low": index, "high": index, "method": "Spearman"}
    return scores
