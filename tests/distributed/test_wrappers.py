"""What torch's wrappers can be told changes nothing: ranks end bit for bit alike, and where one process on the joint batch ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed import wrappers
from distributed.pool import Failed, Pool
from distributed.test_shares import check
from distributed.training import Setting, train

torch.set_num_threads(1)
EXACT = 1e-10
BFLOAT16 = 2e-6  # of float32: forwards and backwards are the same operations, and sums of two shares in another order


def same(ranks: Pool, within: float, function: Callable[..., Mapping[str, Tensor]], *args: Any) -> None:
    alone = function(*args)
    found = ranks.run(function, *args)
    for name, t in alone.items():
        for one in found:
            assert torch.equal(one[name], found[0][name]), f"{name} differs between ranks"
        assert (found[0][name] - t).abs().max() <= within, name


@pytest.mark.parametrize(("optimizer", "parts"), [("soap", 1), ("muon", 2), ("auto, SAM", 2)])
@pytest.mark.parametrize(
    "wrap",
    [
        "ddp, views",
        "ddp, static",
        "ddp, static views",
        "ddp, searching",
        "replicate",
        "fsdp, kept",
        "fsdp, offloaded",
        "fsdp, nested",
    ],
)
def test_options_of_wrappers(ranks, wrap, optimizer, parts):
    """In halves gradients wait: no_sync() of DDP, set_requires_gradient_sync(False) of FSDP2."""
    setting = Setting(optimizer, (8, 4), wrap=wrap, how="probe" if parts > 1 else "closure", parts=parts)
    check(ranks.run(train, setting), train(setting))


@pytest.mark.parametrize("recipe", ["BNP @ RMS", "muon", "auto", "soap"])
def test_mixed_precision_of_fsdp2(ranks, recipe):
    same(ranks, BFLOAT16, wrappers.mixed, recipe)


@pytest.mark.parametrize("used", wrappers.USED)
@pytest.mark.parametrize("recipe", ["SAM", "muon", "auto"])
def test_parameters_that_a_rank_does_not_use(ranks, recipe, used):
    same(ranks, EXACT, wrappers.unused, recipe, used)


@pytest.mark.parametrize("recipe", wrappers.RECIPES)
@pytest.mark.parametrize("function", [wrappers.sequences, wrappers.experts])
def test_sequences_and_experts_in_parts(ranks, function, recipe):
    same(ranks, EXACT, function, recipe)


@pytest.mark.parametrize("recipe", ["SAM", "muon", "auto"])
def test_copies_of_parts(four, recipe):
    same(four, EXACT, wrappers.copies_of_parts, recipe)


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        (wrappers.localized, "TypeError", "copy the model by fully_shard, or by replicate"),
        (wrappers.without_backend, "ValueError", "init_process_group('cpu:gloo,cuda:nccl')"),
    ],
)
def test_what_is_refused(ranks, what, kind, message):
    for outcome in ranks.outcomes(what):
        assert isinstance(outcome, Failed) and outcome.kind == kind and message in outcome.message
