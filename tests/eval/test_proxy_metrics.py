import math

import numpy as np
import pytest

from afterglow.core.errors import DataError
from afterglow.eval.proxy_metrics import NAMES, ExpertTokens, choose_proxy, proxy_metrics

# Vocabulary of 4. ONE: p = (1/2, 1/4, 1/8, 1/8) twice, tokens of rank 1 and 3. TWO: a uniform distribution.
H1 = 1.75 * math.log(2)
ONE = ExpertTokens(
    np.array([7, 3]), np.log([2.0, 8.0]), np.array([H1, H1]), np.array([1, 3]), np.array([0.5, 0.5])
)  # fmt: skip
TWO = ExpertTokens(np.array([7]), np.log([4.0]), np.array([math.log(4)]), np.array([1]), np.array([0.25]))


def test_eighty_names_ten_by_eight():
    found = proxy_metrics([ONE, TWO], 4)
    assert len(found) == 80 and tuple(found) == NAMES and len(set(NAMES)) == 80


def test_hand_computed():
    found = proxy_metrics([ONE], 4)
    ln2 = math.log(2)
    expected = {
        "nll/uniform": 2 * ln2, "top1/uniform": 0.5, "top2/uniform": 0.5, "top3/uniform": 1.0, "entropy/uniform": 0.875,
        "rank/uniform": 2.0, "reciprocal_rank/uniform": 2 / 3, "margin/uniform": (0 + 0.375) / 2,
        "wrong_confidence/uniform": 0.25,
        "top1/probability": 0.5 / 0.625, "top1/one_minus_probability": 0.5 / 1.375, "top1/entropy": 0.5,
        "top1/inverse_entropy": 0.5, "nll/gaussian_nll": 2 * ln2,  # both lie one deviation from the mean
    }  # fmt: skip
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name


def test_frequencies_are_of_the_whole_set_and_instances_count_alike():
    found = proxy_metrics([ONE, TWO], 4)  # token 7 has two of three places, token 3 one
    assert found["top1/frequency"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["top1/inverse_frequency"] == pytest.approx(((3 / 2) / (3 / 2 + 3) + 1) / 2)
    assert found["nll/uniform"] == pytest.approx((2 * math.log(2) + math.log(4)) / 2)
    mean = np.log([2, 8, 4]).mean()
    sd = np.log([2, 8, 4]).std()
    kernel = [math.exp(-0.5 * ((math.log(x) - mean) / sd) ** 2) for x in (2, 8)]
    assert found["top1/gaussian_nll"] == pytest.approx((kernel[0] / sum(kernel) + 1) / 2)
    assert found == proxy_metrics([ONE, ExpertTokens(*(np.array([]) for _ in range(5))), TWO], 4)  # nothing to score


def test_a_model_that_is_sure_of_everything_has_finite_proxies():
    sure = ExpertTokens(np.array([1, 2]), np.zeros(2), np.zeros(2), np.ones(2), np.ones(2))
    found = proxy_metrics([sure], 50_000)
    assert all(math.isfinite(value) for value in found.values())
    assert found["top1/one_minus_probability"] == found["top1/entropy"] == found["top1/uniform"] == 1
    lost = ExpertTokens(np.array([1]), np.array([2000.0]), np.zeros(1), np.array([50_000]), np.ones(1))
    assert proxy_metrics([lost], 50_000)["wrong_confidence/probability"] == pytest.approx(1)
    with pytest.raises(DataError, match="no expert token"):
        proxy_metrics([], 10)


def test_a_proxy_is_chosen_on_held_in_tasks():
    proxies = {"flat": [1.0, 1.0, 1.0, 1.0], "loss": [4.0, 3.0, 2.0, 1.0], "mixed": [1.0, 3.0, 2.0, 4.0]}
    tasks = {"a": [0.1, 0.2, 0.3, 0.4], "b": [0.1, 0.3, 0.5, 0.7]}
    assert choose_proxy(proxies, tasks) == ("loss", -1.0)
    assert choose_proxy({"flat": proxies["flat"], "mixed": proxies["mixed"]}, tasks) == ("mixed", pytest.approx(0.8))
    for few in ({"a": [0.1, 0.2]}, {}):
        with pytest.raises(DataError, match="three models"):
            choose_proxy({"loss": [1.0, 2.0]}, few)
