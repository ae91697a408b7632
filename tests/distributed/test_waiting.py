"""The state of what is frozen waits, whoever keeps it, and is saved and loaded whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from distributed import waiting

torch.set_num_threads(1)


def _same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["params"].keys() == other["params"].keys() and one["state"].keys() == other["state"].keys()
    for kind in ("params", "state"):
        for name, t in one[kind].items():
            assert torch.equal(t, other[kind][name]), name


def _close(one: dict[str, Any], other: dict[str, Any]) -> None:
    """float64, sums in another order."""
    for name, t in one["params"].items():
        assert (other["params"][name] - t).abs().max() <= 1e-10, name


TABLE = [(r, w) for r in waiting.RECIPES for w in ("ddp", "fsdp", "tensor")]
TABLE += [(r, w) for r in ("adam, BNP", "soap", "auto") for w in ("hsdp", "fsdp and tensor")]


@pytest.mark.parametrize(("recipe", "wrap"), TABLE)
def test_a_run_resumed_around_frozen_layers_is_the_one_that_never_stopped(ranks, four, recipe, wrap):
    alone = waiting.never_stopped(recipe)
    for whole, found in (ranks if waiting.WRAPS[wrap] == 2 else four).run(waiting.resumed, recipe, wrap):
        _close(alone, whole)
        for twin in found.values():
            _same(whole, twin)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp", "tensor"])
@pytest.mark.parametrize("recipe", waiting.RECIPES)
def test_one_rank_alone_steps_as_a_process_without_ranks(one, recipe, wrap):
    ((whole, found),) = one.run(waiting.resumed, recipe, wrap)
    _close(waiting.never_stopped(recipe), whole)
    for twin in found.values():
        _same(whole, twin)


@pytest.mark.parametrize("recipe", ["adam, BNP", "soap"])
@pytest.mark.parametrize("wrap", ["ddp", "fsdp", "tensor"])
def test_what_waits_is_saved_for_other_numbers_of_ranks(ranks, four, recipe, wrap, tmp_path):
    whole, _ = ranks.run(waiting.saved, recipe, wrap, str(tmp_path))
    for twins in ranks.run(waiting.loaded, recipe, wrap, str(tmp_path)):
        for twin in twins.values():
            _same(whole, twin)
    other = "fsdp and tensor" if wrap == "tensor" else wrap
    for twins in [*four.run(waiting.loaded, recipe, other, str(tmp_path)), waiting.loaded(recipe, "", str(tmp_path))]:
        for twin in twins.values():
            _close(whole, twin)


def test_torch_leaves_out_what_is_frozen_and_a_warning_says_so():
    run = waiting.Run("soap", "")
    run.step(0)
    run.freeze(2)
    model_state, optimizer_state = get_state_dict(run.model, run.optimizer)
    with pytest.warns(UserWarning, match=r"nothing of 2\.weight, 2\.bias, 3\.weight, …, which is frozen"):
        set_state_dict(run.model, run.optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
