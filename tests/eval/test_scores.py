import gzip
import json
import math

import pytest
import yaml

from afterglow.core.errors import DataError, RecipeError, RunFolderError
from afterglow.core.grading import Grader
from afterglow.core.pass_at_k import majority_at_k
from afterglow.core.recipe import read_recipe
from afterglow.eval import evaluate
from afterglow.eval.scores import Sample, answer_classes, default_k, read_scores, same_mathematics, score, show_scores


def samples(*answers, right=("4",)):
    """Samples with these answers; None has no answer and no verdict."""
    return [
        Sample(i, None if a is None else a in right, i == 0, a, "no boxed answer" if a is None else "exact", 10 * i)
        for i, a in enumerate(answers)
    ]


def test_default_k():
    assert [default_k(n) for n in (1, 2, 5, 16)] == [[1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8, 16]]


def test_scores_by_hand():
    scores, rows = score({"a": samples("4", "4", "5"), "b": samples("7", None, "7")}, 3, [1, 3], "here")
    assert scores["pass@1"]["value"] == pytest.approx(1 / 3) and scores["pass@3"]["value"] == 0.5
    assert scores["avg@3"] == scores["pass@1"] and scores["maj@3"]["value"] == 0.5
    assert scores["truncated"] == {"count": 2, "share": 1 / 3, "correct": 1}
    assert scores["ungradable"] == {"count": 1, "share": 1 / 6, "reasons": {"no boxed answer": 1}}
    assert scores["mean_tokens"] == 10
    assert rows[1] == {
        "problem_id": "b", "n": 3, "correct": 0, "ungradable": 1, "truncated": 1, "mean_tokens": 10,
        "answers": [[2, 0.0]], "no_answer": 1,
    }  # fmt: skip
    assert scores["schema"] == 2 and scores["pass^3"]["value"] == 0, "all three right: never"
    assert scores["g-pass@3_0.5"]["value"] == 0.5, "two of three right: problem a"
    accuracy = scores["avg@3"]
    assert accuracy["se_new_problems"] == pytest.approx(1 / 3), "s = sqrt(2) / 3 of 2/3 and 0, over sqrt(2)"
    assert accuracy["se_run_to_run"] == pytest.approx((2 / 9 / 2) ** 0.5 / 2)
    assert scores["resolvable"]["same_problems"] == pytest.approx(2.8016 * 2**0.5 / 6, rel=1e-4)
    assert scores["answer_entropy"] == pytest.approx(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / 2)


def test_one_sample_per_problem_says_nothing_of_reruns():
    scores, rows = score({"a": samples("4"), "b": samples("7")}, 1, [1], "here")
    assert scores["pass@1"]["se_run_to_run"] is None and scores["resolvable"]["same_problems"] is None
    assert scores["answer_entropy"] is None and "pass^1" not in scores and "answers" not in rows[0]
    scores, _ = score({"a": samples("4")}, 1, [1], "here")
    assert scores["pass@1"]["se_new_problems"] is None and scores["resolvable"]["unpaired"] is None


@pytest.mark.parametrize("answer", ["4", "7"])
def test_an_error_of_zero_is_not_known_to_be_one(answer, capsys, tmp_path):
    """All right or all wrong: what the benchmark resolves is unknown, not 0.0 points."""
    scores, _ = score({"a": samples(answer, answer), "b": samples(answer, answer)}, 2, [1], "here")
    assert scores["pass@1"]["se_run_to_run"] == 0 and scores["pass@1"]["value"] in (0, 1)
    assert scores["resolvable"] == {"same_problems": None, "unpaired": None}
    show_scores({"here": scores}, tmp_path)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ resolves")]
    assert line.strip("│ ").split()[-1] == "?"


def test_scores_of_another_schema_are_refused(tmp_path):
    (tmp_path / "scores.json").write_text('{"aime24": {"n": 4}}')
    with pytest.raises(RunFolderError, match=r"another schema than 2.*--overwrite"):
        read_scores(tmp_path)


def test_too_few_samples_are_refused_and_too_many_are_counted():
    with pytest.raises(DataError, match=r"here: 1 of 2 problems have fewer than 2 samples: 'b' \(1\)"):
        score({"a": samples("4", "4"), "b": samples("4")}, 2, [1], "here")
    scores, _ = score({"a": samples("5", "4", "4"), "b": samples("4")}, 1, [1], "here")
    assert scores["pass@1"]["value"] == 0.5 and scores["unused_samples"] == 2, "the first of each counts"


def test_answers_are_grouped_by_value_and_by_mathematics():
    found = samples("4", r"\frac{8}{2}", "0.50", r"\frac{1}{2}", "50%", r"\sqrt{2}/2", r"\frac{1}{\sqrt{2}}", None,
                    right=("4", r"\frac{8}{2}"))  # fmt: skip
    classes, without = answer_classes(found)
    assert sorted(classes) == [(1, 0), (1, 0), (1, 0), (2, 0), (2, 1)] and without == 1
    with Grader() as grader:
        classes, _ = answer_classes(found, same_mathematics(grader))
    assert sorted(classes) == [(2, 0), (2, 1), (3, 0)], "50% may be read as 0.5, and both roots are one answer"
    assert majority_at_k(classes, without, 8) == 0


def test_contradicting_labels_of_one_answer_are_averaged():
    same = [Sample(i, i < 3, None, "4", None, None) for i in range(4)]
    assert answer_classes(same) == ([(4, 0.75)], 0)


# ---------------------------------------------------------------------------------------------------------------------
# samples that exist


@pytest.fixture
def recipe(tmp_path):
    """Two checkpoints, 3 problems, 4 samples each, under foreign column names; one label is wrong in the file."""
    rows = []
    for checkpoint in ("base", "trained"):
        for problem in range(3):
            for index in range(4):
                right = index < (problem if checkpoint == "base" else 3)
                answer = "4" if right else "5"
                rows.append({"ckpt": checkpoint, "problem_id": problem, "q": f"{problem}?", "gold": "4", "sid": index,
                             "pred": answer, "correct": right, "text": f"I think \\boxed{{{answer}}}"})  # fmt: skip
    rows[4]["correct"] = False

    def write(name="run", rows=rows, **changes):
        with gzip.open(tmp_path / "samples.jsonl.gz", "wt") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
        columns = {"prompt": "q", "completion": "text", "answer": "gold", "sample_index": "sid", "extracted": "pred",
                   "source": "ckpt"}  # fmt: skip
        keys = {
            "samples": str(tmp_path / "samples.jsonl.gz"), "columns": columns, "k": [1, 4],
            "output_dir": str(tmp_path / name),
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in (keys | changes).items() if v is not None}))
        return path

    write.rows = rows
    return write


def test_stored_labels_are_scored(recipe, capsys):
    folder = evaluate.run(read_recipe(recipe()))
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["base"]["pass@1"]["value"] == pytest.approx(2 / 12) and scores["base"]["n"] == 4
    assert scores["trained"]["pass@4"]["value"] == 1 and scores["trained"]["maj@4"]["value"] == 1
    assert scores["base"]["truncated"] is None, "the file does not say"
    assert "base" in capsys.readouterr().out


def test_regrading_lists_every_difference_and_resumes(recipe, capsys):
    path = recipe(regrade=True)
    folder = evaluate.run(read_recipe(path))
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["base"]["pass@1"]["value"] == pytest.approx(3 / 12)
    agreement = scores["base"]["agreement"]
    assert (agreement["rows"], agreement["agree"]) == (12, 11)
    assert agreement["reasons"] == {"wrong in the file, correct here: exact number": 1}
    (difference,) = map(json.loads, (folder / "disagreements.jsonl").read_text().splitlines())
    assert difference["problem_id"] == "1" and difference["extracted"] == "4" and not difference["correct_in_file"]
    assert "11 of 12 labels agree (91.67%)" in capsys.readouterr().out

    whole = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".jsonl", ".json")}
    lines = whole["samples.jsonl"].splitlines(keepends=True)
    (folder / "samples.jsonl").write_bytes(b"".join(reversed(lines[:9])) + b'{"cut')
    manifest = json.loads(whole.pop("manifest.json"))
    (folder / "manifest.json").write_text(json.dumps(manifest | {"finished": None}))
    evaluate.run(read_recipe(path))
    assert {name: (folder / name).read_bytes() for name in whole} == whole


def test_bad_samples_are_refused(recipe):
    with pytest.raises(DataError, match=r"rows 1 and 13: both are sample 0 of problem '0' in 'samples'. Name the"):
        evaluate.run(read_recipe(recipe(group_by=[])))
    with pytest.raises(DataError, match=r":16: the same trajectory stands at .*:4 already. .*`columns: {source:"):
        evaluate.run(read_recipe(recipe(columns={"prompt": "q", "completion": "text", "sample_index": "sid"})))
    with pytest.raises(RecipeError, match=r"`group_by` names 'checkpoint', which no row has"):
        evaluate.run(read_recipe(recipe(group_by=["checkpoint"])))
    with pytest.raises(RecipeError, match=r"`k` is 5, but there are only 4 samples"):
        evaluate.run(read_recipe(recipe("k", k=[5])))
    with pytest.raises(DataError, match=r"trained: 1 of 3 problems have fewer than 4 samples: '2' \(3\)"):
        evaluate.run(read_recipe(recipe("few", rows=recipe.rows[:-1])))
    unlabelled = [{**row, "correct": None} for row in recipe.rows]
    with pytest.raises(DataError, match=r"no row has `correct`.*`regrade: true`"):
        evaluate.run(read_recipe(recipe("unlabelled", rows=unlabelled)))
    with pytest.raises(RecipeError, match="unknown key `model`"):
        evaluate.run(read_recipe(recipe("both", model="x")))
