import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afterglow.core.errors import DataError
from afterglow.eval.suite_tofu import tofu_scores
from afterglow.eval.unlearning_metrics import (
    bootstrap_utility,
    choice_prompt,
    closeness_to_one,
    exact_memorisation,
    extraction_strength,
    forget_quality,
    knowmem_answer,
    model_utility,
    preference_for_truth,
    privacy_leakage,
    probability,
    probability_among,
    rouge_l,
    share_of_truth,
    truth_ratio,
)

LOG2 = math.log(2)


def test_probability():
    assert probability(0) == 1 and probability(LOG2) == pytest.approx(0.5)
    # right answer 1/2 per token, wrong ones 1/4 and 1/4: half of the mass
    assert probability_among(LOG2, [2 * LOG2, 2 * LOG2]) == pytest.approx(0.5)
    assert probability_among(2000, [2001, 1e9]) == pytest.approx(1 / (1 + math.exp(-1))), "no underflow to 0/0"


def test_truth_ratio_and_its_aggregators():
    """Right answer 1/2 per token; wrong ones 1/4 and 1/16, whose geometric mean is 1/8: r = (1/8) / (1/2)."""
    ratio = truth_ratio(LOG2, [2 * LOG2, 4 * LOG2])
    assert ratio == pytest.approx(0.25)
    assert closeness_to_one(ratio) == closeness_to_one(1 / ratio) == pytest.approx(0.25)
    assert preference_for_truth(ratio) == pytest.approx(0.75) and preference_for_truth(4) == 0
    assert share_of_truth(ratio) == pytest.approx(0.8)
    with pytest.raises(DataError, match="at least one wrong answer"):
        truth_ratio(1, [])


def test_truth_ratio_of_a_collapsed_model_is_finite():
    assert 0 < truth_ratio(-5e4, [5e4]) < truth_ratio(5e4, [-5e4]) < math.inf
    assert preference_for_truth(truth_ratio(5e4, [0])) == 0


def test_forget_quality_is_the_ks_test():
    """D = 1 of 3 against 3 has 2 of C(6,3) = 20 orders: p = 0.1."""
    assert forget_quality([1, 2, 3], [4, 5, 6]) == pytest.approx((0.1, 1.0))
    assert forget_quality([1, 2, 3], [1, 2, 3]) == (1.0, 0.0)
    inverse = forget_quality([1, 1 / 2, 1 / 3], [1 / 4, 1 / 5, 1 / 6])
    assert inverse == pytest.approx((0.1, 1.0)), "the test does not see the reciprocal that TOFU plots"
    with pytest.raises(DataError, match="one of them has none"):
        forget_quality([], [1.0])


def test_model_utility():
    assert model_utility([0.5] * 9) == pytest.approx(0.5)
    assert model_utility([1, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert model_utility([1, 0, 1]) == 0
    for bad in ([], [0.5, -0.1], [0.5, math.nan]):
        with pytest.raises(DataError):
            model_utility(bad)


def test_bootstrap_utility_covers_its_value_and_is_seeded():
    rng = np.random.default_rng(0)
    parts = {name: {part: list(rng.uniform(0.2, 0.9, 50)) for part in "abc"} for name in ("retain", "facts")}
    found = bootstrap_utility(parts)
    assert found == bootstrap_utility(parts) and found != bootstrap_utility(parts, seed=1)
    assert found.value == model_utility([np.mean(v) for of_set in parts.values() for v in of_set.values()])
    assert 0.3 < found.low < found.value < found.high < 0.7
    alone = bootstrap_utility({"retain": {"a": [0.5]}})
    assert alone.low == alone.value == alone.high == 0.5


def test_rouge_l():
    """Gold of four words, of which the three in order `the`, `author`, `doe` are in a text of six."""
    recall, f1 = rouge_l("The author, I think, is Doe", "the author: Jane Doe")
    assert recall == pytest.approx(3 / 4)
    assert f1 == pytest.approx(2 * (3 / 6) * (3 / 4) / (3 / 6 + 3 / 4))
    assert rouge_l("she runs", "she running")[0] == 1.0
    assert rouge_l("she runs", "she running", stemmer=False)[0] == 0.5
    assert rouge_l(None, "gold") == rouge_l("", "gold") == rouge_l("?!", "gold") == (0, 0)
    for empty in ("", "  ", None):
        with pytest.raises(DataError, match="empty"):
            rouge_l("text", empty)


@pytest.mark.parametrize(
    "hits, strength, compat",
    [
        ([1, 1, 1, 1], 1.0, 1.0),
        ([0, 1, 1, 1], 0.75, 0.75),  # one token of prefix, and the other three follow
        ([1, 1, 0, 1], 0.25, 0.25),  # the early hits count for nothing
        ([1, 1, 1, 0], 0.0, 0.25),  # open-unlearning's loop ends before k = L
        ([0, 0, 0, 0], 0.0, 0.25),
        ([0], 0.0, 1.0),
    ],
)
def test_extraction_strength(hits, strength, compat):
    assert extraction_strength(hits) == strength
    assert extraction_strength(hits, compat=True) == compat
    assert exact_memorisation(hits) == sum(hits) / len(hits)


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_extraction_strength_is_the_definition(hits):
    length = len(hits)
    k = next(k for k in range(length + 1) if all(hits[k:]))
    assert extraction_strength(hits) == pytest.approx(1 - k / length)
    assert extraction_strength(hits) <= exact_memorisation(hits) + 1e-12


def test_nothing_to_extract():
    for metric in (extraction_strength, exact_memorisation):
        with pytest.raises(DataError, match="without tokens"):
            metric([])


def test_knowmem_answer():
    assert knowmem_answer(" Paris\n\nQuestion: next") == "Paris"
    assert knowmem_answer("Paris\nQuestion: x") == "Paris" and knowmem_answer("A Question: x") == "A"
    assert knowmem_answer(None) == knowmem_answer("\n\nlate") == ""


def test_privacy_leakage():
    """MUSE-News: the retrained model's AUC is 0.4772 in MUSE's orientation, the target's close to 0."""
    assert privacy_leakage(1 - 0.4772, 1 - 0.4772) == 0
    assert privacy_leakage(1.0, 1 - 0.4772) == -100, "every forget text recognised"
    assert privacy_leakage(0.0, 0.5) == 100, "over-unlearned: forget texts look stranger than unseen ones"
    assert privacy_leakage(0.75, 0.5) == -50
    with pytest.raises(DataError, match="Did the retrained model see the forget set"):
        privacy_leakage(0.5, 1.0)


def test_choice_prompt():
    assert choice_prompt(" Q? ", ["a ", "b", "c", "d"], "biology") == (
        "The following are multiple choice questions (with answers) about biology.\n\n"
        "Q?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    )
    with pytest.raises(DataError, match="5 choices"):
        choice_prompt("Q", "abcde", "x")


def test_tofu_scores_by_hand():
    """Two questions per set; every part by hand."""

    def rows(name, p, rouge, ratio):
        return [
            {"set": name, "id": str(i), "probability": p[i], "rouge_l_recall": rouge[i], "truth_ratio": ratio[i]}
            for i in range(2)
        ]

    table = [
        *rows("forget", [0.1, 0.3], [0.2, 0.4], [0.5, 4.0]),
        *rows("retain", [0.8, 0.6], [1.0, 0.5], [0.2, 2.0]),
    ]
    scores = tofu_scores(table, None)
    value = {name: found["value"] for name, found in scores.items() if isinstance(found, dict) and "value" in found}
    assert value == pytest.approx(
        {
            "retain_probability": 0.7, "retain_rouge_l": 0.75, "retain_truth_ratio": 0.4,
            "model_utility": 3 / (1 / 0.7 + 1 / 0.75 + 1 / 0.4), "forget_probability": 0.2, "forget_rouge_l": 0.3,
            "forget_truth_ratio": (0.5 + 0.25) / 2, "forget_truth_share": (1 / 1.5 + 1 / 5) / 2,
        }
    )  # fmt: skip
