import math

import pytest
import torch

from afterglow.eval.geometry import RunningCovariance, alpha_req, describe_geometry, rank_me


def features(singular, count):
    """Centred (count, d) features with these singular values."""
    d = len(singular)
    raw = torch.randn(count, d + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    raw[:, 0] = 1  # what is orthogonal to ones has mean 0
    basis = torch.linalg.qr(raw)[0][:, 1:]
    turn = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    return basis * torch.as_tensor(singular, dtype=torch.float64) @ turn


def covariance_of(values, batch=7):
    running = RunningCovariance(values.shape[1])
    for part in values.split(batch):
        running.add(part)
    return running


def test_rank_me_of_spectra_by_hand():
    assert rank_me(torch.ones(12)) == pytest.approx(12)
    assert rank_me(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert rank_me(torch.tensor([0.5, 0.25, 0.25])) == pytest.approx(math.exp(1.5 * math.log(2)))
    assert math.isnan(rank_me(torch.zeros(3)))


def test_both_definitions_from_features():
    found = describe_geometry(covariance_of(features([2.0, 1.0, 1.0], 40)))
    # eigenvalues 4:1:1 of the covariance, singular values 2:1:1
    cov = [4 / 6, 1 / 6, 1 / 6]
    assert found["rankme_cov"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in cov)))
    assert found["rankme_sv"] == pytest.approx(math.exp(1.5 * math.log(2)), rel=1e-5)
    assert found["rankme_sv"] > found["rankme_cov"]
    assert found["sequences"] == 40 and found["dimensions"] == 3 and found["enough"]
    assert describe_geometry(covariance_of(features([1.0] * 8, 30)))["rankme_cov"] == pytest.approx(8)
    assert describe_geometry(covariance_of(features([1.0, 0, 0, 0], 30)))["rankme_cov"] == pytest.approx(1, abs=1e-6)


def test_only_one_definition_sees_the_mean():
    values = features([1.0] * 6, 50)
    moved = describe_geometry(covariance_of(values + 100.0))
    assert moved["rankme_cov"] == pytest.approx(6, rel=1e-6) and moved["rankme_sv"] < 1.5


def test_alpha_is_the_exponent_of_the_eigenvalues():
    ranks = torch.arange(1, 65, dtype=torch.float64)
    assert alpha_req(1 / ranks, 64) == pytest.approx(1)
    assert alpha_req(7 * ranks**-2.5, 64) == pytest.approx(2.5)
    bent = torch.where(ranks < 11, 100.0, ranks**-1.5)  # the head is left out
    assert alpha_req(bent, 64) == pytest.approx(1.5)
    found = describe_geometry(covariance_of(features((ranks**-0.5).tolist(), 300)))
    assert found["alpha_cov"] == pytest.approx(1, rel=1e-6) and found["alpha_sv"] == pytest.approx(0.5, rel=1e-6)
    assert alpha_req(1 / ranks, 17) is None and alpha_req(1 / ranks[:30], 30) is None  # too few ranks
    assert alpha_req(torch.where(ranks > 20, 0.0, 1 / ranks), 64) is None


def test_streaming_equals_the_whole_in_any_batches():
    values = torch.randn(101, 9, generator=torch.Generator().manual_seed(2)) * 3 + 50
    expected = torch.linalg.eigvalsh(torch.cov(values.double().T)).flip(0)
    singular = torch.linalg.svdvals(values.double())
    for batch in (1, 7, 101):
        running = covariance_of(values, batch)
        torch.testing.assert_close(running.covariance_spectrum(), expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(running.singular_values(), singular, rtol=1e-8, atol=1e-9)
    running.add(values[:0])
    assert running.count == 101


def test_few_sequences_are_said_to_be_few():
    found = describe_geometry(covariance_of(torch.randn(20, 64, generator=torch.Generator().manual_seed(3))))
    assert not found["enough"] and found["rankme_cov"] <= 19 and found["alpha_cov"] is not None
