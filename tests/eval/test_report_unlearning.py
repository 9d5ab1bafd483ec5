import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from unlearning_world import curve_rows, two_paths

from afterglow.core.run_folder import RunFolder
from afterglow.eval.path_dependence import audit
from afterglow.eval.relearning_curve import relearning_scores
from afterglow.eval.report import run_report
from afterglow.eval.report_unlearning import merge_seeds


def write_run(path, suite, scores, **files):
    """A finished run of a suite."""
    with RunFolder.open(path, "eval", {"output_dir": str(path)}, extra={"suite": suite}) as run:
        for name, content in files.items():
            rows = (
                "".join(json.dumps(row) + "\n" for row in content) if isinstance(content, list) else json.dumps(content)
            )
            (path / (f"{name}.jsonl" if isinstance(content, list) else f"{name}.json")).write_text(rows)
        (path / "scores.json").write_text(json.dumps({suite: scores}))
        run.finish({suite: scores})


def interval(value, half=0.01):
    return {"value": value, "low": value - half, "high": value + half, "method": "x"}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name, utility, forget in (("eval-<full>", 0.61, 0.93), ("eval-npo", 0.55, 0.0004)):
        scores = {
            "forget_probability": interval(forget),
            "model_utility": interval(utility),
            "mia_loss_auc": interval(0.7),
        }
        scores["forget_quality"] = {"value": 2.2e-16, "low": 2.2e-16, "high": 2.2e-16}
        write_run(root / name, "tofu", scores | {"n": {"forget": 3}})
    rows = [{"arm": "original", "step": 0, "probability": 0.9}]
    rows += curve_rows("unlearned", [[0.1, 0.5, 0.9], [0.1, 0.5, 0.5]]) + curve_rows("retrained", [[0.1, 0.1, 0.3]] * 2)
    for name in ("relearn-npo", "relearn-ga"):
        write_run(root / name, "relearning", relearning_scores(rows, [0, 1, 3], "probability"), curves=rows)
    write_run(root / "audit", "path_dependence", {}, audit=audit(two_paths(), "forget", 1.0))
    return run_report(root).read_text()


def test_utility_and_forgetting_side_by_side(page):
    said = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert 'colspan="1">utility</th>' in page and 'colspan="2">forgetting</th>' in page
    assert "eval-&lt;full&gt;" in page and "0.610 [0.600, 0.620]" in said and "2.2e-16" in said
    assert "4.0e-04" in said, "a small probability is not rounded to zero"
    assert "mia loss auc" in said, "the scores that the table has no room for"
    assert '<h2 id="scores">' not in page, "these are no scores of samples"


def test_relearning_is_drawn_beside_one_control(page):
    (svg,) = (
        svg for svg in re.findall(r"<svg .*?</svg>", page, re.DOTALL) if 'aria-label="relearning, forget, full"' in svg
    )
    ElementTree.fromstring(svg)
    assert svg.count(">retrained<") == 1, "the same control of two runs is one curve"
    assert ">relearn-npo<" in svg and ">relearn-ga<" in svg
    said = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert "never, never" in said and "0.750" in said


def test_the_audit(page):
    said = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert "Path dependence, audit: npo" in said and "early" in said and "superficial" in said
    assert "spread, forget score: 3.000 (path over seed variance F = " in said and "distance to retrained" in said
    assert "divergence D, early / late: 0 to 0.5" in said and "recency index, none" in said
    assert 'aria-label="how far paths are apart"' in page


def test_runs_of_several_seeds_are_one_row():
    runs = [(f"eval-npo-{seed}", {"model_utility": interval(value), "n": {"forget": 3}, "privleak": interval(0.0)})
            for seed, value in ((0, 0.4), (1, 0.6))]  # fmt: skip
    del runs[1][1]["privleak"]
    runs.insert(1, ("eval-full", {"model_utility": interval(0.7)}))
    (npo, means), full = merge_seeds(runs)
    assert npo == "eval-npo, 2 seeds" and full == runs[1]
    assert list(means) == ["model_utility"], "a score that one of them lacks has no mean"
    assert [means["model_utility"][end] for end in ("value", "low", "high")] == pytest.approx(
        [0.5, 0.5 - 1.2706, 0.5 + 1.2706], abs=1e-3
    )
    assert merge_seeds(runs[:1]) == runs[:1], "one seed is itself"
