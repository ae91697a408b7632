"""Ranks whose steps differ, in samples, in what trains, in rates and in what is finite, end where one process ends."""

from __future__ import annotations

import pytest
import torch

from distributed import changing

torch.set_num_threads(1)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("change", changing.CHANGES)
@pytest.mark.parametrize("recipe", changing.RECIPES)
def test_steps_that_differ(ranks, recipe, change, wrap):
    alone = changing.trained(recipe, wrap, change)
    first, second = ranks.run(changing.trained, recipe, wrap, change)
    for p, q, r in zip(alone, first, second, strict=True):
        assert torch.equal(q, r)
        torch.testing.assert_close(q, p, rtol=0, atol=1e-10)
