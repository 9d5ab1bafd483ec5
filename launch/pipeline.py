"""`afterglow run`: stages one after another, each in a process of its own, skipping what is finished.

A stage decides by itself whether its folder can be continued; the pipeline only spares the start of those that are
finished with the same recipe and unchanged inputs. `stages.json` holds what each stage took, over all its starts, and
`summary.json` the scores of the evaluations by label.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..core.child_process import end_with_parent
from ..core.run_folder import is_current, write_atomic
from .console import INTERRUPTED, print_error
from .pipeline_recipe import RECIPE, Stage, check_stages, parse_pipeline
from .processes import run_child

STAGES_FILE, SUMMARY_FILE = "stages.json", "summary.json"
SECONDS_BETWEEN_SAMPLES = 0.5
SECONDS_BETWEEN_WRITES = 5.0


def run_pipeline(path: str, overrides: list[str], overwrite: bool = False, dry_run: bool = False) -> int:
    """Run a pipeline, or go on where it stopped, and return the exit code of the stage that failed, or 0.

    Args:
        path: recipe of the pipeline.
        overrides: `--key value` words for it.
        overwrite: make every stage anew.
        dry_run: read and check all stages, list them, and write nothing.

    Raises:
        RecipeError: something is wrong with the pipeline or with the recipe of any stage.
    """
    output_dir, stages = parse_pipeline(path, overrides)
    if dry_run:
        check_stages(stages)
        _show_plan(stages)
        return 0
    begin = time.monotonic()
    # In a process of its own: it imports what all stages import, and this one stays small while they run.
    if code := run_child([sys.executable, "-m", "afterglow.launch.cli", "run", path, *overrides, "--dry_run"]):
        return code
    record = Record(output_dir, begin)
    if overwrite:
        record.overwrite_all()
    for number, stage in enumerate(stages, 1):
        if record.is_done(stage):
            _say(f"{number}/{len(stages)} {stage.name}: finished before")
            continue
        _say(f"{number}/{len(stages)} {stage.name}: {stage.target}")
        code = record.run(stage)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            print_error(_what_now(stage, code, path, overrides))
            return code if code > 0 else 128 - code
        write_summary(output_dir, stages, record)
    write_summary(output_dir, stages, record)
    _show_summary(stages, record, output_dir)
    return 0


def _what_now(stage: Stage, code: int, path: str, overrides: list[str]) -> str:
    ended = f"ended with code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        ended += " (was there enough memory?)"
    command = shlex.join(["afterglow", "run", path, *overrides])
    message = f"stage `{stage.name}` ({stage.target}) {ended}; its last lines stand above. Continue with: {command}"
    if stage.takes == RECIPE:
        anew = shlex.join(["afterglow", stage.verb, stage.target, *stage.overrides, "--overwrite"])
        message += f"\nTo make only this stage anew, delete what it has so far with: {anew}"
    return message


class Record:
    """stages.json: what each stage took, kept over all starts of the pipeline."""

    def __init__(self, folder: Path, begin: float):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / STAGES_FILE
        stored = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        self.stages: dict[str, dict[str, Any]] = stored.get("stages", {})
        self.overwrite_since: str | None = stored.get("overwrite_since")
        self._seconds_before = stored.get("seconds", 0.0)
        self._begin = begin

    @property
    def seconds(self) -> float:
        """Wall time of all starts of this pipeline, failed ones too."""
        return self._seconds_before + time.monotonic() - self._begin

    @property
    def peak_memory_gb(self) -> float:
        """The largest peak of any stage."""
        return max((entry["peak_memory_gb"] for entry in self.stages.values()), default=0.0)

    def save(self) -> None:
        """Write the file."""
        content = {"overwrite_since": self.overwrite_since, "seconds": self.seconds, "stages": self.stages}
        write_atomic(self.path, json.dumps(content, indent=2, default=str) + "\n")

    def overwrite_all(self) -> None:
        """From now on every stage that started before now is made anew."""
        self.overwrite_since, self.stages = datetime.now(UTC).isoformat(timespec="seconds"), {}
        self._seconds_before = 0.0
        self.save()

    def is_done(self, stage: Stage) -> bool:
        """Whether a stage is finished with this recipe and these inputs. What makes or reports is cheap: run it."""
        entry = self.stages.get(stage.name, {})
        same = entry.get("identity") == json.loads(json.dumps(stage.identity(), default=str))
        return bool(same and entry["finished"] and stage.takes == RECIPE and is_current(str(stage.output_dir)))

    def run(self, stage: Stage) -> int:
        """Run a stage in a process of its own, note time and memory, and return its exit code."""
        command = stage.command(self._must_overwrite(stage))
        entry = {"identity": stage.identity(), "finished": False, "seconds": 0.0, "peak_memory_gb": 0.0}
        if old := self.stages.get(stage.name):
            entry |= {name: old[name] for name in ("seconds", "peak_memory_gb")}
        self.stages[stage.name] = entry
        before, begin = entry["seconds"], time.monotonic()
        child = subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"}, preexec_fn=end_with_parent)
        written, code = -SECONDS_BETWEEN_WRITES, None
        while code is None:
            try:
                code = child.wait(SECONDS_BETWEEN_SAMPLES)
            except subprocess.TimeoutExpired:
                entry["peak_memory_gb"] = max(entry["peak_memory_gb"], round(tree_memory_gb(), 3))
            except KeyboardInterrupt:  # the stage got it too: let it end in its own way
                child.wait()
                code = INTERRUPTED
            seconds = time.monotonic() - begin
            entry |= {"seconds": round(before + seconds, 3), "finished": code == 0}
            if code is not None or seconds - written >= SECONDS_BETWEEN_WRITES:
                self.save()
                written = seconds
        return code

    def _must_overwrite(self, stage: Stage) -> bool:
        """A stage that was begun after --overwrite was given is continued, not begun once more."""
        if self.overwrite_since is None:
            return False
        manifest = Path(str(stage.output_dir)) / "manifest.json"
        if stage.takes == RECIPE and manifest.is_file():
            return json.loads(manifest.read_text(encoding="utf-8"))["started"] < self.overwrite_since
        return not self.stages.get(stage.name, {}).get("finished")


def tree_memory_gb() -> float:
    """Return the resident memory of this process and all below it, in GB (10^9 bytes).

    Memory that processes share counts for each of them, so this is an upper bound.
    """
    import psutil

    us = psutil.Process()
    total = 0
    for process in (us, *us.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it ended just now
            continue
    return total / 1e9


# ---------------------------------------------------------------------------------------------------------------------
# what it came to


def write_summary(output_dir: Path, stages: list[Stage], record: Record) -> None:
    """Write summary.json: the scores of each evaluation by its label, seconds, and peak memory.

    Stages of one `each_seed` stand under its label, their scores as means over the seeds that are there.
    """
    summary: dict[str, Any] = {}
    of_seeds: dict[str, list[dict[str, Any]]] = {}
    for stage in stages:
        if stage.verb != "eval" or not (scores := _scores(stage)):
            continue
        if stage.group:
            of_seeds.setdefault(stage.group, []).append(scores)
            if len(of_seeds[stage.group]) > 1:
                scores = _mean_scores(of_seeds[stage.group])
        summary[stage.group or stage.label] = scores
    summary |= {"seconds": round(record.seconds, 1), "peak_memory_gb": round(record.peak_memory_gb, 3)}
    write_atomic(output_dir / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")


def _scores(stage: Stage) -> dict[str, Any]:
    """The scores with an interval: those of the first task, and of all tasks by name where there are several."""
    manifest = Path(str(stage.output_dir)) / "manifest.json"
    if not manifest.is_file():
        return {}
    tasks = json.loads(manifest.read_text(encoding="utf-8")).get("summary") or {}
    by_task = {name: _intervals(scores) for name, scores in tasks.items() if isinstance(scores, dict)}
    if not by_task:
        return {}
    first = next(iter(by_task.values()))
    return first | ({"tasks": by_task} if len(by_task) > 1 else {})


def _mean_scores(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The scores that all runs have, as means over the runs with the interval over them; tasks in the same way."""
    from ..eval.uncertainty import mean_over_seeds

    means: dict[str, Any] = {}
    for name in runs[0]:
        found = [run[name] for run in runs if name in run]
        if len(found) < len(runs):
            continue
        if set(found[0]) >= {"value", "low", "high"}:
            values = [score["value"] for score in found]
            mean = mean_over_seeds(values)
            means[name] = {"value": mean.value, "low": mean.low, "high": mean.high, "seeds": values}
        else:
            means[name] = _mean_scores(found)
    return means


def _intervals(scores: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in scores.items()
        if isinstance(value, dict) and {"value", "low", "high"} <= set(value)
    }


def _say(text: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console().print(Text(text, style="bold cyan"), soft_wrap=True)


def _show_plan(stages: list[Stage]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("stage", "takes", "writes", title="stages, all recipes read and checked", title_justify="left")
    for stage in stages:
        table.add_row(*map(Text, (stage.name, stage.target, stage.output_dir or "")))
    Console().print(table)


def _show_summary(stages: list[Stage], record: Record, output_dir: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", title=f"pipeline: {output_dir}", title_justify="left")
    for column in ("seconds", "GB", "pass@1"):
        table.add_column(column, justify="right")
    for stage in stages:
        entry = record.stages[stage.name]
        score = _scores(stage).get("pass@1") if stage.verb == "eval" else None
        pass1 = f"{score['value']:.1%} [{score['low']:.1%}, {score['high']:.1%}]" if score else ""
        table.add_row(stage.name, f"{entry['seconds']:.1f}", f"{entry['peak_memory_gb']:.2f}", pass1)
    table.add_section()
    table.add_row("all", f"{record.seconds:.1f}", f"{record.peak_memory_gb:.2f}", "")
    console = Console()
    console.print(table)
    console.print(f"scores: {output_dir / SUMMARY_FILE}", soft_wrap=True)
