import numpy as np
import pandas as pd
import pytest
import torch

from afterglow.core.errors import DataError, RunFolderError
from afterglow.trainers.loss_ledger import LEDGER_FILE, NO_SAMPLE, LossLedger, check_ids


def rows(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


def test_previous_loss_is_frozen_while_the_epoch_runs():
    ledger = LossLedger(["a", "b", "c"])
    ledger.record(rows(0, 1), torch.tensor([3.0, 4.0]))
    assert ledger.previous_loss(rows(0, 1, 2)).isnan().all()
    ledger.begin_epoch(1)
    ledger.record(rows(0), torch.tensor([2.0]))
    ledger.record(rows(0), torch.tensor([1.0]))  # met twice: compared with epoch 1 both times
    assert ledger.previous_loss(rows(0, 1)).tolist() == [3.0, 4.0]
    expected = [[3.0, 1.0], [4.0, np.nan], [np.nan, np.nan]]
    np.testing.assert_array_equal(ledger.table().numpy(), expected)


def test_a_sample_left_out_of_an_epoch_is_compared_with_the_latest_one_it_was_in():
    ledger = LossLedger(["a", "b"])
    ledger.record(rows(0, 1), torch.tensor([3.0, 4.0]))
    ledger.begin_epoch(1)
    ledger.record(rows(0), torch.tensor([2.0]))
    ledger.begin_epoch(2)
    assert ledger.previous_loss(rows(0, 1)).tolist() == [2.0, 4.0]


def test_what_is_no_sample_is_recorded_nowhere():
    ledger = LossLedger(["a", "b"])
    ledger.record(rows(NO_SAMPLE, 1, NO_SAMPLE), torch.tensor([9.0, 4.0, 8.0]))
    np.testing.assert_array_equal(ledger.table().numpy(), [[np.nan], [4.0]])


def filled_ledger() -> LossLedger:
    ledger = LossLedger(["a", "b", "c"])
    ledger.record(rows(0, 1, 2), torch.tensor([1 / 3, 2 / 3, 1e-9]))
    ledger.begin_epoch(1)
    ledger.record(rows(2), torch.tensor([0.1]), torch.tensor([1 / 7]))
    return ledger


def test_saved_table_is_plain_parquet_and_comes_back_bit_for_bit(tmp_path):
    ledger = filled_ledger()
    path = ledger.save(tmp_path / "checkpoint-1")
    frame = pd.read_parquet(path)
    assert list(frame.columns) == ["id", "epoch_1", "epoch_2", "weight"] and frame["epoch_1"].dtype == np.float32
    assert [p.name for p in path.parent.iterdir()] == [LEDGER_FILE]
    back = LossLedger.load(path.parent, ["a", "b", "c"])
    assert back.epoch == 1
    np.testing.assert_array_equal(back.table().numpy(), ledger.table().numpy())
    np.testing.assert_array_equal(back.previous_loss(rows(0, 1, 2)), ledger.previous_loss(rows(0, 1, 2)))
    np.testing.assert_array_equal(frame["weight"], np.array([np.nan, np.nan, 1 / 7], "float32"))
    again = pd.read_parquet(back.save(tmp_path / "again"))
    pd.testing.assert_frame_equal(again, frame)


def test_losses_of_earlier_epochs_and_weights_of_this_one():
    ledger = LossLedger(["a", "b"])
    for epoch, losses in enumerate(([3.0, 4.0], [2.0, 3.5])):
        ledger.begin_epoch(epoch)
        ledger.record(rows(0, 1), torch.tensor(losses), torch.tensor([1.0, 0.5]))
    assert ledger.loss_ago(rows(1, 0), 1).tolist() == [4.0, 3.0]
    assert ledger.loss_ago(rows(0), 2).isnan().all()
    ledger.begin_epoch(2)
    assert ledger.loss_ago(rows(1, 0), 1).tolist() == [3.5, 2.0] and ledger.loss_ago(rows(0), 2).tolist() == [3.0]


def test_reordered_grown_and_shrunk_training_sets_keep_their_losses(tmp_path):
    filled_ledger().save(tmp_path)
    ledger = LossLedger.load(tmp_path, ["new", "c", "a"])
    expected = torch.tensor([[torch.nan, torch.nan], [1e-9, 0.1], [1 / 3, torch.nan]])
    np.testing.assert_array_equal(ledger.table().numpy(), expected.numpy())


def test_a_folder_without_a_ledger_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match=f"has no {LEDGER_FILE}.*train from the start"):
        LossLedger.load(tmp_path, ["a"])


def test_ids_must_be_unique_strings():
    assert check_ids(["b", "a"]) == ["b", "a"]
    with pytest.raises(DataError, match="rows 0 and 2: both have the id 'a'"):
        check_ids(["a", "b", "a"])
    with pytest.raises(DataError, match="row 1: `id` must be a string"):
        check_ids(["a", None])  # pyright: ignore[reportArgumentType]
