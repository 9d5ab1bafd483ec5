import random
from collections import Counter

from afterglow.data_filters.selection import (
    count_by,
    histogram,
    jaccard,
    kept_count,
    lowest,
    mean,
    seeded_order,
)


def test_kept_count_rounds_half_up_and_keeps_at_least_one():
    assert [kept_count(10, ratio) for ratio in (1.0, 0.95, 0.94, 0.9, 0.05, 0.04, 0.001)] == [10, 10, 9, 9, 1, 1, 1]
    assert [kept_count(n, 0.9) for n in (0, 1, 2, 4, 5, 6, 100)] == [0, 1, 2, 4, 5, 5, 90]
    assert kept_count(30, 0.1) == 3, "0.1 * 30 is 3.0000000000000004"


def test_lowest_breaks_ties_by_id_and_leaves_none_out():
    assert lowest([0.5, 0.5, 0.5, 0.1], ["c", "a", "b", "d"], 0.5) == {3, 1}
    assert lowest([None, 2.0, None, 1.0], ["a", "b", "c", "d"], 0.5) == {3}
    assert lowest([None], ["a"], 0.9) == set()
    values, ids = [n * 7 % 5 or None for n in range(200)], [f"{n * 37 % 200:03}" for n in range(200)]
    ranked = sorted((value, ids[row], row) for row, value in enumerate(values) if value is not None)
    for ratio in (0.01, 0.3, 0.5, 0.999, 1.0):
        assert lowest(values, ids, ratio) == {row for _, _, row in ranked[: kept_count(160, ratio)]}


def test_seeded_order_depends_on_seed_and_ids_alone():
    ids = [f"row{i}" for i in range(50)]
    order = [ids[i] for i in seeded_order(range(50), ids, 0, "x")]
    shuffled = random.Random(1).sample(ids, 50)
    assert [shuffled[i] for i in seeded_order(range(50), shuffled, 0, "x")] == order
    assert [ids[i] for i in seeded_order(range(50), ids, 1, "x")] != order
    assert [ids[i] for i in seeded_order(range(50), ids, 0, "y")] != order
    fewer = [ids[i] for i in seeded_order(range(25), ids, 0, "x")]
    assert fewer == [key for key in order if key in fewer], "more rows leave the order of the others as it was"


def test_every_row_is_as_likely_to_come_early():
    ids = [f"r{i}" for i in range(10)]
    early = Counter(i for seed in range(1000) for i in seeded_order(range(10), ids, seed, "x")[:5])
    assert min(early.values()) > 435 and max(early.values()) < 565, "500 expected, standard deviation 16"


def test_histogram_counts_every_value_once():
    counted = histogram([0.0, 0.25, 1.0, None, 0.5], ["a", "a", "b", "a", "b"], bins=4)
    assert counted == {"edges": [0.0, 0.25, 0.5, 0.75, 1.0], "counts": {"a": [1, 1, 0, 0], "b": [0, 0, 1, 1]}}
    assert sum(histogram([3, 3, 3], ["a"] * 3)["counts"]["a"]) == 3
    assert histogram([None], ["a"]) == {"edges": [], "counts": {}}


def test_small_numbers():
    assert count_by(["b", "a", "b"]) == {"b": 2, "a": 1}
    assert jaccard({1, 2}, {2, 3}) == 1 / 3 and jaccard(set(), set()) is None
    assert mean([1, None, 2]) == 1.5 and mean([None]) is None
