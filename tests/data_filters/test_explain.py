import pytest
from filter_tables import row, write_jsonl

from afterglow.core.errors import DataError, RunFolderError
from afterglow.core.recipe import read_recipe
from afterglow.data_filters.chain import run
from afterglow.data_filters.explain import explain, show_explanation
from afterglow.data_filters.flow import general
from afterglow.launch.cli import main


@pytest.fixture
def recipe(tmp_path):
    rows = [row(f"r{n}", " ".join(["word"] * n) + f" {n}", problem_id=f"p{n}") for n in range(1, 9)]
    rows.append(row("bench", "an answer of five words", prompt="What is 2+2?"))
    bench = write_jsonl(tmp_path / "bench.jsonl", [{"problem": "What is 2 + 9 ?"}, {"problem": "What is 2+2?"}])
    rows = [
        r | {"prompt": [{"role": "user", "content": f"What is {r['id']}?"}]} if r["id"] != "bench" else r for r in rows
    ]
    (tmp_path / "r.yaml").write_text(
        f"data: {write_jsonl(tmp_path / 'd.jsonl', rows)}\noutput_dir: {tmp_path / 'run'}\nsteps:\n"
        f"  - decontamination: {{benchmarks: [{bench}]}}\n"
        "  - length: {min_words: 3, max_words: 6}\n  - deduplication\n"
    )
    return tmp_path / "r.yaml"


def test_every_step_up_to_the_one_that_dropped_it(recipe):
    section = read_recipe(recipe)
    with pytest.raises(RunFolderError, match="no step has finished here"):
        explain(section, "r1")
    run(section)
    found, unseen = explain(section, "r8")
    assert [(d.step, d.rows, d.reason) for d in found] == [
        ("decontamination", 9, None),
        ("length", 8, "more than 6 words"),
    ]
    assert found[1].scores == {"n_words": 9} and found[1].ranks == {"n_words": (7, 8)} and unseen == ["deduplication"]
    assert found[1].settings["max_words"] == 6 and found[0].scores["contaminated_by"] is None
    found, unseen = explain(section, "bench")
    assert found[0].reason == "equals an item of bench.jsonl (item 1)" and unseen == ["length", "deduplication"]
    assert found[0].scores == {"contaminated_by": "bench.jsonl/1", "contamination": 1.0}
    found, unseen = explain(section, "r4")
    assert [d.reason for d in found] == [None] * 3 and unseen == []


def test_what_is_printed(recipe, capsys):
    assert main(["filter", str(recipe)]) == 0
    capsys.readouterr()
    assert main(["filter", str(recipe), "--explain", "r8"]) == 0
    shown = capsys.readouterr().out
    assert "2 length (8 rows)  dropped: more than 6 words" in shown and "n_words = 9  above 7 of 8 rows" in shown
    assert "max_words: 6" in shown and "r8 was dropped by length. deduplication never saw it." in shown
    show_explanation(read_recipe(recipe), "r4")
    assert "r4 was kept by every step." in capsys.readouterr().out


def test_unknown_rows_and_other_recipes_are_refused(recipe):
    run(read_recipe(recipe))
    with pytest.raises(DataError, match=r"no row with the id 'r99' came in.*kept.jsonl"):
        explain(read_recipe(recipe), "r99")
    with pytest.raises(RunFolderError, match="another config"):
        explain(read_recipe(recipe, ["--steps.length.max_words", "9"]), "r1")


def test_a_changed_benchmark_is_another_run(recipe, tmp_path):
    run(read_recipe(recipe))
    write_jsonl(tmp_path / "bench.jsonl", [{"problem": "What is r3?"}])
    with pytest.raises(RunFolderError, match=r"decontamination\.sources` has changed"):
        run(read_recipe(recipe))


def test_reasons_are_counted_without_what_is_the_rows_own():
    assert general("equals an item of math (item 3 (b), 50% of it)") == "equals an item of math"
    assert general("rsr: 0.125, while another of its problem has 1.5") == "rsr: #, while another of its problem has #"
    assert general("more than 6 words") == "more than 6 words"
