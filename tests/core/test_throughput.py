import pytest
import torch
from tiny import tiny_model

from afterglow.core.throughput import Throughput, forward_flops, peak_flops, peak_of
from afterglow.core.token_stats import body_and_head


def test_note_by_hand():
    now = [10.0]
    speed = Throughput((1000, 50), peak=1e6, processes=2, clock=lambda: now[0])
    speed.add(100, 40)
    speed.add(300, 160)
    now[0] += 2
    # 400 tokens in 2 s by each of two processes; each did 400,000 + 10,000 operations, of a peak of 1e6 for both.
    assert speed.note() == "400 tokens/s, MFU 41%"


def test_no_utilisation_without_a_known_peak():
    now = [0.0]
    speed = Throughput((1000, 50), peak=None, clock=lambda: now[0])
    speed.add(100, 40)
    now[0] = 1.0
    assert speed.note() == "100 tokens/s"
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 9.89e14), ("NVIDIA H100 PCIe", 7.56e14), ("NVIDIA H200", 9.89e14),
        ("NVIDIA H20", 1.48e14), ("NVIDIA A100-SXM4-80GB", 3.12e14), ("NVIDIA L40S", 3.62e14), ("NVIDIA L4", 1.21e14),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)  # fmt: skip
def test_peaks(name, peak):
    assert peak_of(name) == peak


def test_operations_of_a_model():
    """Two per weight that multiplies; embeddings are looked up."""
    body, head = body_and_head(tiny_model(tie_word_embeddings=False))
    everything = sum(p.numel() for p in tiny_model(tie_word_embeddings=False).parameters())
    embeddings = 320 * 64
    assert forward_flops(body, head.weight) == (2 * (everything - 2 * embeddings), 2 * embeddings)
