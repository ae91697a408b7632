"""Two ranks see together what one process sees, and step each its own rows by it."""

from __future__ import annotations

import pytest
import torch

from distributed.observing import step

torch.set_num_threads(1)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp", "hsdp, two copies"])
@pytest.mark.parametrize("shares", [(6, 6), (9, 3)], ids=str)
def test_two_ranks_see_what_one_process_does(ranks, wrap, shares):
    alone = step(shares, wrap)
    first, second = ranks.run(step, shares, wrap)
    assert first["grams"].keys() == alone["grams"].keys() and len(alone["grams"]) == 5
    for name, (count, gram) in alone["grams"].items():
        assert torch.equal(first["grams"][name][1], second["grams"][name][1])
        assert torch.equal(first["grams"][name][0], count)
        torch.testing.assert_close(first["grams"][name][1], gram, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(first["steps"][name], alone["steps"][name], rtol=1e-8, atol=1e-10)


def test_a_rank_that_sees_nothing_takes_part(ranks):
    alone = step((12, 0), "ddp")
    first, second = ranks.run(step, (12, 0), "ddp")
    for name, (_, gram) in alone["grams"].items():
        torch.testing.assert_close(second["grams"][name][1], gram, rtol=1e-10, atol=1e-12)
        assert torch.equal(first["grams"][name][1], second["grams"][name][1])
