"""Ranks whose steps differ, in samples, in what trains, in rates, in owners and in what is finite, end where one process ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from distributed import changing
from distributed.pool import Pool

torch.set_num_threads(1)


def _same(found: Any, alone: Any, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found, alone, rtol=0, atol=atol)


def _as_alone(ranks: Pool, run: Callable[..., Any], *args: str) -> None:
    """Ranks end with the same bits, and where one process ends."""
    alone = run(*args)
    first, second = ranks.run(run, *args)
    _same(second, first, 0.0)
    _same(first, alone)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("change", changing.CHANGES)
@pytest.mark.parametrize("recipe", changing.RECIPES)
def test_steps_that_differ(ranks, recipe, change, wrap):
    _as_alone(ranks, changing.trained, recipe, wrap, change)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("recipe", changing.RECIPES)
def test_points_that_are_probed_lag_layer_by_layer(ranks, recipe, wrap):
    """A layer that has made no step is probed by its first gradient, the others by what they knew before."""
    _as_alone(ranks, changing.probed, recipe, wrap)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp", "hsdp"])
@pytest.mark.parametrize("which", ["weight", "bias"])
@pytest.mark.parametrize("recipe", changing.OTHERS)
def test_state_goes_with_a_parameter_whose_layer_is_frozen_in_part(ranks, recipe, which, wrap):
    _as_alone(ranks, changing.partly_frozen, recipe, wrap, which)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("which", ["weight", "bias"])
@pytest.mark.parametrize("recipe", changing.OTHERS)
def test_what_has_no_gradient_is_left_out_on_all_ranks(ranks, recipe, which, wrap):
    _as_alone(ranks, changing.partly_without_gradient, recipe, wrap, which)


@pytest.mark.parametrize("recipe", changing.OTHERS)
@pytest.mark.parametrize(("before", "after"), [("ddp", "alone"), ("fsdp", "ddp"), ("alone", "fsdp")])
def test_what_waits_is_saved_and_loaded_at_other_numbers_of_ranks(ranks, three, tmp_path, recipe, before, after):
    path = str(tmp_path / "checkpoint")
    alone = changing.saved_frozen(recipe, "alone", path)
    if before != "alone":
        ranks.run(changing.saved_frozen, recipe, before, path)
    for found in (
        three.run(changing.resumed_frozen, recipe, after, path)
        if after != "alone"
        else [changing.resumed_frozen(recipe, after, path)]
    ):
        _same(found, alone)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("recipe", ["auto", "whitening", "soap"])
def test_state_goes_from_owner_to_owner(ranks, recipe, wrap):
    alone = changing.handed_on(recipe, wrap)
    for found in ranks.run(changing.handed_on, recipe, wrap):
        _same(found, alone)
