import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from afterglow.core.errors import DataError, RecipeError, RunFolderError
from afterglow.eval.compare import compare, read_evaluation, run_compare
from afterglow.eval.scores import Sample, score, write_scores


def evaluation(folder, correct, n=4, version=1, task="sums", **more):
    """Write what an evaluation leaves: `correct` right samples of n for each problem."""
    folder.mkdir(exist_ok=True)
    scores, rows = {}, []
    for name, counts in {task: correct, **more}.items():
        problems = {
            f"<p{i}>": [Sample(j, j < right, False, "4" if j < right else f"{j}", "exact", 10) for j in range(n)]
            for i, right in enumerate(counts)
        }
        scores[name], counts_rows = score(problems, n, [1], name)
        scores[name]["version"] = version
        rows += [{"task": name, **row} for row in counts_rows]
    write_scores(folder, scores, rows)
    return folder


def test_differences_are_paired_and_adjusted_together(tmp_path, capsys):
    before = [0, 1, 2, 3, 1, 0, 2, 1, 0, 2]
    after = [1, 3, 4, 4, 2, 0, 3, 3, 2, 2]
    folders = [
        evaluation(tmp_path / "base", before, other=[2] * 6),
        evaluation(tmp_path / "tuned", after, other=[2, 1, 3, 2, 1, 3]),
    ]
    runs = [read_evaluation(folder, folder.name) for folder in folders]
    found = compare(runs)
    rows = {(row["task"], row["metric"]): row for row in found["differences"]}
    assert list(rows) == [("sums", "pass@1"), ("sums", "pass@4"), ("other", "pass@1"), ("other", "pass@4")]
    row = rows["sums", "pass@1"]
    assert (row["from"], row["to"]) == (pytest.approx(0.3), pytest.approx(0.6))
    assert row["difference"] == pytest.approx(0.3) and 0 < row["low"] < 0.3 < row["high"]
    assert row["p"] == 2 / 2**8 and row["p_holm"] == pytest.approx(4 * row["p"]), "8 problems differ; the smallest of 4"
    assert row["problems_needed"] <= 10, "it was resolved"
    assert rows["other", "pass@1"]["difference"] == 0 and rows["other", "pass@1"]["problems_needed"] is None
    assert rows["other", "pass@4"]["resolvable"] is None, "nothing differs: nothing can be said of the variance"
    flips = found["flips"][0]
    assert (flips["better"], flips["worse"], flips["same"]) == (8, 0, 2)
    assert (flips["newly_solved"], flips["no_longer_solved"]) == (2, 0)
    assert flips["problems"][0] == {"problem_id": "<p1>", "change": 0.5, "from": [1, 4], "to": [3, 4]}

    run_compare([str(folder) for folder in folders], k=[2], output_dir=str(tmp_path / "out"))
    said = capsys.readouterr().out
    assert "Holm over 2" in said and "8 problems better" in said
    assert [row["metric"] for row in json.loads((tmp_path / "out" / "compare.json").read_text())["differences"]] == [
        "pass@2", "pass@2"
    ]  # fmt: skip
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "&lt;p1&gt;" in page and "<p1>" not in page, "ids are text"
    assert not re.findall(r'(?:src|href)="[^#"]', page) and "script" not in page
    drawn = re.findall(r"<svg .*?</svg>", page, re.DOTALL)
    assert len(drawn) == 3 and all(ElementTree.fromstring(svg) is not None for svg in drawn)


def test_three_runs_and_tasks_that_only_one_has(tmp_path):
    runs = [
        read_evaluation(evaluation(tmp_path / name, [1, 2, right], extra=[1, 2]) if right < 3
                        else evaluation(tmp_path / name, [1, 2, right]), name)
        for name, right in (("a", 1), ("b", 2), ("c", 3))
    ]  # fmt: skip
    found = compare(runs, [1])
    assert [(row["run"], row["task"]) for row in found["differences"]] == [
        ("b", "sums"), ("b", "extra"), ("c", "sums")
    ]  # fmt: skip
    assert found["not_compared"] == {"c": ["extra"]}


def test_what_cannot_be_compared_is_refused(tmp_path):
    base = str(evaluation(tmp_path / "base", [1, 2]))
    with pytest.raises(RecipeError, match="at least two folders"):
        run_compare([base])
    with pytest.raises(RecipeError, match="the same folder is given twice"):
        run_compare([base, base])
    with pytest.raises(RunFolderError, match=r"no scores.json and problems.jsonl in it"):
        run_compare([base, str(tmp_path)])
    with pytest.raises(DataError, match=r"sums: the two runs have different problems \(1 are in one only"):
        run_compare([base, str(evaluation(tmp_path / "more", [1, 2, 3]))])
    with pytest.raises(DataError, match=r"base has version 1, newer version 2"):
        run_compare([base, str(evaluation(tmp_path / "newer", [1, 2], version=2))])
    with pytest.raises(DataError, match="no task in common"):
        run_compare([base, str(evaluation(tmp_path / "else", [1, 2], task="products"))])
    with pytest.raises(RecipeError, match=r"`k` is 3, but there are only 2 samples"):
        run_compare([base, str(evaluation(tmp_path / "few", [1, 2], n=2))], k=[3])


def modes(folder, text, tools):
    """Write an evaluation of one task in up to two modes."""
    counts = {"sums": text, "sums+python": tools}
    (name, first), *rest = [(name, of) for name, of in counts.items() if of]
    evaluation(folder, first, task=name, **dict(rest))
    scores = json.loads((folder / "scores.json").read_text())
    for name, of in scores.items():
        of |= {"task": "sums", "mode": "python" if "+" in name else "none"}
    (folder / "scores.json").write_text(json.dumps(scores))
    return str(folder)


def test_one_folder_with_both_modes_is_compared_with_itself(tmp_path, capsys):
    run_compare([modes(tmp_path / "both", [1, 2, 0], [2, 4, 1])], output_dir=str(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert (found["baseline"], found["runs"], found["not_compared"]) == ("both", ["both +python"], {})
    row = found["differences"][0]
    assert row["task"] == "sums → sums+python" and row["difference"] == pytest.approx(4 / 12)
    assert found["flips"][0]["better"] == 3 and found["flips"][0]["newly_solved"] == 1
    with pytest.raises(RecipeError, match=r"text has one mode\. Give at least two folders"):
        run_compare([modes(tmp_path / "text", [1, 2, 0], None)])


def test_runs_of_different_modes_are_compared_across_them(tmp_path):
    folders = {name: modes(tmp_path / name, *counts) for name, counts in {
        "text": ([1, 2, 0], None), "tools": (None, [2, 4, 1]), "both": ([1, 1, 1], [3, 3, 3]),
    }.items()}  # fmt: skip
    text, tools, both = (read_evaluation(folder, name) for name, folder in folders.items())
    assert {row["task"] for row in compare([text, tools])["differences"]} == {"sums → sums+python"}
    found = compare([text, both])
    assert {row["task"] for row in found["differences"]} == {"sums"}, "a mode that both have comes first"
    assert found["not_compared"] == {"both": ["sums+python"]}
