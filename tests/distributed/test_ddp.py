"""Two ranks under DDP end bit-identical to each other, and where one process on the joint batch ends."""

from __future__ import annotations

import pytest
import torch

from distributed.pool import Pool
from distributed.training import OPTIMIZERS, Setting, train

torch.set_num_threads(1)
PROBING = [name for name in OPTIMIZERS if "SAM" in name or ("gradient norm" in name and "exact" not in name)]


def check(ranks: Pool, setting: Setting, rtol: float = 1e-6, atol: float = 1e-8) -> None:
    alone = train(setting)
    first, second = ranks.run(train, setting)
    for kind in ("params", "state"):
        assert first[kind].keys() == second[kind].keys() == alone[kind].keys()
        for name, t in alone[kind].items():
            assert torch.equal(first[kind][name], second[kind][name]), f"{name} differs between ranks"
            torch.testing.assert_close(first[kind][name], t, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(first["losses"], alone["losses"], rtol=rtol, atol=atol)
    assert alone["losses"][0] != alone["losses"][-1]


@pytest.mark.parametrize("shares", [(6, 6), (9, 3)], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_ranks_are_one_process(ranks, optimizer, shares):
    check(ranks, Setting(optimizer, shares))


@pytest.mark.parametrize("optimizer", ["BNP", "BNP @ RMS", "SAM", "auto"])
def test_a_rank_without_samples(ranks, optimizer):
    check(ranks, Setting(optimizer, (12, 0)))


@pytest.mark.parametrize("optimizer", ["BNP", "BNP @ RMS", "SAM"])
def test_to_float32_rounding(ranks, optimizer):
    check(ranks, Setting(optimizer, (7, 5), dtype=torch.float32), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("optimizer", ["BNP", *PROBING])
def test_probes_without_closure_and_accumulation(ranks, optimizer, parts):
    """The first micro-batches under no_sync: their gradients and statistics wait for the last one."""
    check(ranks, Setting(optimizer, how="probe", parts=parts))
