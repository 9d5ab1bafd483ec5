import json
import re
from pathlib import Path

from afterglow.eval.compare import COMPARE_SCHEMA, Evaluation, compare
from afterglow.eval.scores import SCHEMA, Sample, score
from afterglow.eval.sweep import SWEEP_SCHEMA

TEXT = (Path(__file__).parents[2] / "docs" / "results_schema.md").read_text()


def documented(heading):
    """The words in backticks of one section."""
    section = TEXT.split(f"## {heading}")[1].split("\n## ")[0]
    return {word for quoted in re.findall(r"`([^`]+)`", section) for word in re.split(r"[ ,]+", quoted)}


def test_every_key_that_is_written_is_documented():
    problems = {
        name: [Sample(i, i < right, i == 3, "4" if i < right else "5", "exact", 7) for i in range(5)]
        for name, right in (("a", 2), ("b", 4))
    }
    scores, rows = score(problems, 4, [1, 4], "sums")
    known = documented("scores.json")
    keys = {re.sub(r"(?<=[@^])\d+", "k", key).replace("avg@k", "avg@n") for key in scores}
    assert keys <= known, keys - known
    assert set(scores["pass@4"]) | set(scores["resolvable"]) <= known and "unused_samples" in scores
    assert set(rows[0]) | {"task"} <= documented("problems.jsonl")
    runs = [Evaluation(name, {"sums": scores}, {"sums": {row["problem_id"]: row for row in rows}}) for name in "AB"]
    found = json.loads(json.dumps(compare(runs)))
    known = documented("compare.json") | {"schema"}
    assert set(found) | set(found["differences"][0]) | set(found["flips"][0]) <= known


def test_the_numbers_of_the_schemas():
    for heading, number in (("scores.json", SCHEMA), ("sweep.json, selection.json", SWEEP_SCHEMA),
                            ("compare.json", COMPARE_SCHEMA)):  # fmt: skip
        assert f"## {heading} (schema {number})" in TEXT
