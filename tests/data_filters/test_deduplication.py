import random

import numpy as np
import pytest
from filter_tables import dropped_ids, row, run_filter, table

from afterglow.data_filters import deduplication
from afterglow.data_filters.deduplication import (
    Bands,
    DeduplicationConfig,
    bands_and_rows,
    shingle_hashes,
    shingles,
    similarity,
)

WORDS = [f"w{i}" for i in range(500)]


def words(count, seed=0):
    return random.Random(seed).choices(WORDS, k=count)


def changed(text, places):
    """The text with other words at these places."""
    found = list(text)
    for place in places:
        found[place] = f"other{place}"
    return " ".join(found)


def run(rows, folder, seed=0, **keys):
    return run_filter(deduplication, rows, DeduplicationConfig(**keys), folder, seed)


def test_shingles_and_similarity_by_hand():
    one, other = shingles("a b c d", 2), shingles("a b c e", 2)
    assert one == {"a b", "b c", "c d"} and similarity(one, other) == 2 / 4
    assert shingles("a b", 5) == {"a b"} and shingles("", 5) == {""}


def test_hashes_are_one_to_one_with_shingles():
    text = " ".join(words(3000)) + " a b c d e a b c d e"
    found, grams = shingle_hashes(text, 5), shingles(text, 5)
    assert len(found) == 3010 - 4 and len(set(found.tolist())) == len(grams)
    assert shingle_hashes("a b c", 2).tolist()[1] == shingle_hashes("b c", 2).tolist()[0]
    assert shingle_hashes("a b", 2).tolist() != shingle_hashes("b a", 2).tolist(), "the order of words counts"
    assert len(shingle_hashes("", 5)) == len(shingle_hashes("a", 5)) == 1


def test_one_of_each_set_of_copies_stays_and_is_named(tmp_path):
    text = words(104)  # 100 runs of five words
    rows = [
        row("a", " ".join(text)),
        row("b", "  ".join(text).upper() + "!"),  # the same normal form
        row("c", changed(text, [50])),  # five runs of 100 differ: 95 / 105
        row("d", changed(text, [10, 30, 50, 70, 90])),  # 75 / 125
        row("e", " ".join(text), problem_id="another problem"),
    ]
    result = run(rows, tmp_path)
    gone = dropped_ids(rows, result)
    assert {"d", "e"}.isdisjoint(gone) and len(gone) == 2
    (stays,) = {"a", "b", "c"} - set(gone)
    for name in gone:
        copy = (
            f"near duplicate (of {stays}, similarity {95 / 105:.3f})"
            if "c" in (name, stays)
            else f"exact duplicate (of {stays})"
        )
        assert gone[name] == copy
    marked = {r["id"]: of for r, of in zip(rows, result.scores["duplicate_of"], strict=True)}
    assert marked == {name: stays if name in gone else None for name in "abcde"}
    assert result.report["exact"] == 1 and result.report["near"] == 1
    everywhere = dropped_ids(rows, run(rows, tmp_path, within="all"))
    assert len(everywhere) == 3 and "d" not in everywhere
    assert len(dropped_ids(rows, run(rows, tmp_path, threshold=None))) == 1


def test_the_choice_depends_on_seed_and_ids_alone(tmp_path):
    rows = [row(f"{group}-{copy}", f"answer {group}", source="ab"[copy]) for group in range(40) for copy in range(2)]
    gone = set(dropped_ids(rows, run(rows, tmp_path)))
    shuffled = random.Random(3).sample(rows, len(rows))
    assert gone == set(dropped_ids(shuffled, run(shuffled, tmp_path)))
    others = set(dropped_ids(rows, run(rows, tmp_path, seed=1)))
    assert len(gone) == len(others) == 40 and gone != others
    assert 8 <= sum(name.endswith("-0") for name in gone) <= 32, "no teacher is preferred"


def test_likeness_does_not_carry_over(tmp_path):
    """Each row is like its neighbour only: what goes has a kept row at least `threshold` alike."""
    text = words(104)
    rows = [row(str(i), changed(text, range(0, 8 * i, 8))) for i in range(8)]
    result = run(rows, tmp_path, threshold=0.85)
    gone = dropped_ids(rows, result)
    grams = {r["id"]: shingles(r["completion"][0]["content"], 5) for r in rows}
    kept = set(grams) - set(gone)
    assert gone and len(kept) >= 2
    assert all(similarity(grams[name], grams[other]) < 0.85 for name in kept for other in kept - {name})
    for name, other, alike in zip(grams, result.scores["duplicate_of"], result.scores["similarity"], strict=True):
        assert (name in gone) == (other is not None)
        if other is not None:
            assert other in kept and alike == pytest.approx(similarity(grams[name], grams[other])) and alike >= 0.85


def test_a_copy_of_a_near_copy_names_the_row_that_stays(tmp_path):
    text = words(104)
    for seed in range(12):
        rows = [row("a", " ".join(text)), row("a2", " ".join(text)), row("b", changed(text, [50]))]
        result = run(rows, tmp_path, seed=seed)
        (stays,) = {"a", "a2", "b"} - set(dropped_ids(rows, result))
        assert {of for of in result.scores["duplicate_of"] if of} == {stays}


def test_bands_and_rows_by_hand():
    assert bands_and_rows(0.8, 128) == (21, 6), "(1 - 0.8^6)^21 = 0.0017, and (1 - 0.8^7)^18 = 0.014"
    assert bands_and_rows(0.5, 128) == (42, 3) and bands_and_rows(1.0, 64) == (1, 64)
    assert bands_and_rows(0.1, 16) == (16, 1)


def test_minhash_proposes_what_is_alike():
    """300 pairs a little above the threshold: the bands of the default settings miss at most a few."""
    bands, missed = Bands(0.8, 128), 0
    for seed in range(300):
        text = words(104, seed)
        one, other = shingle_hashes(" ".join(text), 5), shingle_hashes(changed(text, [20, 60]), 5)  # 90 / 110
        missed += not (bands.of(one, 0) == bands.of(other, 0)).any()
    assert missed <= 1
    far = sum((bands.of(shingle_hashes(" ".join(words(104, s)), 5), 0) == bands.of(one, 0)).any() for s in range(200))
    assert far <= 1 and not (bands.of(one, 1) == bands.of(one, 2)).any(), "another problem shares no band"
    assert np.array_equal(bands.of(one, 7), Bands(0.8, 128).of(one, 7)), "the same in every process"


def test_a_text_longer_than_one_update_is_the_same_signature(monkeypatch):
    grams, bands = shingle_hashes(" ".join(words(3000)), 5), Bands(0.8, 64)
    whole = bands.of(grams, 0)
    monkeypatch.setattr(deduplication, "SHINGLES_AT_ONCE", 100)
    assert np.array_equal(bands.of(grams, 0), whole)


def test_reasoning_fields_and_calls_count_but_not_the_ids_of_calls(tmp_path):
    def calling(code, call_id, thought):
        call = {"id": call_id, "type": "function", "function": {"name": "python", "arguments": {"code": code}}}
        return [
            {"role": "assistant", "content": "", "reasoning_content": thought, "tool_calls": [call]},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "It is 4."},
        ]

    rows = [
        row("a", calling("2+2", "call_1", "Let me see.")),
        row("b", calling("2+2", "call_2", "Let me see.")),
        row("c", calling("1+3", "call_3", "Let me see.")),
        row("d", calling("2+2", "call_4", "Something else.")),
    ]
    assert len(dropped_ids(rows, run(rows, tmp_path, threshold=None)).keys() & {"a", "b"}) == 1
    assert len(run(rows, tmp_path, threshold=None).dropped) == 1


def test_hostile_texts(tmp_path):
    rows = [
        row("lone surrogate", "\\boxed{4}"),
        row("blank", [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]),
        row("signs", "?!?"),
        row("signs too", "!!!"),
        row("word", "x" * 200_000),
    ]
    gone = dropped_ids(table(rows), run(rows, tmp_path))
    assert len(gone) == 1 and set(gone) < {"signs", "signs too"}, "texts without a word are equal"


@pytest.mark.parametrize("keys", [{"threshold": 0.0}, {"threshold": 1.2}, {"ngram_words": 0}, {"num_perm": 4}], ids=str)
def test_values_that_make_no_sense(keys):
    with pytest.raises(ValueError, match=next(iter(keys))):
        DeduplicationConfig(**keys)
