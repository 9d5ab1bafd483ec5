import random
from collections import Counter

import pytest
from filter_tables import dropped_ids, row, run_filter, table

from afterglow.core.errors import DataError, RecipeError
from afterglow.core.recipe import Section, build
from afterglow.data_filters import negatives
from afterglow.data_filters.negatives import NEAR_COPY, NOT_FINISHED, NOT_GRADABLE, OVER_CAP, NegativesConfig


def ten_rows():
    """p: 4 right, 2 wrong; q: 1 right, 1 wrong, 1 wrong but cut off; r: 1 not gradable."""
    return [
        row("p+1", problem_id="p", correct=True),
        row("p+2", problem_id="p", correct=True),
        row("p+3", problem_id="p", correct=True),
        row("p+4", problem_id="p", correct=True, finish_reason="stop"),
        row("p-1", problem_id="p", correct=False),
        row("p-2", problem_id="p", correct=False, finish_reason="stop"),
        row("q+1", problem_id="q", correct=True),
        row("q-1", problem_id="q", correct=False, completion="<think>a</think>\\boxed{5}"),
        row("q-cut", problem_id="q", correct=False, finish_reason="length"),
        row("r?", problem_id="r", correct=None),
    ]


def run_mode(tmp_path, rows=None, seed=0, **config):
    rows = rows or ten_rows()
    result = run_filter(negatives, rows, NegativesConfig(**config), tmp_path, seed)
    gone = dropped_ids(rows, result)
    return [r["id"] for r in rows if r["id"] not in gone], gone, result.report


def test_keep_all_only_counts(tmp_path):
    kept, _, report = run_mode(tmp_path, mode="keep_all")
    assert len(kept) == 10
    assert report["in"] == report["kept"] == {"positive": 5, "negative": 3, "unfinished": 1, "not_gradable": 1}
    assert report["problems_in"] == 3


def test_positive_only_and_negative_only(tmp_path):
    kept, gone, _ = run_mode(tmp_path, mode="positive_only")
    assert kept == ["p+1", "p+2", "p+3", "p+4", "q+1"]
    assert gone["p-1"] == "negative, and `mode` is positive_only"
    kept, gone, report = run_mode(tmp_path, mode="negative_only")
    assert kept == ["p-1", "p-2", "q-1"]
    assert (gone["q-cut"], gone["r?"], gone["p+1"]) == (
        NOT_FINISHED,
        NOT_GRADABLE,
        "positive, and `mode` is negative_only",
    )
    assert report["kept"]["negative"] == 3 and report["problems_kept"] == 2


def test_balanced_overall_drops_surplus_of_the_larger_side(tmp_path):
    kept, gone, report = run_mode(tmp_path, mode="balanced")
    assert Counter(key[1] for key in kept) == {"+": 3, "-": 3}
    assert Counter(gone.values()) == {"surplus positive": 2, NOT_FINISHED: 1, NOT_GRADABLE: 1}
    assert report["kept"] == {"positive": 3, "negative": 3, "unfinished": 0, "not_gradable": 0}


def test_balanced_per_problem(tmp_path):
    kept, gone, _ = run_mode(tmp_path, mode="balanced", balance="per_problem")
    assert Counter(key[:2] for key in kept) == {"p+": 2, "p-": 2, "q+": 1, "q-": 1}
    assert Counter(gone.values())["surplus positive"] == 2
    only_right = [*ten_rows(), row("s+", problem_id="s", correct=True)]
    kept, gone, _ = run_mode(tmp_path, only_right, mode="balanced", balance="per_problem")
    assert gone["s+"] == "surplus positive", "a problem that is always right has nothing to set against it"


def test_max_per_problem_caps_each_label(tmp_path):
    kept, gone, _ = run_mode(tmp_path, mode="balanced", max_per_problem=1)
    assert Counter(key[:2] for key in kept) == {"p+": 1, "p-": 1, "q+": 1, "q-": 1}
    assert Counter(gone.values())[OVER_CAP] == 4
    kept, _, _ = run_mode(tmp_path, mode="positive_only", max_per_problem=3)
    assert Counter(key[:2] for key in kept) == {"p+": 3, "q+": 1}


def alike_rows():
    """Of p: three wrong rows that differ in their last word only, one of another kind, and their right twin."""
    words = "We take the first number and add the second number to it and then we read off the sum which is"
    rows = [row(f"twin{i}", f"{words} {i}", problem_id="p", correct=False) for i in range(3)]
    rows.append(
        row("other", "Just guess something else entirely, for instance nine hundred.", problem_id="p", correct=False)
    )
    rows.append(row("right", f"{words} 4", problem_id="p", correct=True))
    return [*rows, row("elsewhere", f"{words} 1", problem_id="q", correct=False)]


def test_near_copies_of_a_problem_and_label_are_left_out(tmp_path):
    """Two twins have 18 five-grams each, 17 of them in common: similarity 17 / 19."""
    kept, gone, _ = run_mode(tmp_path, alike_rows(), mode="negative_only", max_similarity=0.8)
    assert sorted(gone.values()).count(NEAR_COPY) == 2 and {"other", "elsewhere"} <= set(kept)
    kept, gone, _ = run_mode(tmp_path, alike_rows(), mode="balanced", max_similarity=0.95)
    assert NEAR_COPY not in gone.values()


def test_a_cap_buys_different_mistakes(tmp_path):
    for seed in range(4):
        kept, _, _ = run_mode(tmp_path, alike_rows(), seed, mode="negative_only", max_per_problem=2, max_similarity=0.8)
        assert "other" in kept and sum(key.startswith("twin") for key in kept) == 1


def test_a_right_row_is_no_copy_of_a_wrong_one(tmp_path):
    pair = [r for r in alike_rows() if r["id"] in ("twin0", "right")]
    assert len(run_mode(tmp_path, pair, mode="balanced", max_similarity=0.5)[0]) == 2


@pytest.mark.parametrize(
    ("correct", "finish_reason", "completion", "kind"),
    [
        (False, "stop", "\\boxed{5}", "negative"),
        (False, None, "\\boxed{5}", "negative"),
        (False, None, "<think>a</think>\\boxed{5}", "negative"),
        (False, None, "<think>a \\boxed{5}", "unfinished"),
        (False, "length", "\\boxed{5}", "unfinished"),
        (False, "tool_limit", "\\boxed{5}", "unfinished"),
        (False, "error", "\\boxed{5}", "unfinished"),
        (True, "length", "\\boxed{4}", "positive"),
        (None, "stop", "no idea", "not_gradable"),
    ],
)
def test_a_negative_is_wrong_and_finished(correct, finish_reason, completion, kind):
    message = [{"role": "assistant", "content": completion}]
    assert negatives.kind_of(correct, finish_reason, message) == kind


def test_the_draw_depends_on_the_seed_and_not_on_the_order(tmp_path):
    rows = [
        row(f"{i}", problem_id=f"p{i % 7}", correct=i % 3 == 0, source="ab"[i % 2], completion=f"\\boxed{{{i}}}")
        for i in range(60)
    ]
    config = {"mode": "balanced", "max_per_problem": 2}
    shuffled = random.Random(0).sample(rows, len(rows))
    kept, gone, report = run_mode(tmp_path, rows, **config)
    again, gone_again, report_again = run_mode(tmp_path, shuffled, **config)
    assert (set(again), gone_again, report_again) == (set(kept), gone, report)
    assert set(run_mode(tmp_path, rows, seed=1, **config)[0]) != set(kept)
    assert kept == [r["id"] for r in rows if r["id"] in set(kept)], "the kept rows stay in their order"


def test_without_labels_the_message_says_to_grade(tmp_path):
    rows = [row("a"), row("b")]
    with pytest.raises(DataError, match=r"null in every row. Put `- grade` before `- negatives`"):
        run_mode(tmp_path, rows, mode="balanced")
    assert run_mode(tmp_path, rows, mode="keep_all")[0] == ["a", "b"]
    negatives.check(table(rows), NegativesConfig(mode="balanced"), {"correct"})


def test_balanced_needs_both_labels(tmp_path):
    with pytest.raises(DataError, match=r"it has 1 right and 0 finished wrong row\(s\)"):
        run_mode(tmp_path, [row("a", correct=True), row("b", correct=False, finish_reason="length")], mode="balanced")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "`mode` is missing"),
        ({"mode": "balance"}, "did you mean balanced"),
        ({"mode": "balanced", "max_per_problem": 0}, "must be at least 1"),
        ({"mode": "keep_all", "max_per_problem": 1}, "leave one out"),
        ({"mode": "keep_all", "max_similarity": 0.8}, "leave one out"),
        ({"mode": "balanced", "max_similarity": 8.0}, "`max_similarity` must be above 0 and at most 1"),
        ({"mode": "positive_only", "balance": "per_problem"}, "belongs to `mode: balanced`"),
    ],
)
def test_a_wrong_value_is_refused(values, message):
    with pytest.raises(RecipeError, match=message):
        build(Section(values), NegativesConfig)
