import numpy as np
import pytest

from afterglow.eval.pathways import consistency, edit_distances, mean_distance, pathway


def plain_distance(one, other):
    """Levenshtein by the textbook."""
    table = [[max(i, j) if not min(i, j) else 0 for j in range(len(other) + 1)] for i in range(len(one) + 1)]
    for i, a in enumerate(one, 1):
        for j, b in enumerate(other, 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a != b))
    return table[-1][-1]


def test_a_pathway_is_sorted_by_weight_and_tagged_by_layer():
    probabilities = np.array([[0.1, 0.5, 0.4], [0.4, 0.2, 0.4]])
    assert pathway(probabilities, 2).tolist() == [1, 2, 3, 5]  # expert 0 of layer 2 is symbol 3; ties by number
    assert pathway(probabilities, 1).tolist() == [1, 3]


def test_distances_by_hand_and_by_the_textbook():
    one = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    other = np.array([[1, 2, 3, 4], [2, 3, 4, 9], [5, 6, 7, 8]])
    assert edit_distances(one, other).tolist() == [0, 0.5, 1]  # deleted in front, inserted at the end
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 4, (40, 9)), rng.integers(0, 4, (40, 9))
    expected = [plain_distance(a, b) / 9 for a, b in zip(one.tolist(), other.tolist(), strict=True)]
    assert edit_distances(one, other).tolist() == pytest.approx(expected)
    assert edit_distances(other, one).tolist() == pytest.approx(expected)


def test_pairs_are_of_different_samples():
    same, odd = np.array([1, 2]), np.array([3, 4])
    assert mean_distance([same, odd], 50, 0) == 1  # never a sample with itself
    assert mean_distance([same, same, same], 50, 0) == 0
    assert mean_distance([same], 50, 0) is None
    many = [np.random.default_rng(i).integers(0, 5, 6) for i in range(20)]
    assert mean_distance(many, 30, 1) == mean_distance(many, 30, 1) != mean_distance(many, 30, 2)


def test_consistency_by_hand():
    rows = [np.eye(3), np.eye(3), -np.eye(3)]
    probabilities = np.array([[0.6, 0.3, 0.1], [0.3, 0.6, 0.1], [0.3, 0.6, 0.1]])
    # top 2: (.6, .3, 0), (.3, .6, 0), (-.3, -.6, 0)
    assert consistency(probabilities, rows, 2) == pytest.approx((0.36 / 0.45 - 1) / 2)
    assert consistency(probabilities, rows, 1) == pytest.approx((0 - 1) / 2)
    assert consistency(probabilities[:1], rows[:1], 2) is None
    scaled = [10 * of for of in rows]
    assert consistency(0.2 * probabilities, scaled, 2) == pytest.approx(consistency(probabilities, rows, 2))
