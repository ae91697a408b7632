"""Colwise and Rowwise layers, alone and under FSDP2, end where one process ends."""

from __future__ import annotations

import pytest
import torch

from distributed import tensors

torch.set_num_threads(1)


@pytest.mark.parametrize("copies", [1, 2], ids=["TP", "FSDP2 and TP"])
@pytest.mark.parametrize("recipe", tensors.RECIPES)
def test_ranks_are_one_process(ranks, four, recipe, copies):
    alone = tensors.train(recipe)
    for found in (four if copies > 1 else ranks).run(tensors.train, recipe, copies):
        for name, t in alone.items():
            assert (found[name] - t).abs().max() <= 1e-10, name
