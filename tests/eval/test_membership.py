import math
import zlib

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from tiny import tiny_model

from afterglow.core.errors import DataError
from afterglow.core.token_stats import ScoredSequence, score_tokens
from afterglow.eval.membership import auc, gradient_norm, min_k_plus_score, min_k_score, zlib_score
from afterglow.eval.suite_base import membership_of


def test_scores_by_hand():
    assert min_k_score([1, 5, 2, 3, 4]) == 4.5, "40% of five tokens are two: 5 and 4"
    assert min_k_score([3.0]) == 3 and min_k_score([1, 2], share=0.1) == 2, "at least one token"
    # z: (3-1)/2 = 1, (1-1)/1 = 0, (4-2)/0.5 = 4
    assert min_k_plus_score([3, 1, 4], [1, 1, 2], [4, 1, 0.25], share=1) == pytest.approx(5 / 3)
    assert min_k_plus_score([3, 1, 4], [1, 1, 2], [4, 1, 0.25], share=0.4) == 4
    assert math.isfinite(min_k_plus_score([0.0], [0.0], [0.0])), "a certain model has no spread"
    assert zlib_score(2.0, "aaaa") == 2 / len(zlib.compress(b"aaaa"))
    text = {"nll": 2.0, "zlib": 0.1, "min_k": 3.0, "min_k++": 1.0}
    assert membership_of(text, {"nll": 0.5}, {"gradnorm": 7}) == {
        "loss": 2.0, "zlib": 0.1, "min_k": 3.0, "min_k++": 1.0, "reference": 1.5, "gradnorm": 7
    }  # fmt: skip
    assert set(membership_of(text, {}, {})) == {"loss", "zlib", "min_k", "min_k++"}
    with pytest.raises(DataError, match="without tokens"):
        min_k_score([])


def test_auc_is_one_where_the_forget_set_is_recognised():
    assert auc([1, 2, 3], [4, 5]).value == 1 and auc([4, 5], [1, 2, 3]).value == 0
    assert auc([1, 1], [1, 1]).value == 0.5, "ties count half"
    # pairs (forget, holdout): 1<2, 1<4, 3>2, 3<4: three of four
    assert auc([1, 3], [2, 4]).value == 0.75
    with pytest.raises(DataError, match="one of the two sets is empty"):
        auc([], [1])


def test_auc_is_mann_whitney_and_its_interval_covers():
    rng = np.random.default_rng(0)
    for _ in range(20):
        forget, holdout = rng.integers(0, 6, rng.integers(2, 30)), rng.integers(1, 7, rng.integers(2, 30))
        found = auc(forget, holdout)
        assert found.value == pytest.approx(mannwhitneyu(holdout, forget).statistic / len(forget) / len(holdout))
        assert 0 <= found.low <= found.value <= found.high <= 1
    true = 0.7602  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    covered = [
        found.low < true < found.high for found in (auc(rng.normal(0, 1, 40), rng.normal(1, 1, 40)) for _ in range(300))
    ]
    assert 0.91 < np.mean(covered) < 0.99
    certain = auc(range(50), range(100, 150))
    assert certain.high == 1 and 0.9 < certain.low < 0.95, "50 texts cannot show that no pair ever disagrees"


def test_every_attack_recognises_what_was_trained_on():
    """A tiny model learns eight random texts; each of the six attacks tells them from eight others: AUC near 1."""
    torch.manual_seed(0)
    model, untrained = tiny_model(vocab_size=64), tiny_model(vocab_size=64)
    texts = torch.randint(0, 64, (16, 24))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        model(input_ids=texts[:8], labels=texts[:8]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    scored = np.arange(24) > 0
    asked = [ScoredSequence(i, text.numpy(), scored) for i, text in enumerate(texts)]
    of_model, of_other = (dict(score_tokens(m, asked, entropy=True)) for m in (model, untrained))
    found: dict[str, list[float]] = {}
    for i, text in enumerate(texts):
        stats = of_model[i]
        nll = stats.nll.mean().item()
        measured = {
            "nll": nll,
            "zlib": zlib_score(nll, " ".join(map(str, text.tolist()))),
            "min_k": min_k_score(stats.nll.numpy()),
            "min_k++": min_k_plus_score(stats.nll.numpy(), stats.entropy.numpy(), stats.varentropy.numpy()),
        }
        norm = {"gradnorm": gradient_norm(model, text, text)}
        for name, score in membership_of(measured, {"nll": of_other[i].nll.mean().item()}, norm).items():
            found.setdefault(name, []).append(score)
    assert {name: auc(scores[:8], scores[8:]).value for name, scores in found.items()} == dict.fromkeys(found, 1.0)
    assert len(found) == 6
