import itertools
import math
import random

import numpy as np
import pytest

from afterglow.core.errors import DataError, RecipeError
from afterglow.core.pass_at_k import check_complete, check_k, g_pass_at_k, majority_at_k, pass_at_k


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (5, 2, 1, 2 / 5),
        (5, 2, 2, 1 - 3 / 10),  # C(3,2) / C(5,2)
        (5, 2, 3, 1 - 1 / 10),
        (5, 2, 4, 1.0),  # only three are wrong
        (10, 1, 10, 1.0),
        (10, 0, 10, 0.0),
        (200, 3, 100, 1 - math.comb(197, 100) / math.comb(200, 100)),
    ],
)
def test_values_by_hand(n, c, k, expected):
    assert pass_at_k(n, [c], k)[0] == pytest.approx(expected, abs=1e-15)


def test_equals_the_binomial_form_for_all_small_n():
    for n in range(1, 65):
        for k in range(1, n + 1):
            exact = [1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)]
            assert np.abs(pass_at_k(n, range(n + 1), k) - exact).max() < 1e-14


def test_equals_the_mean_over_all_subsets():
    labels = [True, False, False, True, False, False, False]
    for k in range(1, 8):
        draws = [any(draw) for draw in itertools.combinations(labels, k)]
        assert pass_at_k(7, [2], k)[0] == pytest.approx(sum(draws) / len(draws))


def test_is_unbiased_where_the_plug_in_is_not():
    n, k, p = 16, 8, 0.02
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    assert weights @ pass_at_k(n, range(n + 1), k) == pytest.approx(1 - (1 - p) ** k)
    assert weights @ (1 - (1 - np.arange(n + 1) / n) ** k) == pytest.approx(0.122, abs=1e-3), (
        "biased low: 0.149 is true"
    )


def test_large_n_is_stable():
    values = pass_at_k(100_000, [0, 1, 50_000, 100_000], 64)
    assert values == pytest.approx([0, 64 / 100_000, 1, 1], abs=1e-12)


def test_k_above_n_is_refused():
    with pytest.raises(RecipeError, match=r"`k` is 8, but there are only 4 samples.*raise `n` or lower `k`"):
        pass_at_k(4, [1], 8)
    with pytest.raises(RecipeError, match=r"`k` is 0: use whole numbers from 1"):
        check_k([1, 0], 4)


def test_incomplete_problems_are_refused_by_name():
    counts = {f"p{i}": 4 for i in range(10)} | {f"q{i}": i for i in range(7)}
    with pytest.raises(DataError, match=r"aime: 4 of 17 problems have fewer than 4 samples: 'q0' \(0\), 'q1'"):
        check_complete(counts, 4, "aime")
    check_complete(counts, 0, "aime")


def brute_force_majority(answers, right, k):
    """Mean over all draws of the share of the most frequent answers that is right."""
    total = count = 0
    for draw in itertools.combinations(range(len(answers)), k):
        votes = {}
        for i in draw:
            if answers[i] is not None:
                votes[answers[i]] = votes.get(answers[i], 0) + 1
        winners = [a for a in votes if votes[a] == max(votes.values())]
        total += sum(right[a] for a in winners) / len(winners) if winners else 0
        count += 1
    return total / count


@pytest.mark.parametrize("seed", range(6))
def test_majority_equals_brute_force(seed):
    rng = random.Random(seed)
    answers = [rng.choice(["a", "b", "c", "d", None]) for _ in range(9)]
    right = {"a": 1.0, "b": 0.0, "c": 0.25 if seed % 2 else 0.0, "d": 0.0}
    classes = [(answers.count(a), right[a]) for a in right if a in answers]
    for k in range(1, 10):
        expected = brute_force_majority(answers, right, k)
        assert majority_at_k(classes, answers.count(None), k) == pytest.approx(expected, abs=1e-12)


def test_majority_by_hand():
    assert majority_at_k([(3, 1.0), (2, 0.0)], 0, 5) == pytest.approx(1)
    assert majority_at_k([(2, 1.0), (2, 0.0)], 5, 9) == pytest.approx(1 / 2), "a tie; no answer never wins"
    assert majority_at_k([(1, 1.0)], 3, 2) == pytest.approx(1 / 2), "half of the draws have no answer at all"
    assert majority_at_k([(2, 0.0)], 1, 3) == 0


def test_majority_identities():
    classes, none, n = [(17, 1.0), (30, 0.0), (9, 0.0)], 8, 64
    pass_at_1 = 17 / n
    assert majority_at_k(classes, none, 1) == pytest.approx(pass_at_1)
    with_none_as_an_answer = majority_at_k([*classes, (none, 0.0)], 0, 2)
    assert with_none_as_an_answer == pytest.approx(pass_at_1), "two votes: agree or a fair draw"
    assert majority_at_k(classes, none, n) == 0
    assert majority_at_k([(500, 1.0), (499, 0.0), (1, 0.0)], 24, 1024) == pytest.approx(1), "large n stays finite"
    assert 0.4 < majority_at_k([(500, 1.0), (499, 0.0), (1, 0.0)], 24, 512) < 0.6


def test_g_pass_equals_the_mean_over_all_subsets():
    labels = [True, False, False, True, True, False, False]
    for k in range(1, 8):
        draws = [sum(draw) for draw in itertools.combinations(labels, k)]
        for tau in (0.25, 0.5, 0.7, 1.0):
            expected = sum(hits >= math.ceil(round(tau * k, 9)) for hits in draws) / len(draws)
            assert g_pass_at_k(7, [3], k, tau)[0] == pytest.approx(expected)


def test_g_pass_spans_from_pass_at_k_to_pass_hat_k():
    counts = range(17)
    assert g_pass_at_k(16, counts, 8, 1 / 8) == pytest.approx(pass_at_k(16, counts, 8))
    assert g_pass_at_k(16, counts, 8, 1.0) == pytest.approx([math.comb(c, 8) / math.comb(16, 8) for c in counts])
    assert g_pass_at_k(20, [14], 10, 0.7)[0] == g_pass_at_k(20, [14], 10, 0.65)[0], "0.7 x 10 is 7, not 8"
    for tau in (0, 1.1):
        with pytest.raises(RecipeError, match="tau of G-pass@k"):
            g_pass_at_k(4, [1], 2, tau)
