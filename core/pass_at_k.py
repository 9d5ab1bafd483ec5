"""How good are k samples? Exact expectations over the subsets of the n samples that a problem has.

n is the number of samples of a problem, c the number of correct ones. Nothing is padded and nothing is estimated from
p = c/n: the plug-in 1 - (1 - c/n)^k is biased low (n = 16, k = 8, p = 0.02: 0.122 instead of 0.149).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import gammaln
from scipy.stats import hypergeom

from .errors import DataError, RecipeError

MAX_NAMES_SHOWN = 5


def check_k(k: Sequence[int], n: int) -> None:
    """Refuse values of k that n samples cannot answer.

    Raises:
        RecipeError: a k below 1 or above n.
    """
    if bad := [value for value in k if value < 1]:
        raise RecipeError(f"`k` is {bad[0]}: use whole numbers from 1.")
    if bad := [value for value in k if value > n]:
        raise RecipeError(
            f"`k` is {bad[0]}, but there are only {n} samples per problem. pass@k needs n >= k: raise `n` or lower `k`."
        )


def check_complete(samples: Mapping[str, int], n: int, where: str) -> None:
    """Refuse problems with fewer samples than n: padding them would lower the score without a word.

    Args:
        samples: problem id -> number of samples.
        n: samples that each must have.
        where: what is being scored, for the message.

    Raises:
        DataError: names up to five of the problems.
    """
    short = {name: count for name, count in samples.items() if count < n}
    if short:
        names = ", ".join(f"{name!r} ({count})" for name, count in list(short.items())[:MAX_NAMES_SHOWN])
        more = f" and {len(short) - MAX_NAMES_SHOWN} more" if len(short) > MAX_NAMES_SHOWN else ""
        raise DataError(
            f"{where}: {len(short)} of {len(samples)} problems have fewer than {n} samples: {names}{more}. Sample the "
            "missing ones, or lower `n`."
        )


def pass_at_k(n: int, correct: Sequence[int] | np.ndarray, k: int) -> np.ndarray:
    """Probability that at least one of k samples, drawn without replacement from n, is correct.

    1 - C(n-c, k) / C(n, k) as the product 1 - prod_{i=n-c+1..n} (1 - k/i), arXiv 2107.03374, equation 1.

    Args:
        n: samples per problem.
        correct: correct samples of each problem, (problems,).
        k: size of the draw.

    Returns:
        (problems,) probabilities; k = 1 is the mean accuracy, avg@n.

    Raises:
        RecipeError: k is below 1 or above n.
    """
    check_k([k], n)
    factors = np.maximum(1 - k / np.arange(n, 0, -1), 0)  # from i = n down; 0 from i = k on: a hit is certain
    return (1 - np.concatenate([[1.0], np.cumprod(factors)]))[np.asarray(correct, dtype=int)]


def g_pass_at_k(n: int, correct: Sequence[int] | np.ndarray, k: int, tau: float) -> np.ndarray:
    """Probability that at least tau k of k samples, drawn without replacement from n, are correct.

    sum_{j >= ceil(tau k)} C(c, j) C(n-c, k-j) / C(n, k), arXiv 2412.13147, equation 4. tau = 1 is pass^k, "all k are
    correct"; a tau of at most 1/k is pass@k.

    Args:
        n: samples per problem.
        correct: correct samples of each problem, (problems,).
        k: size of the draw.
        tau: share that must be correct, above 0, at most 1.

    Raises:
        RecipeError: k is below 1 or above n, or tau is outside its range.
    """
    check_k([k], n)
    if not 0 < tau <= 1:
        raise RecipeError(f"tau of G-pass@k is {tau}: use a number above 0, at most 1.")
    least = max(1, math.ceil(tau * k - 1e-9))  # 0.7 * 10 is 7.000000000000001
    return hypergeom.sf(least - 1, n, np.asarray(correct, dtype=int), k)


def majority_at_k(classes: Sequence[tuple[int, float]], without_answer: int, k: int) -> float:
    """Expected accuracy of the most frequent answer among k samples, drawn without replacement from all n.

    Samples without an answer are drawn but cannot win. Ties are broken by a fair draw among the most frequent answers.
    A draw without any answer is wrong.

    For each answer with a right sample: sum over j of P(j of it are drawn, nothing exceeds j) / (number of answers that
    reach j), by polynomial products over the other answers (coefficient of x^i z^t: i drawn, t of them tie).

    Args:
        classes: for each distinct answer (samples, share of these samples that is correct: 1 or 0, or between where
            labels contradict each other).
        without_answer: samples without an answer.
        k: size of the draw; k = n is plain majority voting.

    Raises:
        RecipeError: k is below 1 or above n.
    """
    counts = [count for count, _ in classes]
    n = sum(counts) + without_answer
    check_k([k], n)
    total = 0.0
    for index, (count, right) in enumerate(classes):
        if right:
            others = counts[:index] + counts[index + 1 :]
            wins = (_win_share(count, others, without_answer, j, k) for j in range(1, min(count, k) + 1))
            total += right * math.fsum(wins)
    return min(total, 1.0)


def _win_share(count: int, others: Sequence[int], without_answer: int, j: int, k: int) -> float:
    """Expected share of the win of one answer when exactly j of its samples are drawn."""
    room = k - j
    ways = np.zeros((room + 1, 1))  # [drawn of the others, answers that tie], divided by exp(scale)
    drawn = np.arange(min(room, without_answer) + 1)
    logs = _log_choose(without_answer, drawn)
    scale = logs.max()
    ways[drawn, 0] = np.exp(logs - scale)
    for other in others:
        most = min(other, j, room)
        logs = _log_choose(other, np.arange(most + 1))
        factors = np.exp(logs - logs.max())
        scale += logs.max()
        product = np.zeros((room + 1, ways.shape[1] + 1))
        for i, factor in enumerate(factors):
            tied = int(i == j)
            product[i:, tied : tied + ways.shape[1]] += factor * ways[: room + 1 - i]
        peak = product.max()
        if peak == 0:
            return 0.0
        ways, scale = product / peak, scale + math.log(peak)
        if not ways[:, -1].any():
            ways = ways[:, :-1]
    shares = float((ways[room] / np.arange(1, ways.shape[1] + 1)).sum())
    if shares == 0:
        return 0.0
    n = count + sum(others) + without_answer
    log = math.log(shares) + scale + float(_log_choose(count, np.array([j]))[0] - _log_choose(n, np.array([k]))[0])
    return math.exp(log)


def _log_choose(n: int, k: np.ndarray) -> np.ndarray:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
