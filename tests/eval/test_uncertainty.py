import numpy as np
import pytest
from scipy.stats import betabinom, ttest_1samp

from afterglow.core.errors import DataError
from afterglow.core.pass_at_k import pass_at_k
from afterglow.eval.uncertainty import (
    holm,
    mean_interval,
    mean_over_seeds,
    new_problems_error,
    paired_difference,
    problems_needed,
    resolvable,
    run_to_run_error,
    sign_flip_test,
)


@pytest.mark.parametrize(
    ("problems", "difficulty", "n", "k"),
    [
        (30, (0.3, 0.5), 8, 1),  # AIME-like: U-shaped
        (30, (0.3, 0.5), 8, 4),
        (30, (0.1, 1.5), 1, 1),  # hard, one sample
        (30, (0.02, 1.5), 8, 1),  # nearly hopeless: t covers 54%, BCa 70%
        (40, (2, 2), 8, 4),
        (250, (2, 1), 4, 1),
    ],
)
def test_coverage_over_new_problems(problems, difficulty, n, k):
    """The interval of a benchmark drawn from a population of problems holds the population's mean."""
    rng = np.random.default_rng(0)
    counts = np.arange(n + 1)
    truth = betabinom.pmf(counts, n, *difficulty) @ pass_at_k(n, counts, k)
    rounds, hits = 400, 0
    for _ in range(rounds):
        correct = rng.binomial(n, rng.beta(*difficulty, problems))
        interval = mean_interval(pass_at_k(n, correct, k))
        hits += interval.low <= truth <= interval.high
    assert 0.92 <= hits / rounds <= 0.99


def test_zero_one_scores_give_wilson_s_interval():
    interval = mean_interval([1] * 30 + [0] * 70)
    assert interval.value == pytest.approx(0.3)
    assert (interval.low, interval.high) == pytest.approx((0.2189, 0.3959), abs=0.002), "Wilson with z = 1.96"


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5])
def test_agreement_of_all_problems_is_not_certainty(value):
    interval = mean_interval([value] * 30)
    assert 0 <= interval.low <= value <= interval.high <= 1
    assert interval.high - interval.low > 0.1


def test_more_samples_of_a_problem_are_not_more_problems():
    rng = np.random.default_rng(1)
    hard = rng.random(40) < 0.5
    wide = mean_interval(hard.astype(float))
    assert wide == mean_interval(np.repeat(hard, 64).reshape(40, 64).mean(1)), "64 equal samples add nothing"


def test_one_problem_and_none():
    assert (mean_interval([0.7]).low, mean_interval([0.7]).high) == (0, 1)
    with pytest.raises(DataError, match="no problem"):
        mean_interval([])


def test_pairing_is_narrower_than_two_intervals():
    rng = np.random.default_rng(2)
    base = rng.beta(0.3, 0.5, 60)
    trained = np.clip(base + rng.normal(0.1, 0.05, 60), 0, 1)
    ids = [f"p{i}" for i in range(60)]
    difference = paired_difference(dict(zip(ids, base, strict=True)), dict(reversed([*zip(ids, trained, strict=True)])))
    assert difference.value == pytest.approx(np.mean(trained - base))
    assert 0 < difference.low < difference.value < difference.high < 0.2
    apart = mean_interval(base)
    assert difference.high - difference.low < (apart.high - apart.low) / 2


def test_paired_coverage():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(400):
        p = rng.beta(0.5, 0.5, 30)
        a, b = rng.binomial(8, p) / 8, rng.binomial(8, np.clip(p + 0.05, 0, 1)) / 8
        truth = 0.05 - np.mean(np.maximum(rng.beta(0.5, 0.5, 20_000) - 0.95, 0))
        interval = paired_difference(dict(enumerate(a)), dict(enumerate(b)))
        hits += interval.low <= truth <= interval.high
    assert 0.92 <= hits / 400 <= 0.98


def test_equal_runs_may_still_differ_elsewhere():
    scores = {str(i): 1.0 for i in range(30)}
    same = paired_difference(scores, scores)
    assert same.value == 0 and same.high == pytest.approx(1 - 0.05 ** (1 / 30)) and same.low == -same.high


def test_other_problems_cannot_be_paired():
    with pytest.raises(DataError, match=r"different problems \(2 are in one only, such as 'b'\)"):
        paired_difference({"a": 1, "b": 0}, {"a": 1, "c": 0})
    with pytest.raises(DataError, match="at least two problems"):
        paired_difference({"a": 1}, {"a": 0})


# ---------------------------------------------------------------------------------------------------------------------
# which error: new problems, or a run again


@pytest.mark.parametrize(
    ("n", "new", "again"), [(1, 0.092, 0.061), (8, 0.070, 0.022), (64, 0.067, 0.008)], ids="n={}".format
)
def test_more_samples_shrink_only_the_run_to_run_error(n, new, again):
    """30 problems of U-shaped difficulty: simulated means over both kinds of repetition, and our two estimates."""
    rng = np.random.default_rng(0)
    over_problems = rng.binomial(n, rng.beta(0.4, 0.4, (4_000, 30))) / n
    assert over_problems.mean(1).std() == pytest.approx(new, rel=0.05)
    estimates = [new_problems_error(scores) for scores in over_problems[:400]]
    assert np.sqrt(np.mean(np.square(estimates))) == pytest.approx(new, rel=0.05)
    within = [
        (rng.binomial(n, p, (200, 30)) / n).mean(1).std(ddof=1) for p in rng.beta(0.4, 0.4, (100, 30))
    ]  # the same 30 problems, 200 times
    assert np.sqrt(np.mean(np.square(within))) == pytest.approx(again, rel=0.06)
    if n > 1:
        by_count = np.arange(n + 1) / n
        found = [run_to_run_error(n, (scores * n).round(), by_count) for scores in over_problems[:400]]
        assert np.sqrt(np.mean(np.square(found))) == pytest.approx(again, rel=0.06)


def test_run_to_run_error_by_hand_and_of_pass_at_k():
    assert run_to_run_error(4, [1, 3, 4], np.arange(5) / 4) == pytest.approx(np.sqrt(2 * 0.1875 / 3) / 3)
    assert run_to_run_error(1, [1, 0], np.arange(2)) is None and new_problems_error([0.3]) is None
    rng = np.random.default_rng(1)
    p, by_count = rng.beta(1, 1, 40), pass_at_k(16, range(17), 4)
    true = by_count[rng.binomial(16, p, (4_000, 40))].mean(1).std()
    found = np.mean([run_to_run_error(16, rng.binomial(16, p), by_count) for _ in range(200)])
    assert found == pytest.approx(true, rel=0.12), "plug-in: a little small for k > 1"


def test_power_is_what_it_says():
    """The difference that 30 problems resolve is found in 80% of simulated comparisons, and 4 x as many halve it."""
    rng, error = np.random.default_rng(2), 0.03
    shift = resolvable(error)
    assert shift == pytest.approx(2.8016 * error, rel=1e-4)
    found = rng.normal(shift, error * np.sqrt(30), (4_000, 30)).mean(1) / error > 1.96
    assert found.mean() == pytest.approx(0.8, abs=0.02)
    assert problems_needed(shift, error, 30) == 30 and problems_needed(shift / 2, error, 30) == 120
    assert problems_needed(0.0, error, 30) is None


def test_sign_flips():
    assert sign_flip_test([0.1] * 5) == 2 / 32, "both ways of all five signs alike"
    assert sign_flip_test([0.0] * 30) == 1 and sign_flip_test([0.5, -0.5]) == 1
    rng = np.random.default_rng(3)
    many = rng.normal(0.1, 0.3, 40)
    assert sign_flip_test(many) == sign_flip_test(many), "seeded"
    assert sign_flip_test(many) == pytest.approx(ttest_1samp(many, 0).pvalue, rel=0.3)
    level = np.mean([sign_flip_test(rng.normal(0, 0.3, 12)) < 0.05 for _ in range(400)])
    assert 0.02 < level < 0.08


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_mean_over_seeds_is_students_t():
    found = mean_over_seeds([0.1, 0.2, 0.3])
    assert found.value == pytest.approx(0.2)
    assert found.high - found.value == pytest.approx(4.30265 * 0.1 / 3**0.5, abs=1e-5)  # t of two degrees of freedom
    assert found.value - found.low == pytest.approx(found.high - found.value)
    same = mean_over_seeds([0.5, 0.5])
    assert (same.low, same.high) == (0.5, 0.5)
    with pytest.raises(DataError, match="at least two runs"):
        mean_over_seeds([0.5])
