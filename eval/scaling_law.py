"""How a score grows with compute: ScaleRL's sigmoid and a power law, with intervals, and when not to extend them.

    sigmoid   R = R_0 + (A - R_0) / (1 + (C_mid / C)^B)     arXiv 2510.13786, equation 1
    power     R = a - b C^-c                                 arXiv 2605.18607; for a loss b is negative

A and a are the asymptote. Checkpoints of one run are autocorrelated, so intervals come from a bootstrap of circular
blocks of residuals (Politis and Romano 1992), and the asymptote's is the hull of that and of its profile of squared
errors: either alone is too narrow somewhere. Least squares throughout, from grid starts: these surfaces have more than
one minimum.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy import optimize, special, stats

from ..core.errors import DataError

LEVEL = 0.95
FEWEST = 10
"""Points below which three parameters say nothing about the fourth point."""
FARTHEST = 8.0
"""Multiple of the largest compute beyond which no forecast is made."""
MOST_LEVERAGE = 0.9
"""A point that decides a parameter alone has residual 0, which says nothing of its error."""


class Law(Protocol):
    """A curve of three parameters, the asymptote first; the others are free of units inside (logarithms)."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def names(self) -> tuple[str, str, str]:
        """What its parameters are called."""
        ...

    def value(self, theta: np.ndarray, compute: np.ndarray) -> np.ndarray:
        """Return the curve at each compute."""
        ...

    def slopes(self, theta: np.ndarray, compute: np.ndarray) -> np.ndarray:
        """Return (n, 3) derivatives with respect to the parameters."""
        ...

    def start(self, compute: np.ndarray, score: np.ndarray) -> np.ndarray:
        """Return the best parameters of a coarse grid."""
        ...

    def bounds(self, compute: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the lowest and the highest parameters."""
        ...

    def shown(self, theta: np.ndarray) -> dict[str, float]:
        """Return the parameters as the formula has them."""
        ...


@dataclass(frozen=True)
class Sigmoid:
    """ScaleRL's curve. `start_score` R_0 is measured, never fitted; `highest` is the largest score there can be."""

    start_score: float
    highest: float = 1.0
    name = "sigmoid"
    names = ("A", "B", "C_mid")

    def value(self, theta: np.ndarray, compute: np.ndarray) -> np.ndarray:  # noqa: D102
        gain = special.expit(np.exp(theta[1]) * (np.log(compute) - theta[2]))
        return self.start_score + (theta[0] - self.start_score) * gain

    def slopes(self, theta: np.ndarray, compute: np.ndarray) -> np.ndarray:  # noqa: D102
        steep, distance = np.exp(theta[1]), np.log(compute) - theta[2]
        gain = special.expit(steep * distance)
        inner = (theta[0] - self.start_score) * gain * (1 - gain) * steep
        return np.stack([gain, inner * distance, -inner], 1)

    def start(self, compute: np.ndarray, score: np.ndarray) -> np.ndarray:  # noqa: D102
        low, high = self.bounds(compute)
        steep, middle = np.meshgrid(np.linspace(low[1], high[1], 30), np.linspace(low[2], high[2], 60), indexing="ij")
        steep, middle = steep.ravel(), middle.ravel()
        gains = special.expit(np.exp(steep)[:, None] * (np.log(compute) - middle[:, None]))
        # Given B and C_mid the curve is linear in A, and the squared error is a parabola in it.
        cross, square = gains @ (score - self.start_score), (gains**2).sum(1)
        rise = np.clip(cross / np.maximum(square, 1e-12), 1e-6, self.highest - self.start_score)
        best = int(np.argmin(square * rise**2 - 2 * cross * rise))
        return np.array([self.start_score + rise[best], steep[best], middle[best]])

    def bounds(self, compute: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # noqa: D102
        first, last = np.log(compute.min()), np.log(compute.max())
        return (
            np.array([self.start_score, np.log(0.05), first - np.log(100)]),
            np.array([self.highest, np.log(20.0), last + np.log(100)]),
        )

    def shown(self, theta: np.ndarray) -> dict[str, float]:  # noqa: D102
        return {"A": float(theta[0]), "B": float(np.exp(theta[1])), "C_mid": float(np.exp(theta[2]))}


@dataclass(frozen=True)
class PowerLaw:
    """a - b C^-c, rising or falling; inside, compute is counted in `unit`. `highest` None: no upper limit of a."""

    unit: float
    highest: float | None = 1.0
    name = "power"
    names = ("a", "b", "c")

    def value(self, theta: np.ndarray, compute: np.ndarray) -> np.ndarray:  # noqa: D102
        return theta[0] - theta[1] * (compute / self.unit) ** -np.exp(theta[2])

    def slopes(self, theta: np.ndarray, compute: np.ndarray) -> np.ndarray:  # noqa: D102
        exponent, ratio = np.exp(theta[2]), compute / self.unit
        shrunk = ratio**-exponent
        return np.stack([np.ones_like(shrunk), -shrunk, theta[1] * exponent * shrunk * np.log(ratio)], 1)

    def start(self, compute: np.ndarray, score: np.ndarray) -> np.ndarray:  # noqa: D102
        low, high = self.bounds(compute)
        exponents = np.linspace(low[2], high[2], 60)
        shrunk = (compute / self.unit) ** -np.exp(exponents)[:, None]
        # Given c the curve is a straight line in C^-c.
        middle = shrunk.mean(1, keepdims=True)
        slope = ((shrunk - middle) @ score) / np.maximum(((shrunk - middle) ** 2).sum(1), 1e-12)
        asymptote = np.clip(score.mean() - slope * middle[:, 0], low[0], high[0])
        slope = (shrunk * (score - asymptote[:, None])).sum(1) / (shrunk**2).sum(1)
        best = int(np.argmin(((score - asymptote[:, None] - slope[:, None] * shrunk) ** 2).sum(1)))
        return np.array([asymptote[best], -slope[best], exponents[best]])

    def bounds(self, compute: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # noqa: D102
        most = np.inf if self.highest is None else self.highest
        return np.array([0.0, -np.inf, np.log(0.01)]), np.array([most, np.inf, np.log(10.0)])

    def shown(self, theta: np.ndarray) -> dict[str, float]:  # noqa: D102
        exponent = float(np.exp(theta[2]))
        return {"a": float(theta[0]), "b": float(theta[1] * self.unit**exponent), "c": exponent}


@dataclass(frozen=True)
class Fit:
    """A law fitted to points: parameters, residuals, and the parameters of bootstrap draws, (draws, 3)."""

    law: Law
    compute: np.ndarray
    score: np.ndarray
    theta: np.ndarray
    draws: np.ndarray

    @property
    def residuals(self) -> np.ndarray:
        """Score minus curve, (n,)."""
        return self.score - self.law.value(self.theta, self.compute)

    @property
    def rmse(self) -> float:
        """Root of the mean squared residual."""
        return float(np.sqrt(np.mean(self.residuals**2)))

    def parameters(self) -> dict[str, dict[str, float]]:
        """Return each parameter as `value`, `low`, `high`."""
        value = self.law.shown(self.theta)
        drawn = [self.law.shown(theta) for theta in self.draws]
        found = {}
        for name in self.law.names:
            low, high = np.quantile([one[name] for one in drawn], _ends())
            found[name] = {"value": value[name], "low": min(low, value[name]), "high": max(high, value[name])}
        low, high = asymptote_profile(self)
        first = found[self.law.names[0]]
        found[self.law.names[0]] |= {"low": min(first["low"], low), "high": max(first["high"], high)}
        return {name: {end: float(value) for end, value in of.items()} for name, of in found.items()}

    def band(self, compute: np.ndarray, measured: bool = False) -> np.ndarray:
        """Return (3, n): curve and its 95% interval at each compute; `measured`: the interval of a new measurement."""
        drawn = np.stack([self.law.value(theta, compute) for theta in self.draws])
        if measured:
            rng = np.random.default_rng(0)
            drawn = drawn + rng.choice(_residuals(self.law, self.theta, self.compute, self.score), drawn.shape)
        value = self.law.value(self.theta, compute)
        low, high = np.quantile(drawn, _ends(), axis=0)
        return np.stack([value, np.minimum(low, value), np.maximum(high, value)])


def fit_law(law: Law, compute: np.ndarray, score: np.ndarray, *, draws: int = 400, seed: int = 0) -> Fit:
    """Fit a law by least squares, with a moving-block bootstrap of its residuals.

    Args:
        law: which one.
        compute: (n,), positive, in any one unit.
        score: (n,).
        draws: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: fewer than ten points, or all at one compute.
    """
    compute, score = np.asarray(compute, dtype=float), np.asarray(score, dtype=float)
    if len(score) < FEWEST:
        raise DataError(
            f"a fit of three parameters needs at least {FEWEST} points, there are {len(score)}. Evaluate more "
            "checkpoints, or lower `from_compute`."
        )
    if compute.min() <= 0 or compute.min() == compute.max():
        raise DataError("a curve over compute needs points at different, positive compute")
    theta = least_squares(law, compute, score)
    value = law.value(theta, compute)
    spread, rng = _residuals(law, theta, compute, score) * _few_blocks(len(score)), np.random.default_rng(seed)
    drawn = [least_squares(law, compute, value + _blocks(spread, rng)) for _ in range(draws)]
    return Fit(law, compute, score, theta, np.stack(drawn))


def least_squares(law: Law, compute: np.ndarray, score: np.ndarray, asymptote: float | None = None) -> np.ndarray:
    """Return the parameters (3,) of least squared error; with `asymptote` that one is held fixed."""
    low, high = law.bounds(compute)
    start = np.clip(law.start(*_thinned(compute, score)), low, high)
    free = slice(0, 3) if asymptote is None else slice(1, 3)

    def whole(theta: np.ndarray) -> np.ndarray:
        return theta if asymptote is None else np.concatenate([[asymptote], theta])

    found: Any = optimize.least_squares(
        lambda theta: law.value(whole(theta), compute) - score,
        start[free],
        lambda theta: law.slopes(whole(theta), compute)[:, free],  # pyright: ignore[reportArgumentType]
        bounds=(low[free], high[free]),
        x_scale="jac",
        max_nfev=200,
    )
    return whole(found.x)


def asymptote_profile(fit: Fit) -> tuple[float, float]:
    """Return the 95% interval of the asymptote by its profile of squared errors.

    All asymptotes whose best fit has SSE <= SSE_min (1 + F_{0.95}(1, n - 3) / (n - 3)); it ends where the law's bounds
    do, which means that the points do not bound it.
    """
    law, count = fit.law, len(fit.score)
    low, high = (float(ends[0]) for ends in law.bounds(fit.compute))
    best = float((fit.residuals**2).sum())
    allowed = best * (1 + float(stats.f.ppf(LEVEL, 1, count - 3)) / (count - 3)) + 1e-12

    def excess(asymptote: float) -> float:
        theta = least_squares(law, fit.compute, fit.score, asymptote)
        return float(((fit.score - law.value(theta, fit.compute)) ** 2).sum()) - allowed

    ends = []
    for limit in (low, high):
        step, near = 0.05 * float(np.ptp(fit.score)) * (1 if limit > fit.theta[0] else -1), float(fit.theta[0])
        for _ in range(60):  # doubling steps: a limit may be infinite
            far = max(low, min(high, near + step))
            if excess(far) > 0:
                near = float(optimize.brentq(excess, near, far, xtol=1e-5 * abs(step)))  # pyright: ignore[reportArgumentType]
                break
            near, step = far, 2 * step
            if near == limit:
                break
        ends.append(near)
    return ends[0], ends[1]


def is_open(fit: Fit, parameters: dict[str, dict[str, float]]) -> bool:
    """Whether the asymptote's interval reaches a limit of the law: the points do not bound it."""
    low, high = (float(ends[0]) for ends in fit.law.bounds(fit.compute))
    found = parameters[fit.law.names[0]]
    slack = 1e-3 * float(np.ptp(fit.score))
    rising = fit.law.value(fit.theta, fit.compute[-1:])[0] >= fit.law.value(fit.theta, fit.compute[:1])[0]
    return found["high"] >= high - slack if rising else found["low"] <= low + slack


def backtest(law: Law, compute: np.ndarray, score: np.ndarray, *, draws: int, seed: int) -> dict[str, Any] | None:
    """Fit the first half of the points and forecast the second; None where a half has too few points.

    Returns:
        `points` forecast, `rmse`, `relative_error` (mean of |forecast - score| / score; ARE of arXiv 2410.11840), and
        `inside`, the share of points in the 95% interval of a new measurement.
    """
    half = len(score) // 2
    if half < FEWEST:
        return None
    fit = fit_law(law, compute[:half], score[:half], draws=draws, seed=seed)
    value, low, high = fit.band(compute[half:], measured=True)
    later = score[half:]
    return {
        "points": len(later),
        "rmse": float(np.sqrt(np.mean((value - later) ** 2))),
        "relative_error": float(np.mean(np.abs(value - later) / np.maximum(np.abs(later), 1e-12))),
        "inside": float(np.mean((later >= low) & (later <= high))),
    }


def refusals(fit: Fit, parameters: dict[str, dict[str, float]], to: float, tested: dict[str, Any] | None) -> list[str]:
    """Return why a fit must not be extended to a compute; empty where it may be."""
    last, reasons = float(fit.compute.max()), []
    if to > FARTHEST * last:
        reasons.append(f"{to:g} is {to / last:.1f} times the largest compute; no forecast beyond {FARTHEST:g} times")
    if fit.law.name == "sigmoid":
        trend: Any = stats.kendalltau(fit.compute, fit.score)  # NaN where all scores are alike
        if not trend.statistic > 0:
            reasons.append("the score does not rise with compute, and a sigmoid cannot fall")
        if parameters["C_mid"]["value"] > last:
            reasons.append("less than half of the fitted gain has been seen (C_mid lies beyond the points)")
    if is_open(fit, parameters):
        reasons.append(f"the points do not bound the asymptote {fit.law.names[0]}")
    if tested and tested["inside"] < 0.5:
        reasons.append(f"fitted to the first half, {tested['inside']:.0%} of the second lie in its 95% interval")
    return reasons


def _ends() -> tuple[float, float]:
    return (1 - LEVEL) / 2, (1 + LEVEL) / 2


def _residuals(law: Law, theta: np.ndarray, compute: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Return centred residuals at the size of the errors: a fit pulls itself to points of high leverage."""
    slopes = law.slopes(theta, compute)
    free = slopes[:, np.abs(slopes).max(0) > 0]
    leverage = (np.linalg.qr(free / np.linalg.norm(free, axis=0))[0] ** 2).sum(1)
    scaled = (score - law.value(theta, compute)) / np.sqrt(1 - np.minimum(leverage, MOST_LEVERAGE))
    return scaled - scaled.mean()


def _block_length(count: int) -> int:
    return int(np.ceil(count ** (1 / 3)))


def _few_blocks(count: int) -> float:
    """Return by how much a percentile interval from so few blocks is too narrow (Hesterberg 2015, section 5.3)."""
    blocks = count / _block_length(count)
    quantile = (1 + LEVEL) / 2
    return float(np.sqrt(blocks / (blocks - 1)) * stats.t.ppf(quantile, blocks - 1) / stats.norm.ppf(quantile))


def _blocks(residuals: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw neighbouring residuals together; the last one's neighbour is the first, so that all are drawn alike."""
    count, length = len(residuals), _block_length(len(residuals))
    starts = rng.integers(0, count, int(np.ceil(count / length)))
    return residuals[(starts[:, None] + np.arange(length)).ravel()[:count] % count]


def _thinned(compute: np.ndarray, score: np.ndarray, most: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Average neighbours where there are many points: a start needs no more."""
    if len(score) <= most:
        return compute, score
    parts = np.array_split(np.arange(len(score)), most)
    return (
        np.array([np.exp(np.log(compute[part]).mean()) for part in parts]),
        np.array([score[p].mean() for p in parts]),
    )
