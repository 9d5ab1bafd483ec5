import numpy as np
import pytest

from afterglow.data_filters.quality_baselines import limo_scores, local_windows, sentence_starts


def test_limo_by_hand():
    """Three texts of 4, 4 and 8 words; check 1/4, 0, 0; perhaps 0, 1/4, 0; therefore / since 0, 0, 2/8."""
    texts = ["Check it at once", "Perhaps it is so", "Therefore it is. Since it is, it is"]
    high, low = 2 / np.sqrt(2), -1 / np.sqrt(2)  # of (1, 0, 0), standardised
    expected = [
        0.30 * low + 0.20 * high + 0.25 * low + 0.25 * low,
        0.30 * low + 0.20 * low + 0.25 * high + 0.25 * low,
        0.30 * high + 0.20 * low + 0.25 * low + 0.25 * high,
    ]
    assert limo_scores(texts) == pytest.approx(expected)


def test_limo_counts_whole_words_in_any_case_and_what_never_varies_is_nothing():
    assert limo_scores(["MIGHT it be?", "mighty it is"])[0] > 0
    assert limo_scores(["a b", "c d"]) == [0, 0]
    assert limo_scores([""]) == [0] and limo_scores([]) == []


def test_sentences():
    text = "One. Two! Three? 3.5 is no end\n\nFour"
    starts = sentence_starts(text)
    assert [text[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)] == [
        "One. ", "Two! ", "Three? ", "3.5 is no end\n\n", "Four",
    ]  # fmt: skip
    assert sentence_starts("") == [] and sentence_starts("End. ") == [0]


def test_windows_see_four_sentences():
    assert local_windows(13, [0, 2, 4, 6, 8, 10]) == [
        (0, 0, 2), (0, 2, 4), (0, 4, 6), (0, 6, 8), (0, 8, 10), (2, 10, 13),
    ]  # fmt: skip
    assert local_windows(5, [0, 3, 3]) == [(0, 0, 3), (0, 3, 5)]
    assert local_windows(0, []) == []
