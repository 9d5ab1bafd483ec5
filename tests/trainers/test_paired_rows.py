import numpy as np

from afterglow.trainers.paired_rows import pair_rows


def test_pairs_are_a_function_of_seed_and_epoch():
    assert (pair_rows(1, 2, 10, 7) == pair_rows(1, 2, 10, 7)).all()
    assert (pair_rows(1, 2, 10, 100) != pair_rows(2, 2, 10, 100)).any()
    assert (pair_rows(1, 2, 10, 100) != pair_rows(1, 3, 10, 100)).any()


def test_rows_of_one_epoch_have_retain_rows_of_their_own():
    assert len(set(pair_rows(0, 0, 40, 40))) == 40
    assert len(set(pair_rows(0, 5, 8, 1000))) == 8


def test_no_retain_row_is_used_twice_before_all_were_used_once():
    walk = np.concatenate([pair_rows(3, epoch, 10, 7) for epoch in range(7)])
    for start in range(0, 70, 7):
        assert sorted(walk[start : start + 7]) == list(range(7))


def test_one_retain_row_serves_all():
    assert pair_rows(0, 4, 5, 1).tolist() == [0] * 5
