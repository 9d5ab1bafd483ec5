import math

import pytest

from afterglow.core.errors import RecipeError
from afterglow.trainers.collapse_guard import ALARMS, CollapseGuard, CollapseGuardConfig

QUIET = {
    "loss": 0.1,
    "grad_norm": 1.0,
    "reward": 0.5,
    "rollouts/truncated": 0.01,
    "rollouts/calls": 2.0,
    "entropy": 1.0,
}


def guard(**changes) -> CollapseGuard:
    return CollapseGuard(CollapseGuardConfig(**({"guard_span": 2} | changes)))


def follow(one: CollapseGuard, *changes: dict) -> list:
    """The alarms of the last of several logs, as (name, level)."""
    findings = []
    for change in changes:
        findings = one.look(QUIET | change)
    return [(found.alarm, found.level) for found in findings]


def test_a_quiet_run_stays_quiet():
    one = guard()
    assert follow(one, *[{}] * 20) == [] and one.good


@pytest.mark.parametrize(
    ("change", "alarm", "level"),
    [
        ({"rollouts/truncated": 0.07}, "truncated", "warn"),
        ({"rollouts/truncated": 0.2}, "truncated", "stop"),
        ({"rollouts/calls": 0.9}, "calls", "warn"),
        ({"rollouts/call_error_rate": 0.9}, "call_errors", "stop"),
        ({"reward": 0.1}, "reward", "stop"),
        ({"grad_norm": 60.0}, "grad_norm", "stop"),
        ({"entropy": 0.01}, "entropy_low", "warn"),
        ({"entropy": 6.0}, "entropy_high", "stop"),
        ({"sampling/kl": 0.5}, "engine_kl", "stop"),
        ({"groups/all_correct": 0.95}, "all_correct", "warn"),
    ],
)
def test_each_alarm_goes_off(change, alarm, level):
    one = guard()
    follow(one, {}, {})
    assert (alarm, level) in follow(one, *[change] * 12)
    assert one.good == (level == "warn")


def test_limits_relative_to_the_start_or_the_best():
    one = guard(guard_span=1, guard_limits={"no_tool": [0.8, 0.5]})
    assert follow(one, {"reward": 0.2, "probe/no_tool_accuracy": 0.9}) == []
    assert follow(one, {"reward": 0.8}) == []  # the best is now 0.8
    assert follow(one, {"reward": 0.5}) == [("reward", "warn")]  # 0.5 < 0.7 x 0.8
    assert follow(one, {"reward": 0.8, "probe/no_tool_accuracy": 0.4}) == [("no_tool", "stop")]
    assert follow(one, {"reward": 0.8}) == []  # a log without the probe says nothing of it


def test_nothing_goes_off_before_the_span_is_full_and_one_bad_log_is_smoothed():
    one = guard(guard_span=5)
    assert follow(one, *[{"rollouts/truncated": 0.5}] * 4) == []
    two = guard(guard_span=9)
    assert follow(two, *[{}] * 9, {"rollouts/truncated": 0.12}) == []  # 0.01 + 0.2 x 0.11


def test_what_is_not_finite_stops_at_once():
    for bad in (math.nan, math.inf):
        one = guard()
        assert follow(one, {"grad_norm": bad}) == [("grad_norm", "stop")] and not one.good


def test_a_limit_can_be_changed_or_switched_off():
    assert follow(guard(guard_limits={"truncated": [None, None]}), *[{"rollouts/truncated": 1.0}] * 5) == []
    assert follow(guard(guard_limits={"truncated": [None, 0.6]}), *[{"rollouts/truncated": 0.5}] * 5) == []


def test_the_state_survives_a_resume(tmp_path):
    whole = guard()
    follow(whole, {}, {"reward": 0.9}, {"reward": 0.7})
    whole.save(tmp_path)
    resumed = guard()
    resumed.load(tmp_path)
    later = [{"reward": 0.3}] * 3
    assert follow(resumed, *later) == follow(whole, *later) == [("reward", "warn")]
    fresh = guard()
    fresh.load(tmp_path / "without a state")
    assert fresh.good


def test_mistakes():
    with pytest.raises(RecipeError, match="no alarm is called 'rewards'"):
        CollapseGuardConfig(guard_limits={"rewards": [1, 2]})
    with pytest.raises(RecipeError, match="guard_span is 0"):
        CollapseGuardConfig(guard_span=0)
    assert all(alarm.warn is not None for alarm in ALARMS.values())
