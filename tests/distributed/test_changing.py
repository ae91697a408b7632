"""Ranks whose steps differ, in samples, in what trains, in rates, in owners and in what is finite, end where one process ends."""

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


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("recipe", changing.RECIPES)
def test_points_that_are_probed_lag_layer_by_layer(ranks, recipe, wrap):
    """A layer that has made no step is probed by its first gradient, the others by what they knew before."""
    alone = changing.probed(recipe, wrap)
    first, second = ranks.run(changing.probed, recipe, wrap)
    for p, q, r in zip(alone, first, second, strict=True):
        assert torch.equal(q, r)
        torch.testing.assert_close(q, p, rtol=0, atol=1e-10)


def _same(found: changing.Contents, alone: changing.Contents, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found, alone, rtol=0, atol=atol)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp", "hsdp"])
@pytest.mark.parametrize("which", ["weight", "bias"])
@pytest.mark.parametrize("recipe", changing.OTHERS)
def test_state_goes_with_a_parameter_whose_layer_is_frozen_in_part(ranks, recipe, which, wrap):
    alone = changing.partly_frozen(recipe, wrap, which)
    first, second = ranks.run(changing.partly_frozen, recipe, wrap, which)
    _same(second, first, 0.0)
    _same(first, alone)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("which", ["weight", "bias"])
@pytest.mark.parametrize("recipe", changing.OTHERS)
def test_what_has_no_gradient_is_left_out_on_all_ranks(ranks, recipe, which, wrap):
    """As one process leaves it out; replicas are one bit for bit."""
    alone = changing.partly_without_gradient(recipe, wrap, which)
    first, second = ranks.run(changing.partly_without_gradient, recipe, wrap, which)
    _same(second, first, 0.0)
    _same(first, alone)


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
