"""Ranks under DDP decide alike, and communicate once a step."""

from __future__ import annotations

import pytest
import torch

from distributed import agreement
from distributed.pool import Failed
from distributed.training import Setting

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("BNP", [1] * 20 + [0, 0, 0, 1]),  # after 20 steps every fourth one is observed
        ("BNP, loop", [1] * 20 + [0, 0, 0, 1]),
        ("BNP @ RMS", [1] * 5),
        ("SAM", [1] * 5),
        ("gradient norm, central", [1] * 5),
        ("gradient norm, exact", [3] * 5),  # and g and Hv, which pass by DDP's reducer
        ("adamw", [0] * 3),
    ],
)
def test_statistics_of_all_layers_are_one_call_a_step(ranks, optimizer, expected):
    for counts in ranks.run(agreement.calls_per_step, Setting(optimizer), len(expected)):
        assert counts == expected


def test_a_skipped_step_is_two_calls(ranks):
    """Statistics, and, since they are not finite, whether gradients are: else statistics alone would be left out."""
    assert ranks.run(agreement.calls_of_a_skipped_step) == [2, 2]


@pytest.mark.parametrize("name", agreement.MODELS)
def test_different_models_are_refused_on_every_rank(ranks, name):
    for outcome in ranks.outcomes(agreement.different_models, name):
        assert isinstance(outcome, Failed) and outcome.kind == "RuntimeError"
        assert "trains another model than rank 0" in outcome.message and "build the same model everywhere" in outcome.message


@pytest.mark.parametrize("what", ["loss", "gradient", "inputs"])
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("choice", agreement.CHOICES)
def test_what_is_bad_on_one_rank_is_skipped_on_all(ranks, choice, nonfinite, what):
    found = ranks.run(agreement.bad_on_one_rank, choice, nonfinite, what)
    for one in found:
        assert one["unchanged"]
        assert (one["raised"] is not None and "inf or NaN" in one["raised"]) if nonfinite == "raise" else one["skipped"]
    assert all(torch.equal(s, t) for s, t in zip(found[0]["end"], found[1]["end"], strict=True))
    assert all(t.isfinite().all() for t in found[0]["end"])


@pytest.mark.parametrize("choice", ["BNP", "BNP @ RMS", "RMS", "SAM", "gradient norm"])
def test_an_overflow_on_one_rank_is_skipped_on_all(ranks, choice):
    for one in ranks.run(agreement.overflow_on_one_rank, choice):
        assert one == {"unchanged": True, "skipped": True}


def test_perturbations_may_be_local(ranks):
    """no_sync around the first backward (R6): replicas stay alike where P is not made of that gradient."""
    first, second = ranks.run(agreement.locally_perturbed)
    assert all(torch.equal(s, t) for s, t in zip(first, second, strict=True))


@pytest.mark.parametrize("optimizer", ["BNP", "BNP @ RMS", "SAM"])
def test_resuming_is_never_having_stopped(ranks, optimizer):
    for whole, twin in ranks.run(agreement.resumed, Setting(optimizer)):
        for kind in ("params", "state"):
            assert all(torch.equal(t, twin[kind][name]) for name, t in whole[kind].items())
