import numpy as np
import pytest
from scipy import stats

from afterglow.core.errors import DataError
from afterglow.eval.scaling_law import (
    PowerLaw,
    Sigmoid,
    _blocks,
    _few_blocks,
    asymptote_profile,
    backtest,
    fit_law,
    is_open,
    least_squares,
    refusals,
)

R_0 = 0.35
PUBLISHED = {  # arXiv 2510.13786: C_mid, B, A, and the compute of the run
    "8B": (2542.0, 1.92, 0.610, 8_000.0),
    "8B 32k": (11272.0, 1.89, 0.645, 100_000.0),
    "Scout": (4242.0, 1.65, 0.710, 30_000.0),
    "batch 2048": (10909.0, 1.70, 0.645, 100_000.0),
}


def sigmoid(compute, ceiling, steep, middle, start=R_0):
    return start + (ceiling - start) / (1 + (middle / compute) ** steep)  # the formula, written again


def noisy(y, deviation, seed=0):
    return y + np.random.default_rng(seed).normal(0, deviation, len(y))


def test_the_curve_by_hand():
    law = Sigmoid(0.2)
    theta = np.array([0.6, np.log(2.0), np.log(100.0)])
    assert law.value(theta, np.array([100.0]))[0] == pytest.approx(0.4)  # half of the gain at C_mid
    assert law.value(theta, np.array([300.0]))[0] == pytest.approx(0.2 + 0.4 / (1 + 1 / 9))
    power = PowerLaw(unit=7.0)
    shown = power.shown(np.array([0.9, 0.3, np.log(0.5)]))
    assert power.value(np.array([0.9, 0.3, np.log(0.5)]), np.array([28.0]))[0] == pytest.approx(0.9 - 0.15)
    assert shown["a"] - shown["b"] * 28.0 ** -shown["c"] == pytest.approx(0.75)  # units of the formula


@pytest.mark.parametrize("law", [Sigmoid(0.2), PowerLaw(50.0), PowerLaw(50.0, None)])
def test_slopes_are_the_derivatives(law):
    theta, compute = np.array([0.7, 0.4, 3.0 if law.name == "sigmoid" else -0.3]), np.geomspace(3, 400, 9)
    for i, step in enumerate(np.eye(3) * 1e-6):
        numeric = (law.value(theta + step, compute) - law.value(theta - step, compute)) / 2e-6
        assert law.slopes(theta, compute)[:, i] == pytest.approx(numeric, abs=1e-8)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_curves_come_back(name):
    middle, steep, ceiling, most = PUBLISHED[name]
    compute = np.linspace(most / 50, most, 75)
    found = Sigmoid(R_0).shown(least_squares(Sigmoid(R_0), compute, sigmoid(compute, ceiling, steep, middle)))
    assert found == pytest.approx({"A": ceiling, "B": steep, "C_mid": middle}, rel=1e-5)
    y = noisy(sigmoid(compute, ceiling, steep, middle), 0.006)
    found = Sigmoid(R_0).shown(least_squares(Sigmoid(R_0), compute, y))
    assert abs(found["A"] - ceiling) < 0.02 and abs(found["B"] - steep) < 0.2
    assert found["C_mid"] == pytest.approx(middle, rel=0.15)


def test_any_unit_of_compute_gives_the_same_curve():
    compute = np.linspace(2_000, 100_000, 40)
    y = noisy(sigmoid(compute, 0.645, 1.7, 11_000), 0.004)
    for law, other in ((Sigmoid(R_0), Sigmoid(R_0)), (PowerLaw(3e4), PowerLaw(3e22))):
        one, large = least_squares(law, compute, y), least_squares(other, compute * 1e18, y)
        assert law.value(one, compute) == pytest.approx(other.value(large, compute * 1e18), abs=1e-5)
    percent = Sigmoid(100 * R_0, 100.0)
    assert percent.shown(least_squares(percent, compute, 100 * y))["A"] == pytest.approx(
        100 * least_squares(Sigmoid(R_0), compute, y)[0], rel=1e-4
    )


def test_intervals_hold_the_truth_and_a_short_window_has_a_wide_one():
    compute = np.linspace(400, 8_000, 20)
    fit = fit_law(Sigmoid(R_0), compute, noisy(sigmoid(compute, 0.61, 1.92, 2542), 0.004, 1), draws=60)
    found = fit.parameters()
    for key, truth in (("A", 0.61), ("B", 1.92), ("C_mid", 2542)):
        assert found[key]["low"] <= found[key]["value"] <= found[key]["high"]
        assert found[key]["low"] - 0.05 * truth < truth < found[key]["high"] + 0.05 * truth
    early = np.linspace(200, 2_500, 20)
    short = fit_law(Sigmoid(R_0), early, sigmoid(early, 0.61, 1.92, 2542) + fit.residuals, draws=60)
    width = found["A"]["high"] - found["A"]["low"]
    assert short.parameters()["A"]["high"] - short.parameters()["A"]["low"] > 3 * width


def test_the_profile_ends_where_the_squared_error_passes_its_limit():
    compute = np.linspace(2_000, 60_000, 30)
    fit = fit_law(Sigmoid(R_0), compute, noisy(sigmoid(compute, 0.6, 1.7, 9_000), 0.01), draws=20)
    low, high = asymptote_profile(fit)
    limit = (fit.residuals**2).sum() * (1 + 4.210008 / 27)  # F_0.95(1, 27)
    for end in (low, high):
        at = least_squares(fit.law, compute, fit.score, end)
        assert ((fit.score - fit.law.value(at, compute)) ** 2).sum() == pytest.approx(limit, rel=1e-3)
    assert low < 0.6 < high


def test_residuals_are_drawn_in_neighbours_all_alike():
    rng, residuals = np.random.default_rng(0), np.arange(20.0)
    drawn = np.array([_blocks(residuals, rng) for _ in range(2000)])
    steps = np.diff(drawn.reshape(-1, 20)[:, :18].reshape(-1, 6, 3), axis=2) % 20  # blocks of ceil(20^(1/3)) = 3
    assert (steps == 1).all()
    assert np.bincount(drawn.ravel().astype(int), minlength=20) == pytest.approx(np.full(20, 2000), rel=0.15)
    assert _few_blocks(20) == pytest.approx((20 / 3 / (17 / 3)) ** 0.5 * stats.t.ppf(0.975, 17 / 3) / 1.959964)


def test_same_seed_same_intervals():
    compute = np.linspace(1, 20, 12)
    y = noisy(sigmoid(compute, 0.6, 2, 5), 0.01)
    one, again, other = (fit_law(Sigmoid(R_0), compute, y, draws=20, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(one.draws, again.draws) and not np.array_equal(one.draws, other.draws)


def test_power_laws_rise_and_fall():
    compute = np.geomspace(1e2, 1e5, 20)
    rising = PowerLaw(3e3).shown(least_squares(PowerLaw(3e3), compute, 0.8 - 3 * compute**-0.4))
    assert rising == pytest.approx({"a": 0.8, "b": 3.0, "c": 0.4}, rel=1e-4)
    loss = PowerLaw(3e3, None)
    falling = loss.shown(least_squares(loss, compute, 1.7 + 12 * compute**-0.3))
    assert falling == pytest.approx({"a": 1.7, "b": -12.0, "c": 0.3}, rel=1e-4)


def test_a_power_law_misses_the_second_half_of_a_sigmoid():
    compute = np.linspace(2_000, 100_000, 75)
    y = noisy(sigmoid(compute, 0.645, 1.7, 11_000), 0.003)
    right = backtest(Sigmoid(R_0), compute, y, draws=20, seed=0)
    wrong = backtest(PowerLaw(3e4), compute, y, draws=20, seed=0)
    assert right["points"] == wrong["points"] == 38
    assert right["inside"] > 0.8 and right["rmse"] < 0.006 < 0.02 < wrong["rmse"]
    assert backtest(Sigmoid(R_0), compute[:19], y[:19], draws=20, seed=0) is None


def reasons(law, compute, y, to):
    fit = fit_law(law, compute, y, draws=20)
    return " | ".join(refusals(fit, fit.parameters(), to, None))


def test_what_is_not_extended():
    compute = np.linspace(2_000, 100_000, 40)
    good = noisy(sigmoid(compute, 0.645, 1.7, 11_000), 0.003)
    assert reasons(Sigmoid(R_0), compute, good, 8e5) == ""
    assert "8.1 times the largest compute" in reasons(Sigmoid(R_0), compute, good, 8.1e5)
    assert "does not rise" in reasons(Sigmoid(R_0), compute, good[::-1], 2e5)
    assert "does not rise" in reasons(Sigmoid(R_0), compute, np.full(40, 0.5), 2e5)
    far = noisy(sigmoid(compute, 0.9, 1.2, 9e5), 0.003)
    assert "do not bound the asymptote A" in reasons(Sigmoid(R_0), compute, far, 2e5)
    straight = noisy(0.3 + 1e-6 * compute, 0.003)
    assert "do not bound the asymptote a" in reasons(PowerLaw(3e4), compute, straight, 2e5)


def test_a_fallen_forecast_is_a_reason():
    compute = np.linspace(1, 40, 40)
    y = np.where(compute <= 20, sigmoid(compute, 0.6, 2, 5), 0.4)
    law = Sigmoid(R_0)
    fit = fit_law(law, compute, y, draws=20)
    tested = backtest(law, compute, y, draws=20, seed=0)
    assert any("0% of the second" in reason for reason in refusals(fit, fit.parameters(), 80, tested))


def test_an_unbounded_power_law_that_falls_is_open_below():
    compute = np.linspace(10, 100, 20)
    law = PowerLaw(40.0, None)
    fit = fit_law(law, compute, noisy(5 - 0.3 * np.log(compute), 0.05), draws=20)
    assert is_open(fit, fit.parameters())


@pytest.mark.parametrize(
    "compute, message",
    [(np.arange(1.0, 10.0), "at least 10"), (np.arange(0.0, 12.0), "positive"), (np.full(12, 3.0), "different")],
)
def test_refused_points(compute, message):
    with pytest.raises(DataError, match=message):
        fit_law(Sigmoid(R_0), compute, np.linspace(0.4, 0.5, len(compute)), draws=20)
