import torch

from afterglow.trainers.rollouts import MEASURES, summarise


def measured(*rollouts: dict) -> torch.Tensor:
    return torch.tensor([[float(one.get(name, 0)) for name in MEASURES] for one in rollouts], dtype=torch.float64)


def test_variety_is_that_of_wrong_answers():
    """Two groups of four: answers 7 (right) 7 (right) 5 5 and 3 4 none 3; of the five wrong answers given, three."""
    right, none = {"correct": 1, "answer": 7}, {"answer": 0}
    rows = [right, right, {"answer": 5}, {"answer": 5}, {"answer": 3}, {"answer": 4}, none, {"answer": 3}]
    assert summarise(measured(*rows), 4)["groups/distinct_wrong"] == 3 / 5
    assert summarise(measured(*[right] * 4), 4)["groups/distinct_wrong"] == 1.0  # success is no loss of variety
    assert summarise(measured(*[{"answer": 3}] * 4), 4)["groups/distinct_wrong"] == 1 / 4


def test_calls_are_counted_whether_they_parse_or_not():
    rows = [{"calls": 2, "failed": 1, "first_call": 10}, {"malformed": 1, "first_call": 20}, {}, {"calls": 1}]
    found = summarise(measured(*rows), 2)
    assert found["rollouts/calls"] == 1.0 and found["rollouts/with_calls"] == 0.75
    assert found["rollouts/call_error_rate"] == 0.5 and found["rollouts/first_call"] == 10.0
