import pytest
from filter_tables import dropped_ids, row, run_filter

from afterglow.core.errors import RecipeError
from afterglow.core.recipe import Section, build
from afterglow.data_filters import error_patterns
from afterglow.data_filters.error_patterns import OUR_TAXONOMY, REPEATS, ErrorPatternsConfig, repeated_share, tags_of

STEP = "We add the two numbers and get a sum of {}."


def tags(text, answer="", **config):
    return tags_of(text, answer, ErrorPatternsConfig(**config))[0]


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("I’m stuck here, there is no way.", "gives_up"),
        ("So my best guess is 4.", "guesses"),
        ("The problem might have a typo.", "doubts_the_problem"),
        ("This contradicts what we had.", "contradicts_itself"),
        ("We are going in circles.", "goes_in_circles"),
        ("Oops, let me redo that.", "corrects_a_slip"),
    ],
)
def test_our_taxonomy(text, tag):
    assert tags(text) == [tag]
    assert set(OUR_TAXONOMY) >= {tag}


def test_a_plain_chain_has_no_tag_and_the_answer_is_read_as_well():
    assert tags(STEP.format(4)) == []
    assert tags(STEP.format(4), answer="I give up.") == ["gives_up"]
    assert tags("", "") == []


def test_repeated_steps():
    assert repeated_share([]) is None
    assert repeated_share(["a b", "A  b", "c", "c"]) == 1 / 2
    looped = "\n\n".join([STEP.format(1), STEP.format(2), STEP.format(1), STEP.format(1)])
    assert tags(looped) == [REPEATS] and tags(looped, repeats_from=0.6) == []


def test_a_taxonomy_of_your_own_replaces_ours():
    own = {"unit_slip": ["wrong units?"]}
    assert tags("The wrong unit, and I give up.", patterns=own) == ["unit_slip"]


def test_tags_and_their_share_among_right_and_wrong_rows(tmp_path):
    rows = [
        row("a", "My best guess is 5.", correct=False, source="s"),
        row("b", "My best guess is 4.", correct=True),
        row("c", STEP.format(5), correct=False),
        row("d", "I give up.", correct=None),
        row("e", "", correct=False, source="s"),
    ]
    result = run_filter(error_patterns, rows, ErrorPatternsConfig(drop=["gives_up"]), tmp_path)
    assert result.scores["patterns"].to_pylist() == [["guesses"], ["guesses"], [], ["gives_up"], []]
    assert result.scores["repeated_steps"] == [0, 0, 0, 0, None]
    assert dropped_ids(rows, result) == {"d": "shows the pattern gives_up"}
    report = result.report
    assert report["taxonomy"] == "ours" and report["tagged"] == 3
    assert report["rows"] == {"wrong": 3, "right": 1, "not_gradable": 1}
    guesses = report["patterns"]["guesses"]
    assert guesses["rows"] == 2 and guesses["share_of_wrong"] == pytest.approx(1 / 3)
    assert guesses["share_of_right"] == 1 and guesses["share_by_source"] == {"s": 0.5, "t": pytest.approx(1 / 3)}


def test_a_table_without_any_tag_keeps_the_type_of_its_column(tmp_path):
    result = run_filter(error_patterns, [row("a", STEP.format(1))], ErrorPatternsConfig(), tmp_path)
    assert str(result.scores["patterns"].type) == "list<item: string>"
    assert result.report["patterns"]["guesses"]["share_of_wrong"] is None, "no wrong row, no share"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patterns": {"x": ["a("]}}, r"`patterns`: `x`: 'a\(' is not a regular expression"),
        ({"patterns": {"x": []}}, "`x` has no expressions"),
        ({"patterns": {REPEATS: ["a"]}}, "measured from the steps"),
        ({"repeats_from": 0.0}, "`repeats_from` must be above 0"),
        ({"drop": ["gives_upp"]}, "`drop` names gives_upp; the tags are gives_up, guesses"),
    ],
)
def test_a_wrong_recipe_is_refused(values, message):
    with pytest.raises(RecipeError, match=message):
        build(Section(values), ErrorPatternsConfig)
