"""The pages in the repository: every number comes from the rows, every study is stated in full."""

import re
from pathlib import Path

import pandas as pd
import pytest
from evidence_rows import results, study

from afterglow.core.errors import DataError
from afterglow.evidence.__main__ import main, pages, studies
from afterglow.evidence.page import overview, study_figure, study_page
from afterglow.launch import pipeline_recipe
from afterglow.launch.pipeline_recipe import check_stages, parse_pipeline

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "recipes/evidence").glob("*.yaml") if "\nstudy:" in path.read_text())
WITH_ROWS = sorted(path.parent.name for path in (ROOT / "evidence/results").glob("*/runs.json"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_pages_are_what_the_rows_give():
    for path, text in pages(studies()).items():
        if path.suffix == ".md":  # a figure's bytes depend on matplotlib's version
            assert path.read_text(encoding="utf-8") == text, f"{path}: run `python -m afterglow.evidence`"
        assert path.is_file()
    made = {path.stem for path in (ROOT / "docs/evidence").glob("*.md")} - {"README"}
    assert made == set(WITH_ROWS), "a page without rows, or rows without a page"


@pytest.mark.parametrize("name", WITH_ROWS)
def test_scores_are_those_of_the_rows_counted_another_way(name):
    statement, _ = studies()[name]
    rows = pd.read_parquet(ROOT / "evidence/results" / name / "problems.parquet")
    text = (ROOT / "docs/evidence" / f"{name}.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \[", text, re.MULTILINE))
    first = rows[rows["task"] == next(iter(statement.tasks))]
    shares = (first["correct"] / first["n"]).groupby(first["arm"]).mean()
    assert {arm: f"{100 * shares[arm]:.1f}" for arm in table} == table and len(table) == len(shares) > 1
    by_seed = (first["correct"] / first["n"]).groupby([first["arm"], first["seed"]]).mean()
    for other in statement.against:
        mean = (by_seed[statement.arm] - by_seed[other]).mean()
        assert f"| `{other}` | {statement.against[other]} | {100 * mean:+.1f} [" in text


@pytest.mark.parametrize("name", NAMES)
def test_a_statement_fits_its_pipeline(name):
    statement, _ = studies()[name]
    _, stages = parse_pipeline(f"recipes/evidence/{name}.yaml", [])
    evaluations = [stage for stage in stages if stage.verb == "eval"]
    seeds: dict[str, list[int]] = {}
    for stage in evaluations:
        seeds.setdefault(stage.group or stage.label, []).append(stage.keys.get("seed", 0))
        assert set(statement.tasks) == {Path(task).stem for task in stage.section().values["tasks"]}
    assert set(seeds) == set(statement.arms)
    deciding = [seeds[arm] for arm in (statement.arm, *statement.against)]
    assert len(deciding[0]) >= 3 and all(of_arm == deciding[0] for of_arm in deciding), "seeds are not paired"


@pytest.mark.parametrize("name", NAMES)
def test_every_input_is_made_by_an_earlier_stage(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline_recipe, "parse_recipe", lambda verb, section: None)  # tests/recipes does, slowly
    check_stages(parse_pipeline(f"evidence/{name}.yaml", [])[1])


def test_every_study_has_a_target():
    makefile = (ROOT / "Makefile").read_text()
    named = re.search(r"^evidence: (.*) ##", makefile, re.MULTILINE)
    assert named and sorted(named[1].split()) == [f"evidence-{name}" for name in NAMES]
    assert all(f"python -m afterglow.evidence {name}\n" in makefile for name in NAMES)


def test_what_is_no_study_is_refused(capsys):
    assert main(["nothing"]) == 1 and "evidence/nothing.yaml: no such recipe" in capsys.readouterr().err
    assert main(["eval"]) == 1 and "no key `study`" in capsys.readouterr().err


def test_a_page_says_what_was_found_and_on_what():
    arms = {"a": [[4, 4, 3], [4, 3, 4]], "b": [[1, 0, 1], [0, 1, 1]], "c": [[0, 0, 0], [0, 0, 0]]}
    text = study_page("mine", study(), results(arms))
    assert "**Supported at this scale**: every interval lies above zero." in text
    assert "| `b` | the claim | +75.0 [" in text and "| +75.0, +75.0 |" in text
    assert "3 out of domain, 4 samples each" in text and "2 minutes in 2 stages" in text
    assert "has not changed since the commit of the first run" in text
    svg = study_figure(study(), results(arms))
    assert svg.startswith("<svg") and "<style>" in svg and "a minus b" in svg


def test_arms_that_all_lose_to_the_base_model_are_said_to():
    arms = {"a": [[2, 1]] * 2, "b": [[1, 0]] * 2, "c": [[0, 0]] * 2, "base": [[4, 4]]}
    statement = study(arms={"a": "the method", "b": "the other", "c": "nothing", "base": "before training"})
    assert "Every trained arm ends below `base`" in study_page("mine", statement, results(arms))
    assert "(all arms end below the base model)" in overview({"mine": (statement, results(arms))}, "", all_studies=True)
    arms["base"] = [[1, 1]]
    assert "Every trained arm ends below" not in study_page("mine", statement, results(arms))


def test_an_overview_needs_the_controls_and_names_what_was_not_run():
    table = overview({"mine": (study(), None)}, "docs/", all_studies=True)
    assert "not run yet" in table and "`make evidence-mine`" in table
    assert "mine" not in overview({"mine": (study(), None)}, "docs/", all_studies=False)
    with pytest.raises(DataError, match="no verdict"):
        overview({"mine": (study(), results({"a": [[4, 0], [4, 0]]}))}, "", all_studies=True)
