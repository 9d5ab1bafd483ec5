import json
import re

import numpy as np
import pytest
from tiny import save_tiny
from unlearning_world import PEOPLE, fact, two_paths, write_recipe, write_rows

from afterglow.core.errors import DataError, RecipeError
from afterglow.core.recipe import read_recipe
from afterglow.eval import path_audit
from afterglow.eval.evaluate import run
from afterglow.eval.path_dependence import (
    audit,
    depth_index,
    depth_label,
    divergence,
    forget_score,
    growth_rate,
    path_spread,
    recency_index,
    stage_utility,
)
from afterglow.eval.path_report import show


def test_numbers_by_hand():
    assert forget_score([-1, -2], [-3, -5]) == 2.5
    assert stage_utility(-1.0, -1.25) == stage_utility(-1.25, -1.0) == 0.75
    assert divergence([1, 2], [1, 4]) == 2 and divergence([[1, 0], [0, 0]], [[0, 1], [0, 0]]) == 1
    assert growth_rate([0, 1, 2], [1, 4, 16]) == pytest.approx(np.log(4))
    assert growth_rate([0, 1, 2], [0, 1, np.e]) == pytest.approx(1), "models that start alike"
    assert growth_rate([0, 1], [0, 1]) is None
    assert recency_index([0, 1, 2, 3], [9, 5, 6, 1]) == pytest.approx(-0.8)
    assert recency_index([0, 1], [9, 5]) is recency_index([0, 1, 2], [5, 5, 5]) is None
    assert depth_index(2.0, 1.0) == 0.5 and depth_index(0.0, 1.0) is None
    assert [depth_label(x) for x in (0.5, 0.4, None)] == ["deep", "superficial", "nothing forgotten"]
    with pytest.raises(DataError, match="the same probes"):
        divergence([1], [1, 2])


def test_path_spread_is_an_analysis_of_variance():
    """Means 1, 4; within both variance 1: F = 2 x 4.5 / 1."""
    wide = path_spread(
        {"a": [0.5 - 0.2071067811865476, 1.5 + 0.2071067811865476], "b": [3.2928932188134525, 4.707106781186548]}
    )
    assert wide["spread"] == pytest.approx(3) and wide["path_variance"] == pytest.approx(4.5)
    assert wide["seed_variance"] == pytest.approx(1) and wide["ratio"] == pytest.approx(9)
    assert 0.05 < wide["p_value"] < 0.1, "three nats of spread over two seeds are not yet a finding"
    one = path_spread({"a": [1.0], "b": [4.0]})
    assert one["spread"] == 3 and one["ratio"] is one["p_value"] is one["seed_variance"] is None


def test_the_linear_theorem():
    """Theorem 1 of 2510.16629: two linear models that learned A and B in other orders, then ascend on the same loss.

    Their difference is (I + M)^t D0 exactly, D grows at least at the bound's rate, and an audit finds that rate.
    """
    rng = np.random.default_rng(0)
    d, k, m, eta, mu = 40, 12, 30, 0.05, 0.1
    x = {name: rng.normal(size=(k, d)) / np.sqrt(d) for name in "AB"}
    y = {name: rng.normal(size=k) for name in "AB"}
    x_u, y_u, test = rng.normal(size=(k, d)) / np.sqrt(d), rng.normal(size=k), rng.normal(size=(m, d))

    def learn(theta, name):
        gram = x[name].T @ x[name] + mu * np.eye(d)
        return np.linalg.solve(gram, x[name].T @ y[name] + mu * theta)

    first, second = learn(learn(np.zeros(d), "A"), "B"), learn(learn(np.zeros(d), "B"), "A")
    matrix = 2 * eta / k * x_u.T @ x_u
    difference = first - second
    rows = np.linalg.pinv(x_u) @ x_u  # projector onto what the forget set sees
    seen = rows @ difference
    rho = seen @ matrix @ seen / (seen @ seen)
    singular = np.linalg.svd(test @ rows, compute_uv=False)
    sigma = singular[singular > 1e-9].min()
    outside = np.linalg.norm(test, 2) * np.linalg.norm(difference - seen)
    t0 = max(0, int(np.ceil(np.log(2 * outside / (sigma * np.linalg.norm(seen))) / np.log1p(rho))))
    steps, distances = [], []
    a, b = first.copy(), second.copy()
    last = t0 + 4000
    for t in range(last + 1):
        if t % 100 == 0 or t == last:
            closed = np.linalg.matrix_power(np.eye(d) + matrix, t) @ difference
            np.testing.assert_allclose(a - b, closed, rtol=1e-6, atol=1e-8)
            steps.append(t)
            distances.append(divergence((test @ a)[:, None], (test @ b)[:, None]))
            if t >= t0:
                assert distances[-1] >= sigma**2 * (seen @ seen) / (4 * m) * (1 + rho) ** (2 * t)
        a, b = (theta + 2 * eta / k * x_u.T @ (x_u @ theta - y_u) for theta in (a, b))
    late = [(t, value) for t, value in zip(steps, distances, strict=True) if t > last - 1000]
    rate, largest = growth_rate(*zip(*late, strict=True)), np.linalg.eigvalsh(matrix).max()
    assert 2 * np.log1p(rho) < rate == pytest.approx(2 * np.log1p(largest), rel=0.02)


def test_the_eight_parts():
    found = audit(two_paths(), "forget", target=1.0, retrained={"probes": [0.0, 1.0]})["npo"]
    assert found["steps"] == [0, 5, 10] and found["seeds"] == [0, 1]
    assert (
        found["initial_state"]["early"] == found["initial_state"]["late"] == pytest.approx({"answer": -1, "skill": -1})
    )
    assert found["outcome"]["early"] == pytest.approx({"forget_score": 3.525, "skill_utility": 0.9})
    assert found["outcome"]["late"] == pytest.approx({"forget_score": 0.525, "skill_utility": 1.0})
    (pair,) = found["divergence"]
    assert pair["paths"] == ["early", "late"] and pair["curve"] == pytest.approx([0, 0.125, 0.5])
    assert pair["growth_rate"] == pytest.approx(np.log(4) / 5)
    assert found["spread"]["forget_score"][-1]["spread"] == pytest.approx(3.0)
    assert found["steps_to_target"] == {"early": pytest.approx(1 / 0.3525), "late": None}
    assert found["recency_index"] is None, "two paths have no rank correlation"
    assert found["depth"]["early"] == {"index": pytest.approx(3 / 4.05), "label": "deep"}
    assert found["depth"]["late"] == {"index": pytest.approx(0.0), "label": "superficial"}
    assert found["retrained_distance"]["late"][-1] == {"step": 10, "distance": pytest.approx(1.0)}
    assert audit(two_paths(), "forget", 1.0)["npo"]["retrained_distance"] is None


def test_all_eight_parts_are_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    show(audit(two_paths(), "forget", target=1.0, retrained={"probes": [0.0, 1.0]}), tmp_path)
    said = " ".join(re.sub(r"[│┃━┏┓┗┛┡┩─┼┤├└┘┴┬╇╈]", " ", capsys.readouterr().out).split())
    for part in (
        "npo, 1 before unlearning (log-probability)", "early -1.000 -1.000 late -1.000 -1.000",
        "largest - smallest 0.000 0.000", "early 3.525 0.900 2.8 deep (0.74) 0.5", "late 0.525 1.000 never superficial",
        "3 divergence D, early / late: 0 to 0.5, log D grows by +0.277 a step",
        "4 spread, forget score: 3.000 (path over seed variance F =", "widest 3.000 at step 10",
        "6 recency index, none (fewer than three paths",
    ):  # fmt: skip
        assert part in said, part


def test_unequal_paths_are_refused():
    with pytest.raises(DataError, match="different seeds or steps"):
        audit(two_paths()[:-1], "forget", 1.0)
    with pytest.raises(DataError, match="has no stage 'secrets'"):
        audit(two_paths(), "secrets", 1.0)


@pytest.fixture
def trainings(tmp_path):
    """Two starts, and two runs with checkpoints at steps 2 and 4 (one also at 6), as a training leaves them."""
    paths = []
    for i, order in enumerate((["forget", "skill"], ["skill", "forget"])):
        save_tiny(tmp_path / f"p{i}", seed=i)
        run_folder = tmp_path / f"p{i}-npo"
        for step in (2, 4, 6)[: 2 + i]:
            save_tiny(run_folder / f"checkpoint-{step}", seed=10 * i + step)
        history = [{"step": 2, "grad_norm": 0.5}, {"step": 4, "grad_norm": 0.25}, {"train_runtime": 1.0}]
        (run_folder / "checkpoint-4" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        (run_folder / "config.yaml").write_text(f"learning_rate: 1e-5\noutput_dir: {run_folder}\nseed: 0\n")
        (run_folder / "manifest.json").write_text(json.dumps({"data": {"data": "abc", "model": f"{i}"}}))
        paths.append({"order": order, "method": "npo", "start": str(tmp_path / f"p{i}"), "run": str(run_folder)})
    return paths


@pytest.fixture
def recipe(tmp_path, trainings):
    facts = [fact(name, i) | {"alternative": ["I do not know.", "No idea."]} for i, name in enumerate(PEOPLE[:3])]
    write_rows(tmp_path / "forget.jsonl", facts)
    write_rows(tmp_path / "skill.jsonl", [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(3)])

    def write(name="audit", **changes):
        keys = {
            "suite": "path_dependence", "output_dir": str(tmp_path / name), "paths": trainings, "target": 0.01,
            "forget": str(tmp_path / "forget.jsonl"), "probes": {"skill": str(tmp_path / "skill.jsonl")},
        }  # fmt: skip
        return write_recipe(tmp_path / f"{name}.yaml", **(keys | changes))

    return write


def test_audit_of_checkpoints(recipe, trainings, tmp_path, capsys, monkeypatch):
    path = recipe(retrained=trainings[0]["start"])
    folder = run(read_recipe(path))
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [row["key"].split("|", 1)[1] for row in rows[:-1]] == [f"npo|0|{s}" for s in (0, 2, 4)] * 2, "common steps"
    assert rows[0]["distance"] == 0 < rows[1]["distance"] and rows[0]["paraphrase_variance"] > 0
    assert [row["grad_norm"] for row in rows[:3]] == [None, None, 0.25]
    assert rows[-1]["key"] == "retrained" and rows[-1]["answer"] == rows[0]["answer"]
    found = json.loads((folder / "audit.json").read_text())["npo"]
    assert set(found["outcome"]) == {"forget > skill", "skill > forget"} and found["steps"] == [0, 2, 4]
    assert found["retrained_distance"]["forget > skill"][0] == {"step": 0, "distance": 0}
    before, after = rows[0], rows[2]
    expected = np.mean(np.concatenate(before["forget"])) - np.mean(np.concatenate(after["forget"]))
    assert found["outcome"]["forget > skill"]["forget_score"] == pytest.approx(expected)
    assert len(rows[0]["forget"][0]) == 2, "the answer and its paraphrase; alternatives are no way to say it"
    rise = rows[2]["alternative"] - rows[0]["alternative"]
    assert found["outcome"]["forget > skill"]["alternative_rise"] == pytest.approx(rise) != 0
    assert "not told from the noise of seeds" in capsys.readouterr().out.replace("\n", " ")

    whole = (folder / "rows.jsonl").read_bytes()  # killed after four checkpoints, in the middle of the fifth
    (folder / "rows.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:4]) + b'{"key": "sk')
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"finished": None}))
    probed, probe_model = [], path_audit.probe_model
    monkeypatch.setattr(path_audit, "probe_model", lambda *given: probed.append(1) or probe_model(*given))
    run(read_recipe(path))
    assert (folder / "rows.jsonl").read_bytes() == whole and len(probed) == 3


def test_audits_that_would_compare_something_else(recipe, trainings, tmp_path):
    other = tmp_path / "p1-npo" / "config.yaml"
    other.write_text(other.read_text().replace("1e-5", "2e-5"))
    with pytest.raises(RecipeError, match=r"both npo, but `learning_rate` is '1e-5' in one and '2e-5'"):
        run(read_recipe(recipe()))
    for changes, says in (
        ({"paths": trainings[:1]}, "fewer than two entries"),
        ({"paths": [trainings[0], trainings[0]]}, "stands twice"),
        ({"forget_stage": "secrets"}, "has no stage 'secrets'"),
        ({"paths": [trainings[0], trainings[1] | {"ordr": []}]}, r"paths, entry 2: unknown key `ordr`"),
    ):
        with pytest.raises(RecipeError, match=says):
            run(read_recipe(recipe(**changes)))
    empty = trainings[1] | {"run": str(tmp_path / "p0")}
    with pytest.raises(RecipeError, match=r"p0 has no checkpoint-N folder.*save_strategy"):
        run(read_recipe(recipe(paths=[trainings[0], empty])))
    assert not (tmp_path / "audit").exists()
