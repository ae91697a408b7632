"""Two ranks under FSDP2, each holding some rows of every parameter, end where one process ends."""

from __future__ import annotations

import pytest
import torch

from distributed.test_ddp import check
from distributed.training import OPTIMIZERS, Setting

torch.set_num_threads(1)
SHARDABLE = [name for name in OPTIMIZERS if "exact" not in name]


@pytest.mark.parametrize("optimizer", SHARDABLE)
def test_two_ranks_are_one_process(ranks, optimizer):
    check(ranks, Setting(optimizer, (7, 5), wrap="fsdp"))
