"""What decides: differences by hand, the rule, and no verdict without its control."""

import pytest
from evidence_rows import results, study

from afterglow.core.errors import DataError
from afterglow.evidence.study import Difference, deciding_differences, difference, reason, verdict


def test_a_difference_by_hand():
    # pass@1 of a: 0.75, 1.0; of b: 0.375, 0.375. Differences of seeds 0.375, 0.625; of problems 0.375, 0.625.
    found = difference(results({"a": [[2, 4], [4, 4]], "b": [[1, 2], [2, 1]]}), "a", "b", "t", "pass@1")
    assert found.of_seeds == (0.375, 0.625)
    assert found.value == 0.5
    # Over two seeds t is 12.706 at 1 degree of freedom, the standard error 0.125: wider than any share can be.
    assert found.low == pytest.approx(0.5 - 12.7062 * 0.125, abs=1e-4)
    assert found.high == pytest.approx(0.5 + 12.7062 * 0.125, abs=1e-4)


def test_the_wider_of_both_intervals_counts():
    """Seeds that agree exactly say nothing of other problems."""
    found = difference(results({"a": [[4, 0, 4, 1]] * 3, "b": [[0, 0, 0, 0]] * 3}), "a", "b", "t", "pass@1")
    # problems: 1, 0, 1, 0.25; mean 0.5625, s 0.5154, t 3.1824 at 3 degrees of freedom
    assert found.low == pytest.approx(0.5625 - 3.1824 * 0.5154 / 2, abs=1e-3)


def test_pass_at_k_is_that_of_every_problem():
    # one right of four: pass@4 is 1, pass@1 a quarter
    found = difference(results({"a": [[1, 0], [1, 0]], "b": [[0, 0], [0, 0]]}), "a", "b", "t", "pass@4")
    assert found.value == 0.5


@pytest.mark.parametrize(
    "intervals, said",
    [
        ([(0.01, 0.09), (0.001, 0.05)], "supported"),
        ([(0.01, 0.09), (-0.01, 0.05)], "inconclusive"),
        ([(0.01, 0.09), (-0.03, 0.019)], "not supported"),
        ([(0.001, 0.01), (0.001, 0.01)], "supported"),
        ([(-0.5, 0.5), (-0.09, -0.05)], "not supported"),
        ([(0.0, 0.09)], "inconclusive"),
    ],
)
def test_the_rule(intervals, said):
    found = [Difference("a", "bcd"[place], sum(ends) / 2, *ends, ()) for place, ends in enumerate(intervals)]
    assert verdict(found, margin=0.02) == said
    assert reason(study(), found)


def test_the_reason_names_the_arms_that_decided():
    found = [Difference("a", "b", 0.05, 0.01, 0.09, ()), Difference("a", "c", 0.0, -0.01, 0.01, ())]
    assert "`c`" in reason(study(), found) and "`b`" not in reason(study(), found)


def test_there_is_no_verdict_without_a_control():
    with pytest.raises(ValueError, match="names no control"):
        study(against={"b": "what the claim compares with"})
    with pytest.raises(DataError, match="no run of the arm `c`: without it there is no comparison and no verdict"):
        deciding_differences(study(), results({"a": [[4, 1]] * 2, "b": [[0, 0]] * 2}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"against": {"x": "control"}}, "`x` is none of the `arms`"),
        ({"against": {"a": "control"}}, "`against` names `a`, the arm itself"),
        ({"task": "u"}, "`task: u` is none of the `tasks`"),
        ({"margin": 0}, "`margin` must be above 0"),
    ],
)
def test_a_statement_that_cannot_decide_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        study(**changes)


def test_other_seeds_and_other_problems_are_refused():
    with pytest.raises(DataError, match=r"`a` has seeds \[0, 1\], `b` has \[0, 1, 2\]"):
        difference(results({"a": [[1, 1]] * 2, "b": [[1, 1]] * 3}), "a", "b", "t", "pass@1")
    with pytest.raises(DataError, match="different problems"):
        difference(results({"a": [[1, 1]] * 2, "b": [[1, 1, 1]] * 2}), "a", "b", "t", "pass@1")
    with pytest.raises(DataError, match="no rows of u"):
        difference(results({"a": [[1, 1]] * 2, "b": [[1, 1]] * 2}), "a", "b", "u", "pass@1")
