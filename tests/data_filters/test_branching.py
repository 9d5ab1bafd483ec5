import random

import pytest
from filter_tables import dropped_ids, row, run_filter, table

from afterglow.core.errors import DataError, RecipeError
from afterglow.core.recipe import Section, build
from afterglow.data_filters import branching
from afterglow.data_filters.branching import BranchingConfig, branching_scores, select_rows, spearman

PLAIN = "We add the two numbers and get four."  # 8 words
BRANCH = "Perhaps there is a shorter way to count."  # 8 words
BACK = "Wait, that is not what was asked for."
VERIFY = "Let me check the sum once more: fine."


def steps(*parts):
    return "\n\n".join(parts)


def ratio_of(text, **config):
    return branching_scores([text], BranchingConfig(**config))["branch_ratio"][0]


def test_hand_computed_scores():
    scores = branching_scores([steps(PLAIN, BRANCH, BACK, VERIFY), steps(BRANCH, BRANCH), PLAIN, ""], BranchingConfig())
    assert scores == {
        "branch_ratio": [1 / 4, 1.0, 0.0, None],
        "branch_per_1k_words": [1000 / 32, 2000 / 16, 0.0, None],
        "n_steps": [4, 2, 1, None],
        "branch_run": [1, 2, 0, None],
        "n_branch": [1, 2, 0, None],
        "n_backtrack": [1, 0, 0, None],
        "n_verify": [1, 0, 0, None],
    }


def test_the_classes_are_kept_apart():
    scores = branching_scores([f"{BACK} {VERIFY} {BRANCH}"], BranchingConfig())
    assert (scores["n_branch"], scores["n_backtrack"], scores["n_verify"]) == ([1], [1], [1])
    assert ratio_of(steps(BACK, VERIFY)) == 0, "waiting and checking is not branching"


@pytest.mark.parametrize(
    "text",
    [
        "Perhaps", "PERHAPS we can", "so, alternatively, count", "Another approach:", "another\nway", "What if x?",
        "Maybe we can", "or maybe not", "Let’s try 3", "let me try that", "On second thought", "Let me reconsider",
        "Alternative plan:", "Alternative: feast", "so maybe the sum", "instead of putting it down",
        "a different angle", "Let's try to create one",
    ],
)  # fmt: skip
def test_branching_words(text, tmp_path):
    result = run_filter(branching, [row("a", text)], BranchingConfig(keep_ratio=1.0), tmp_path)
    assert result.scores["n_branch"] == [1]


@pytest.mark.parametrize(
    "text",
    [
        "another 5 apples",
        "maybes",
        "nevertheless",
        "a letter me trying",
        "hyperhaps",
        "3 instead of 4",
        "even so",
        "Okay, let me try to figure out the sum",
        "the alternative is worse",
        "a different number",
    ],
)
def test_words_that_only_look_like_branching(text):
    assert ratio_of(text) == 0


def test_position_start_wants_the_word_at_the_head_of_its_step():
    inside = "We could count them, or perhaps we add them."
    assert ratio_of(inside) == 1 and ratio_of(inside, position="start") == 0
    assert ratio_of(f"**{BRANCH}**", position="start") == 1
    assert ratio_of('- "Alternatively, we could count them."', position="start") == 1


def test_keywords_of_another_language_replace_the_list():
    german = steps("Vielleicht gibt es einen anderen Weg dahin.", "Wir addieren die Zahlen und sind fertig.")
    assert ratio_of(german) == 0
    assert ratio_of(german, branch_keywords=["vielleicht", "oder aber"]) == 1 / 2
    scores = branching_scores([german], BranchingConfig(verify_keywords=[]))
    assert scores["n_verify"] == [0]


@pytest.mark.parametrize(
    "text", ["```\nprint('perhaps')\n\nprint(2)\n```", "$$ x = 1 $$", "\\[ \\text{what if} \\]", "…", "🙂", "1", "\x00"]
)
def test_hostile_reasoning_has_a_ratio(text):
    assert ratio_of(text) in (0, 1)


def ten_rows():
    """Row i holds i branching steps of ten."""
    return [row(f"r{i}", steps(*[BRANCH] * i, *[PLAIN] * (10 - i)), source="ab"[i % 2]) for i in range(10)]


def test_quantile_drops_the_most_branching(tmp_path):
    rows = ten_rows()
    result = run_filter(branching, rows, BranchingConfig(keep_ratio=0.8), tmp_path)
    assert dropped_ids(rows, result) == dict.fromkeys(["r8", "r9"], "among the most branching 20%")
    assert result.scores["branch_ratio"] == [i / 10 for i in range(10)]
    report = result.report
    assert report["highest_kept_score"] == 0.7 and report["scored"] == 10 and report["without_a_branch"] == 1
    assert report["by_source"]["a"]["mean_branch_ratio"] == pytest.approx(0.4)
    assert {source: of["dropped"] for source, of in report["by_source"].items()} == {"a": 1, "b": 1}
    assert sum(report["histogram"]["counts"]["a"]) == 5


@pytest.mark.parametrize(("ratio", "gone"), [(1.0, 0), (0.95, 0), (0.9, 1), (0.5, 5), (0.01, 9)])
def test_keep_ratio_edges(ratio, gone, tmp_path):
    assert len(run_filter(branching, ten_rows(), BranchingConfig(keep_ratio=ratio), tmp_path).dropped) == gone


def test_one_row_is_kept(tmp_path):
    assert run_filter(branching, [row("a", BRANCH)], BranchingConfig(keep_ratio=0.1), tmp_path).dropped == {}


def test_ties_go_by_id_and_rows_without_a_branch_are_never_dropped(tmp_path):
    rows = [row(key, BRANCH) for key in ("d", "b", "c", "a")]
    assert set(dropped_ids(rows, run_filter(branching, rows, BranchingConfig(keep_ratio=0.5), tmp_path))) == {"c", "d"}
    plain = [row(f"{i}", PLAIN) for i in range(9)] + [row("z", BRANCH)]
    result = run_filter(branching, plain, BranchingConfig(keep_ratio=0.5), tmp_path)
    assert set(dropped_ids(plain, result)) == {"z"}, "a quantile among zeros would drop at random"


def test_rows_without_reasoning_have_none_and_stay(tmp_path):
    rows = [row("empty", "<think>\n\n</think>\\boxed{4}"), *ten_rows()[8:]]
    for config in (BranchingConfig(keep_ratio=0.5), BranchingConfig(select="threshold", threshold=0.0)):
        result = run_filter(branching, rows, config, tmp_path)
        assert result.scores["branch_ratio"][0] is None and 0 not in result.dropped
        assert result.report["without_reasoning"] == 1
    strict = run_filter(branching, rows, BranchingConfig(keep_ratio=0.5, without_score="drop"), tmp_path)
    assert dropped_ids(rows, strict) == {"empty": "no reasoning", "r9": "among the most branching 50%"}
    only_empty = run_filter(branching, rows[:1], BranchingConfig(), tmp_path)
    assert only_empty.dropped == {} and only_empty.report["mean_branch_ratio"] is None


def test_per_problem_keeps_the_least_branching():
    ratios = [0.5, 0.2, 0.2, None, 0.9, None]
    ids, problems = list("fedcba"), ["p", "p", "p", "p", "q", "r"]
    dropped = select_rows(ratios, ids, problems, BranchingConfig(select="per_problem"))
    assert dropped == dict.fromkeys([0, 1], "not the least branching of its problem")


def test_a_run_of_branches_is_the_longest_one():
    text = steps(BRANCH, PLAIN, BRANCH, BRANCH, BRANCH, PLAIN, BRANCH)
    assert branching_scores([text], BranchingConfig())["branch_run"] == [3]


def paired_rows():
    """Problem p: 4 and 2 steps of the reference (mean 3); 6 and 3 steps of r1. Problem q: 2 of each."""
    made = (("p", "oss", 4), ("p", "oss", 2), ("p", "r1", 6), ("p", "r1", 3), ("q", "oss", 2), ("q", "r1", 2))
    return [
        row(f"{i}", steps(*[PLAIN] * count), problem_id=problem, source=source)
        for i, (problem, source, count) in enumerate(made)
    ]


def test_step_excess_compares_with_the_reference_of_the_same_problem(tmp_path):
    config = BranchingConfig(proxy="step_excess", reference="oss", keep_ratio=0.8)
    rows = paired_rows()
    result = run_filter(branching, rows, config, tmp_path)
    assert result.scores["step_excess"] == pytest.approx([1 / 3, -1 / 3, 1.0, 0.0, 0.0, 0.0])
    assert set(dropped_ids(rows, result)) == {"2"}
    strict = BranchingConfig(proxy="step_excess", reference="oss", select="threshold", threshold=0.3)
    assert dropped_ids(rows, run_filter(branching, rows, strict, tmp_path)) == dict.fromkeys(
        "02", "step_excess above 0.3"
    )
    even = BranchingConfig(proxy="step_excess", reference="oss", keep_ratio=0.1)
    assert set(dropped_ids(rows, run_filter(branching, rows, even, tmp_path))) == {"0", "2"}, "no excess, no drop"


@pytest.mark.parametrize("reference", ["oss", "nobody"])
def test_step_excess_without_pairs_says_what_is_missing(reference, tmp_path):
    rows = [*paired_rows(), row("x", PLAIN, problem_id="lone", source="r1")]
    missing = "1 of 3" if reference == "oss" else "3 of 3"
    with pytest.raises(DataError, match=f"{missing} problem.*`reference` '{reference}', such as 'lone'.*oss, r1"):
        run_filter(branching, rows, BranchingConfig(proxy="step_excess", reference=reference), tmp_path)


def test_bare_answers_are_counted(tmp_path):
    report = run_filter(branching, [row("a", "4"), *ten_rows()], BranchingConfig(), tmp_path).report
    assert report["of_one_step"] == 1


def test_threshold_keeps_what_equals_it():
    config = BranchingConfig(select="threshold", threshold=0.3)
    assert select_rows([0.3, 0.30001, 0.0, None], list("abcd"), ["p"] * 4, config) == {1: "branch_ratio above 0.3"}


def test_overlap_with_the_filter_by_length(tmp_path):
    tall = [row(f"r{i}", steps(*[BRANCH] * i, *[PLAIN] * 2)) for i in range(10)]  # more branches, more words
    report = run_filter(branching, tall, BranchingConfig(keep_ratio=0.8), tmp_path).report["length"]
    assert report["jaccard_with_dropping_the_longest"] == 1 and report["spearman"] == pytest.approx(1)
    flat = [
        row(f"r{i}", steps(*[BRANCH] * i, *[PLAIN] * 2 * (10 - i))) for i in range(10)
    ]  # more branches, fewer words
    report = run_filter(branching, flat, BranchingConfig(keep_ratio=0.8), tmp_path).report["length"]
    assert report["jaccard_with_dropping_the_longest"] == 0 and report["spearman"] == pytest.approx(-1)
    assert report["expected_jaccard_at_random"] == pytest.approx(0.2 / 1.8)
    assert spearman([1, 1], [1, 2]) is None


@pytest.mark.parametrize("config", [BranchingConfig(keep_ratio=0.6), BranchingConfig(select="per_problem")])
def test_the_order_of_the_rows_does_not_matter(config, tmp_path):
    rows = [
        r | {"problem_id": f"p{i % 3}"} for i, r in enumerate(ten_rows() + [row(f"t{i}", BRANCH) for i in range(5)])
    ]
    shuffled = random.Random(0).sample(rows, len(rows))
    one, other = (run_filter(branching, table(r), config, tmp_path) for r in (rows, shuffled))
    assert dropped_ids(rows, one) == dropped_ids(shuffled, other)
    assert one.report == other.report


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep_ratio": 0.0}, "r.yaml:3: `keep_ratio` must be above 0"),
        ({"keep_ratio": 1.5}, "`keep_ratio` must be above 0 and at most 1, got 1.5"),
        ({"select": "threshold"}, "`threshold` and `select: threshold` go together"),
        ({"threshold": 0.3}, "`threshold` and `select: threshold` go together"),
        ({"select": "quantil"}, "did you mean quantile"),
        ({"segmentation": "word"}, "paragraph, sentence, lcot2tree"),
        ({"branch_keywords": ["perhaps("]}, "`branch_keywords`: 'perhaps\\(' is not a regular expression"),
        ({"verify_keywords": ["Check"]}, "`verify_keywords`: write 'Check' in lower case"),
        ({"proxy": "step_excess"}, "`reference` and `proxy: step_excess` go together"),
        ({"reference": "r1"}, "`reference` and `proxy: step_excess` go together"),
        ({"branch_keywords": []}, "`branch_keywords` is empty"),
    ],
)
def test_a_wrong_value_names_its_key(values, message):
    with pytest.raises(RecipeError, match=message):
        build(Section(values, dict.fromkeys(values, "r.yaml:3"), "r.yaml:2"), BranchingConfig)
