"""Alarms that see a policy collapse while there is still a good checkpoint, and what is done then.

Each alarm follows one logged metric, smoothed over the last logs, and compares it with a fixed number, with its value
at the start of the run, or with the best it has been. The list is that of the field's post-mortems (truncated share:
arXiv 2510.13786; calls per problem: arXiv 2602.01204; gradient norm: arXiv 2509.02479; divergence of trainer and
engine: arXiv 2510.11370); limits without a published number are our choice and named so below. Entropy alone predicted
nothing in 2510.13786, so it warns and does not stop.
"""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..core.errors import CollapseError, RecipeError
from ..core.run_folder import write_atomic

FILE = "collapse_guard.json"
Level = Literal["warn", "stop"]


@dataclass(frozen=True)
class Alarm:
    """One alarm.

    Attributes:
        metric: name in the logs.
        side: where the trouble is, `above` or `below` the limits.
        warn: limit of a warning; None never warns.
        stop: limit that stops the run; None never stops it.
        of: what the limits are multiples of: `one`, the value at the `start`, or the `best` (highest) value so far.
    """

    metric: str
    side: Literal["above", "below"]
    warn: float | None
    stop: float | None
    of: Literal["one", "start", "best"] = "one"


ALARMS = {
    "truncated": Alarm("rollouts/truncated", "above", 0.05, 0.10),  # 2510.13786: collapse at 10 to 15%
    "calls": Alarm("rollouts/calls", "below", 0.5, None, "start"),  # 2602.01204: interaction collapse
    "call_errors": Alarm("rollouts/call_error_rate", "above", 0.3, 0.8),  # limits: our choice, as all below
    "reward": Alarm("reward", "below", 0.7, 0.4, "best"),
    "grad_norm": Alarm("grad_norm", "above", 5.0, 50.0, "start"),
    "entropy_low": Alarm("entropy", "below", 0.1, None, "start"),
    "entropy_high": Alarm("entropy", "above", 2.0, 5.0, "start"),
    "engine_kl": Alarm("sampling/kl", "above", 0.02, 0.2),
    "all_correct": Alarm("groups/all_correct", "above", 0.8, None),
    "distinct_wrong": Alarm("groups/distinct_wrong", "below", 0.4, None, "start"),
    "no_tool": Alarm("probe/no_tool_accuracy", "below", 0.8, 0.5, "start"),
}


@dataclass
class CollapseGuardConfig:
    """What a collapse is, and what happens then."""

    guard: Literal["off", "warn", "stop", "roll_back"] = field(
        default="stop",
        metadata={"help": "When an alarm reaches its stop limit: `warn` only, `stop` with an error, or `roll_back`: "
                          "end the run with the weights of the last good checkpoint."},
    )  # fmt: skip
    guard_limits: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Other limits: alarm -> [warn, stop], null for none. Alarms: " + ", ".join(ALARMS) + "."},
    )
    guard_span: int = field(
        default=5, metadata={"help": "Logs that a smoothed value spans. So many pass before the first alarm."}
    )
    probe_every: int = field(
        default=0,
        metadata={
            "help": "Steps between two measurements of the accuracy without tools, on training prompts; 0: none."
        },
    )
    probe_prompts: int = field(default=64, metadata={"help": "Prompts of such a measurement, one rollout each."})

    def __post_init__(self):
        problems = []
        if self.guard not in ("off", "warn", "stop", "roll_back"):
            problems.append(f"guard is {self.guard!r}: use off, warn, stop or roll_back")
        if unknown := sorted(self.guard_limits.keys() - ALARMS.keys()):
            problems.append(f"guard_limits: no alarm is called {unknown[0]!r}; use one of {', '.join(ALARMS)}")
        for name, limits in self.guard_limits.items():
            pair = isinstance(limits, list | tuple) and len(limits) == 2
            if not pair or not all(isinstance(limit, int | float | None) for limit in limits):
                problems.append(f"guard_limits: `{name}` is {limits!r}: use [warn, stop], null for none")
        for key, least in (("guard_span", 1), ("probe_every", 0), ("probe_prompts", 1)):
            if getattr(self, key) < least:
                problems.append(f"{key} is {getattr(self, key)}: use at least {least}")
        if problems:
            raise RecipeError("; ".join(problems))


@dataclass(frozen=True)
class Finding:
    """One alarm that went off: `level` is `warn` or `stop`."""

    alarm: str
    level: Level
    text: str


class CollapseGuard:
    """Follows the metrics of a run. The same in every process, since the metrics are."""

    def __init__(self, config: CollapseGuardConfig):
        other = {name: {"warn": warn, "stop": stop} for name, (warn, stop) in config.guard_limits.items()}
        self._alarms = {name: replace(alarm, **other.get(name, {})) for name, alarm in ALARMS.items()}
        self._span = config.guard_span
        self._seen: dict[str, int] = {}
        self._smoothed: dict[str, float] = {}
        self._start: dict[str, float] = {}
        self._best: dict[str, float] = {}
        self.good = True  # no stop limit is crossed now

    def look(self, metrics: dict[str, float]) -> list[Finding]:
        """Take the metrics of one log and return the alarms that went off, those that stop first.

        An average with weight 2 / (span + 1) for the newest value; the start is its value after `guard_span` logs.
        """
        for name in ("loss", "grad_norm"):
            if name in metrics and not math.isfinite(metrics[name]):
                self.good = False
                return [Finding(name, "stop", f"{name} is {metrics[name]}")]
        for metric in {alarm.metric for alarm in self._alarms.values()}:
            if (value := metrics.get(metric)) is not None and math.isfinite(value):
                self._follow(metric, value)
        findings = [found for name, alarm in self._alarms.items() if (found := self._check(name, alarm, metrics))]
        self.good = all(found.level == "warn" for found in findings)
        return sorted(findings, key=lambda found: found.level != "stop")

    def _follow(self, metric: str, value: float) -> None:
        seen = self._seen[metric] = self._seen.get(metric, 0) + 1
        # A plain mean at first, so that the first value has no more weight than the others.
        weight = max(2 / (self._span + 1), 1 / seen)
        old = self._smoothed.get(metric, 0.0)
        smoothed = self._smoothed[metric] = old + weight * (value - old)
        if seen == self._span:
            self._start[metric] = smoothed
        if seen >= self._span:
            self._best[metric] = max(self._best.get(metric, smoothed), smoothed)

    def _check(self, name: str, alarm: Alarm, metrics: dict[str, float]) -> Finding | None:
        if alarm.metric not in metrics or self._seen.get(alarm.metric, 0) < self._span:
            return None
        value = self._smoothed[alarm.metric]
        unit = {"one": 1.0, "start": self._start[alarm.metric], "best": self._best[alarm.metric]}[alarm.of]
        levels: tuple[tuple[Level, float | None], ...] = (("stop", alarm.stop), ("warn", alarm.warn))
        for level, limit in levels:
            if limit is None or (alarm.of != "one" and unit <= 0):
                continue
            bound = limit * unit
            if value > bound if alarm.side == "above" else value < bound:
                of = "" if alarm.of == "one" else f" ({limit:g} of its {alarm.of})"
                text = f"{alarm.metric} is {value:.3g}, {alarm.side} {bound:.3g}{of}"
                return Finding(name, level, text)
        return None

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint folder."""
        state = {"seen": self._seen, "smoothed": self._smoothed, "start": self._start, "best": self._best}
        write_atomic(folder / FILE, json.dumps(state | {"good": self.good}))

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint; one without a state begins anew."""
        if not (folder / FILE).exists():
            return
        state = json.loads((folder / FILE).read_text(encoding="utf-8"))
        self._seen, self._smoothed, self._start, self._best = (
            state[key] for key in ("seen", "smoothed", "start", "best")
        )
        self.good = state["good"]


def heed(trainer: Any, findings: Sequence[Finding], logs: dict[str, float]) -> None:
    """Do what the recipe's `guard` says about the findings of a step, and count them in its log.

    Args:
        trainer: a trainer with `last_good`, the checkpoint that a rollback returns to, or None.
        findings: those that stop first, as `CollapseGuard.look` returns them.
        logs: the step's log, which two counts are added to.

    Raises:
        CollapseError: a stop limit is crossed and the run cannot, or shall not, be rolled back.
    """
    logs["guard/warnings"] = sum(found.level == "warn" for found in findings)
    logs["guard/stops"] = sum(found.level == "stop" for found in findings)
    if not findings:
        return
    text = f"step {trainer.state.global_step}: " + "; ".join(f"{found.alarm}: {found.text}" for found in findings)
    if findings[0].level == "warn" or trainer.args.guard == "warn":
        warnings.warn(text, stacklevel=3)
        return
    good = trainer.last_good
    if trainer.args.guard == "roll_back" and good:
        warnings.warn(f"{text}. The run ends with the weights of {good}.", stacklevel=3)
        trainer.state.best_model_checkpoint, trainer.args.load_best_model_at_end = good, True
        trainer.control.should_training_stop = True
        return
    raise CollapseError(
        f"the policy collapsed at {text}. "
        + (f"The last good checkpoint is {good}. " if good else "There is no good checkpoint yet. ")
        + "Lower `learning_rate`, raise the batch, or set other `guard_limits`; `guard: roll_back` ends such a run "
        "with the last good weights."
    )
