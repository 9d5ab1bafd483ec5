"""Does the outcome of unlearning depend on the order in which a model learned? The numbers of the audit.

Models that agree on everything before can end far apart after the same unlearning steps, and an unlearning rule that
sees only the forget set cannot bring all of them to the retrained model (arXiv 2510.16629, theorem 1).
Log-probabilities are means per token in nats; `steps` are optimizer steps of unlearning. Which numbers are reported is
our choice, after the paper's section 4.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from ..core.errors import DataError

AUDIT_FILE = "audit.json"
DEEP, SUPERFICIAL, NONE = "deep", "superficial", "nothing forgotten"


def forget_score(before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray) -> float:
    """Decrease of the mean log-probability of an answer and its paraphrases; higher is more forgotten (section 4.1)."""
    return float(np.mean(before) - np.mean(after))


def stage_utility(before: float, after: float) -> float:
    """1 - |change of the mean log-probability| on what another stage taught; 1 is untouched (section 4.1)."""
    return 1 - abs(after - before)


def divergence(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float:
    """Mean over probes of the squared difference of two models' predictions: d of the paper's definition 1.

    Args:
        first: (probes,) mean log-probabilities, or (probes, outputs).
        second: the same of the other model.

    Raises:
        DataError: the models were asked different probes.
    """
    one, other = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if one.shape != other.shape or not one.size:
        raise DataError(f"two models are compared on the same probes; these have {one.shape} and {other.shape}")
    return float(((one - other) ** 2).reshape(len(one), -1).sum(1).mean())


def growth_rate(steps: Sequence[int], distances: Sequence[float]) -> float | None:
    """Least-squares slope of log D over steps: per step, D grows by exp(rate). None with fewer than two positive D.

    In the paper's linear model the rate tends to 2 log(1 + the largest eigenvalue that the difference excites).
    """
    x, y = np.asarray(steps, dtype=float), np.asarray(distances, dtype=float)
    positive = y > 0
    if positive.sum() < 2:
        return None
    return float(np.polyfit(x[positive], np.log(y[positive]), 1)[0])


def path_spread(values: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """Largest difference between paths of one metric, and whether it exceeds what seeds do.

    Args:
        values: path -> one value per seed.

    Returns:
        `spread` (of the means over seeds), `path_variance` (between those means), `seed_variance` (pooled, within
        paths), `ratio` (F of the one-way analysis of variance: seeds x path variance / seed variance), its `p_value`;
        the last three are None with one seed per path.
    """
    means = np.array([np.mean(of_path) for of_path in values.values()])
    found: dict[str, float | None] = {
        "spread": float(means.max() - means.min()),
        "path_variance": float(means.var(ddof=1)) if len(means) > 1 else 0.0,
        "seed_variance": None, "ratio": None, "p_value": None,
    }  # fmt: skip
    if len(means) < 2 or any(len(of_path) < 2 for of_path in values.values()):
        return found
    within = sum(float(((np.asarray(of_path) - np.mean(of_path)) ** 2).sum()) for of_path in values.values())
    found["seed_variance"] = within / sum(len(of_path) - 1 for of_path in values.values())
    if found["seed_variance"] > 1e-18:
        test: Any = stats.f_oneway(*values.values())
        found |= {"ratio": float(test.statistic), "p_value": float(test.pvalue)}
    return found


def recency_index(positions: Sequence[int], scores: Sequence[float]) -> float | None:
    """Spearman correlation of how late the forget set was learned with how much is forgotten at equal steps.

    -1: the later it was learned, the slower it goes (the paper's recency effect). None with fewer than three paths, or
    where all are alike.

    Args:
        positions: of the forget stage in each path's order, counted from the first.
        scores: forget score of each path at the same step.
    """
    if len(set(positions)) < 2 or len(positions) < 3 or len(set(scores)) < 2:
        return None
    found: Any = stats.spearmanr(positions, scores)
    return float(found.statistic)


def depth_index(answer_change: float, paraphrase_change: float) -> float | None:
    """Decrease of the paraphrases' log-probability over that of the trained answer; None where nothing was forgotten.

    1: other ways to say it are forgotten as much; 0: only the wording.
    """
    return None if answer_change <= 0 else paraphrase_change / answer_change


def depth_label(index: float | None, threshold: float = 0.5) -> str:
    """Name a depth index; the threshold is our choice."""
    if index is None:
        return NONE
    return DEEP if index >= threshold else SUPERFICIAL


# ---------------------------------------------------------------------------------------------------------------------
# the report


def audit(
    rows: Sequence[Mapping[str, Any]],
    forget_stage: str,
    target: float,
    retrained: Mapping[str, Any] | None = None,
    threshold: float = 0.5,
) -> dict[str, Any]:
    """Return the audit in eight parts for each method.

    Args:
        rows: one per path, method, seed and step: `path`, `order` (stages, the first one first), `method`, `seed`,
            `step`, `answer`, `paraphrase` and `alternative` (mean log-probability; the latter two None without any),
            `forget` (of each question: [answer, *paraphrases]), `stages` (name -> mean log-probability), `probes` (of
            each question).
        forget_stage: name of the stage in `order` that is unlearned.
        target: forget score whose steps are reported.
        retrained: the row of a retrained model (`probes`), for the last part.
        threshold: of the depth index.

    Raises:
        DataError: a path's order has no forget stage, or paths of a method differ in steps or seeds.
    """
    methods: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if forget_stage not in row["order"]:
            raise DataError(f"path {row['path']!r}: its order {row['order']} has no stage {forget_stage!r}")
        methods.setdefault(row["method"], []).append(row)
    return {
        method: _audit_method(of_method, forget_stage, target, retrained, threshold)
        for method, of_method in methods.items()
    }


def _audit_method(
    rows: Sequence[Mapping[str, Any]], forget_stage: str, target: float, retrained: Any, threshold: float
) -> dict[str, Any]:
    table: dict[str, dict[int, dict[int, Mapping[str, Any]]]] = {}
    for row in rows:
        table.setdefault(row["path"], {}).setdefault(row["seed"], {})[row["step"]] = row
    first = next(iter(table))
    seeds, steps = sorted(table[first]), sorted(next(iter(table[first].values())))
    for path, of_path in table.items():
        if sorted(of_path) != seeds or any(sorted(of_seed) != steps for of_seed in of_path.values()):
            raise DataError(
                f"paths {first!r} and {path!r} of {rows[0]['method']} have different seeds or steps: an audit compares "
                "paths at the same steps with the same seeds"
            )

    def scores(path: str, seed: int) -> list[float]:
        run = table[path][seed]
        return [forget_score(np.concatenate(run[0]["forget"]), np.concatenate(run[step]["forget"])) for step in steps]

    def over_seeds(path: str, value: Any) -> float:
        return float(np.mean([value(table[path][seed]) for seed in seeds]))

    last, paths = steps[-1], list(table)
    curves = {path: {seed: scores(path, seed) for seed in seeds} for path in paths}
    stages = list(table[first][seeds[0]][0]["stages"])
    metrics = {"forget_score": lambda path, seed, i: curves[path][seed][i]} | {
        f"{stage}_utility": lambda path, seed, i, stage=stage: stage_utility(
            table[path][seed][0]["stages"][stage], table[path][seed][steps[i]]["stages"][stage]
        )
        for stage in stages
    }
    has_alternative = table[first][seeds[0]][0]["alternative"] is not None
    if has_alternative:  # more likely than before where it takes the place of what is forgotten
        metrics["alternative_rise"] = lambda path, seed, i: (
            table[path][seed][steps[i]]["alternative"] - table[path][seed][0]["alternative"]
        )
    positions = [list(table[path][seeds[0]][0]["order"]).index(forget_stage) for path in paths]
    ends = [float(np.mean([curves[path][seed][-1] for seed in seeds])) for path in paths]
    return {
        "steps": steps,
        "seeds": seeds,
        "initial_state": {
            path: {"answer": over_seeds(path, lambda run: run[0]["answer"])}
            | ({"alternative": over_seeds(path, lambda run: run[0]["alternative"])} if has_alternative else {})
            | {stage: over_seeds(path, lambda run, stage=stage: run[0]["stages"][stage]) for stage in stages}
            for path in paths
        },
        "outcome": {
            path: {name: float(np.mean([of(path, seed, -1) for seed in seeds])) for name, of in metrics.items()}
            for path in paths
        },
        "divergence": [
            _divergence(table, one, other, seeds, steps) for i, one in enumerate(paths) for other in paths[i + 1 :]
        ],
        "spread": {
            name: [
                {"step": step, **path_spread({path: [of(path, seed, i) for seed in seeds] for path in paths})}
                for i, step in enumerate(steps)
                if step > 0
            ]
            for name, of in metrics.items()
        },
        "steps_to_target": {
            path: _steps_to(steps, np.mean([curves[path][seed] for seed in seeds], axis=0), target) for path in paths
        },
        "recency_index": recency_index(positions, ends),
        "depth": {path: _depth(table[path], seeds, last, threshold) for path in paths},
        "retrained_distance": None if retrained is None else {
            path: [
                {"step": step, "distance": over_seeds(path, lambda run, step=step: divergence(
                    run[step]["probes"], retrained["probes"]))}
                for step in steps
            ]
            for path in paths
        },
    }  # fmt: skip


def _divergence(table: Any, one: str, other: str, seeds: Sequence[int], steps: Sequence[int]) -> dict[str, Any]:
    curve = [
        float(np.mean([divergence(table[one][s][step]["probes"], table[other][s][step]["probes"]) for s in seeds]))
        for step in steps
    ]
    return {"paths": [one, other], "curve": curve, "growth_rate": growth_rate(steps, curve)}


def _steps_to(steps: Sequence[int], curve: np.ndarray, target: float) -> float | None:
    """First step at which the curve reaches the target, linear in between; None if it never does."""
    reached = np.flatnonzero(curve >= target)
    if not len(reached):
        return None
    i = int(reached[0])
    if i == 0:
        return float(steps[0])
    share = (target - curve[i - 1]) / (curve[i] - curve[i - 1])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def _depth(of_path: Any, seeds: Sequence[int], last: int, threshold: float) -> dict[str, Any]:
    if of_path[seeds[0]][0]["paraphrase"] is None:
        return {"index": None, "label": "no paraphrases given"}
    changes = np.mean(
        [[of_path[seed][0][name] - of_path[seed][last][name] for name in ("answer", "paraphrase")] for seed in seeds],
        axis=0,
    )
    index = depth_index(float(changes[0]), float(changes[1]))
    return {"index": index, "label": depth_label(index, threshold)}
