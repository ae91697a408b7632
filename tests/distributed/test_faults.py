"""Where a rank ends, is late or has no data, all end with an error that says so, within a timeout, or with the right result."""

from __future__ import annotations

import pytest
import torch

from distributed import faults
from distributed.pool import Failed, Pool
from distributed.test_shares import check
from distributed.training import Setting, train

torch.set_num_threads(1)


def test_a_rank_that_is_killed_in_the_midst_of_a_step(tmp_path):
    pool = Pool(tmp_path, 3)
    try:
        *others, last = pool.outcomes(faults.killed, "auto", "fsdp", "all_to_all_single")
    finally:
        pool.stop()
    assert isinstance(last, Failed) and last.kind == "Died"
    for rank, (seconds, text) in enumerate(others):
        assert seconds < 20
        assert f"rank {rank} of 3 could not exchange" in text and "has ended" in text and "from a checkpoint" in text


def test_a_rank_that_is_late(ranks):
    for rank, (seconds, text) in enumerate(ranks.run(faults.late)):
        assert seconds < 10 * faults.TIMEOUT
        assert f"rank {rank} of 2 could not exchange steps" in text and "the timeout of the process group, 2 s" in text


def test_a_rank_that_is_slow(ranks):
    assert all(ranks.run(faults.slow))


@pytest.mark.parametrize(
    ("optimizer", "wrap"),
    [
        ("soap", "ddp"),
        ("kfac", "ddp"),
        ("BNP @ RMS", "fsdp"),
        ("SAM", "fsdp"),
        ("soap", "fsdp"),
        ("kfac", "fsdp"),
        ("auto", "fsdp"),
    ],
)
def test_a_rank_without_samples(ranks, optimizer, wrap):
    setting = Setting(optimizer, (12, 0), wrap=wrap)
    check(ranks.run(train, setting), train(setting))


def test_a_rank_without_gradients(ranks):
    assert ranks.run(faults.without_gradient, True) == ["nothing", "nothing"]
    _, found = ranks.run(faults.without_gradient, False)
    assert "no parameter has a gradient" in found and "1 of 2 ranks" in found and "empty batch" in found


def test_a_step_is_skipped_by_all_ranks_also_by_one_that_owns_nothing(ranks):
    """That one has nothing to look at, and its vote is waited for."""
    (first, last), (other_first, other_last) = ranks.run(faults.more_ranks_than_layers)
    assert first == last == other_first == other_last


@pytest.mark.parametrize("recipe", ["adamw", "auto", "soap"])
def test_ranks_that_stop_before_others(ranks, recipe):
    for found in ranks.run(faults.joined, recipe):
        assert found == "nothing" if recipe == "adamw" else "join()" in found and "empty batches" in found
