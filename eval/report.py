"""`afterglow report FOLDER`: one self-contained page about all run folders below a folder.

Nothing is loaded from the network, and nothing is computed that is not in the run folders: scores with intervals,
filter steps, losses, a few samples, and what it takes to believe and repeat them.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from ..core.errors import RunFolderError
from ..core.run_folder import write_atomic
from .report_diagnostics import describe_diagnostics, describe_scaling
from .report_results import Run, describe_filter, describe_tasks, describe_training
from .report_samples import examples, read_samples
from .report_sweep import describe_sweeps
from .report_unlearning import describe_unlearning, is_suite
from .sampling import SAMPLES_FILE
from .scores import SCORES_FILE

REPORT_FILE = "report.html"


def run_report(folder: str | Path) -> Path:
    """Write report.html into a folder, about the run folders in and below it, and return its path.

    Raises:
        RunFolderError: there is no run folder.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    folder = Path(folder)
    runs = find_runs(folder)
    environment = Environment(
        loader=PackageLoader("afterglow.eval"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    evaluations = [
        run for run in runs if run.stage == "eval" and not is_suite(run) and (run.path / SCORES_FILE).exists()
    ]
    samples = {run.name: read_samples(run.path / SAMPLES_FILE) for run in evaluations}
    page = environment.get_template("report.html.jinja").render(
        title=folder.resolve().name,
        when=_date(max(run.manifest["finished"] or run.manifest["started"] for run in runs)),
        tasks=list(describe_tasks(evaluations, samples)),
        unlearning=describe_unlearning(runs),
        scaling=list(describe_scaling(runs)),
        diagnostics=list(describe_diagnostics(runs)),
        sweeps=list(describe_sweeps(folder)),
        filters=[describe_filter(run) for run in runs if run.stage == "filter" and (run.path / "steps.json").exists()],
        trainings=[describe_training(run) for run in runs if run.stage == "train"],
        examples=[
            {"run": run, "task": task, "samples": list(examples(found))}
            for run, tasks in samples.items() for task, found in tasks.items()
        ],
        provenance=[_provenance(run) for run in runs],
        pipeline=_pipeline(folder),
    )  # fmt: skip
    write_atomic(folder / REPORT_FILE, page)
    return folder / REPORT_FILE


def find_runs(folder: str | Path) -> list[Run]:
    """Return the run folders in and below a folder, in the order in which they were started.

    Raises:
        RunFolderError: there is none.
    """
    runs = []
    for path in (folder := Path(folder)).rglob("manifest.json"):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if "stage" in manifest:
            name = str(path.parent.relative_to(folder)) if path.parent != folder else folder.resolve().name
            runs.append(Run(name, path.parent, manifest))
    if not runs:
        raise RunFolderError(f"{folder}: no run folder in it or below (no manifest.json). Give the folder of a run.")
    return sorted(runs, key=lambda run: (run.manifest["started"], run.name))


# ---------------------------------------------------------------------------------------------------------------------
# provenance


def _provenance(run: Run) -> dict[str, Any]:
    manifest = run.manifest
    begin, end = manifest["started"], manifest["finished"]
    seconds = (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds() if end else None
    code = manifest.get("code") or {}
    machine = manifest.get("machine") or {}
    facts = {
        "command": manifest.get("command"),
        "started": _date(begin),
        "took": "not finished" if seconds is None else _duration(seconds),
        "resumed": f"{len(manifest['resumed'])} ×" if manifest.get("resumed") else None,
        "commit": f"{code['commit'][:12]}{' with uncommitted changes' if code.get('diff') else ''}"
        if code.get("commit") else None,
        "seed": manifest.get("seed", manifest.get("seeds")),
        "chat template": manifest.get("chat_template"),
        "processes": manifest.get("world_size"),
        "made from": ", ".join(sorted(set((manifest.get("parents") or {}).values()))) or None,
        "machine": ", ".join(str(machine[key]) for key in ("processor", "system") if machine.get(key)),
        "cores, memory": f"{machine['cores']}, {machine['memory_gb']} GB" if machine else None,
        "GPUs": "; ".join(machine.get("gpus") or []) or "none",
        "versions": ", ".join(f"{name} {version}" for name, version in (manifest.get("versions") or {}).items()),
    }  # fmt: skip
    config = run.path / "config.yaml"
    return {
        "name": run.name,
        "stage": run.stage,
        "took": facts["took"],
        "facts": {name: value for name, value in facts.items() if value not in (None, "")},
        "config": config.read_text(encoding="utf-8") if config.exists() else "",
    }


def _pipeline(folder: Path) -> list[dict[str, str]]:
    """Time and memory of the stages, where the folder is that of a pipeline."""
    path = folder / "stages.json"
    stages = json.loads(path.read_text(encoding="utf-8")).get("stages", {}) if path.exists() else {}
    return [
        {"name": name, "took": _duration(of["seconds"]), "memory": f"{of['peak_memory_gb']:.2f} GB"}
        for name, of in stages.items()
    ]


def _date(text: str) -> str:
    return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M UTC")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
