"""GLOW under FSDP2 and DeepSpeed against one process: loss, gradient norm, parameters, ledger, checkpoints, resume."""

import pytest
import torch
from glow_sharded import LAYOUTS, ONE_PROCESS, STEPS, TWO_PROCESSES, difference, launch, results

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]
CLOSE = 1e-5  # relative; parameters relative to how far they moved


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return results(tmp_path_factory.mktemp("one"), ONE_PROCESS)


def test_one_process_is_the_same_however_its_batch_is_split(one):
    for layout in LAYOUTS:
        first, second = (one[layout, split] for split in ONE_PROCESS)
        assert len(first["loss"]) == STEPS and first["glow/weight_std"][-1] > 0
        assert max(difference(first, second).values()) < CLOSE


SLOW = pytest.mark.slow  # the first ZeRO run compiles an operator


@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("zero2", marks=SLOW), pytest.param("zero3", marks=SLOW)])
def test_two_processes_are_the_same_however_the_model_is_split(strategy, one, tmp_path):
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    two = launch(strategy, tmp_path)
    for layout in LAYOUTS:
        for split in TWO_PROCESSES:
            assert max(difference(one[layout, "1 x 8"], two[layout, split]).values()) < CLOSE, (layout, split)
            ledger = two[layout, split]["ledger"]
            torch.testing.assert_close(ledger, one[layout, "1 x 8"]["ledger"], rtol=CLOSE, atol=0, equal_nan=True)
    assert torch.equal(two["resumed"]["parameters"], two["whole"]["parameters"])
    assert torch.equal(two["resumed"]["ledger"], two["whole"]["ledger"])
    assert two["resumed"]["loss"] == two["whole"]["loss"]
