"""Two ranks under FSDP2, each holding some rows of every parameter, end where one process ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from distributed import agreement, sharded
from distributed.pool import Failed
from distributed.test_ddp import check
from distributed.training import OPTIMIZERS, Setting, train
from precond import Muon
from precond.optim.inputs import survey
from precond.optim.optimizer.compatibility import check_shared

torch.set_num_threads(1)
SHARDABLE = [name for name in OPTIMIZERS if "exact" not in name]


def check_equal(a, b, **within) -> None:
    for kind in ("params", "state"):
        assert a[kind].keys() == b[kind].keys()
        for name, t in a[kind].items():
            torch.testing.assert_close(t, b[kind][name], **within, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("optimizer", SHARDABLE)
def test_two_ranks_are_one_process(ranks, optimizer):
    check(ranks, Setting(optimizer, (7, 5), wrap="fsdp"))


@pytest.mark.parametrize("wrap", ["fsdp, partly", "hsdp, two parts", "hsdp, two copies"])
@pytest.mark.parametrize("optimizer", ["adamw, clipped", "BNP", "SAM", "gradient norm, q=∞", "soap, SAM", "auto"])
def test_parameters_that_are_whole_on_some_ranks_count_once(ranks, optimizer, wrap):
    check(ranks, Setting(optimizer, wrap=wrap))


@pytest.mark.parametrize("optimizer", ["SAM", "gradient norm, central"])
def test_probes_without_closure(ranks, optimizer):
    check(ranks, Setting(optimizer, wrap="fsdp", how="probe", parts=2))


@pytest.mark.parametrize("optimizer", ["adamw", "BNP", "auto", "soap, SAM"])
def test_a_trainer_that_shards_after_the_optimizer_was_made(ranks, optimizer):
    """It puts the new parameters into the groups: the optimizer follows, in the midst of a forward too."""
    setting = Setting(optimizer, wrap="fsdp")
    check_equal(ranks.run(sharded.sharded_later, setting)[0], train(setting), rtol=1e-6, atol=1e-8)


def test_sharding_after_a_step_is_refused(ranks):
    for found in ranks.outcomes(sharded.sharded_later, Setting("soap", wrap="fsdp"), 1):
        assert isinstance(found, Failed) and found.kind == "RuntimeError"
        assert "shard the model before the first step" in found.message


def test_layers_stay_known_when_the_model_changes_between_steps(ranks):
    for before, after in ranks.run(sharded.frozen_between_steps):
        assert before == after and "1.weight norm" in after and len(after) == 6


def test_parameters_and_their_state_are_divided_and_statistics_are_not(ranks):
    first, second = ranks.run(sharded.shapes, Setting("BNP @ RMS", wrap="fsdp"))
    for name, here, there in [
        ("attention.in_proj_weight ", (9, 6), (9, 6)),
        ("attention.in_proj_weight inner.r", (9, 6), (9, 6)),
        ("head.weight inner.r", (2, 6), (1, 6)),
        ("head.weight m", (2, 6), (1, 6)),
        ("last.weight inner.r", (1, 3), (0, 3)),
    ]:
        assert first[name] == (True, here) and second[name] == (True, there)
    assert first["last.weight outer.mean"] == second["last.weight outer.mean"] == (False, (1, 3))
    assert not first["head.weight step"][0]


@pytest.mark.parametrize(
    ("optimizer", "calls"),
    [("adamw", 0), ("BNP", 1), ("BNP @ RMS", 1), ("L1", 1), ("adamw, clipped", 1), ("BNP, clipped", 2), ("SAM in p", 1)],
)
def test_rows_need_no_communication(ranks, optimizer, calls):
    """One call for the statistics of all inputs, one for each norm; none for M."""
    for counts in ranks.run(agreement.calls_per_step, Setting(optimizer, wrap="fsdp"), 3):
        assert counts == [calls] * 3


# --- saving -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True], ids=["divided", "whole"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "BNP", "BNP @ RMS", "soap", "auto"])
def test_resuming_from_a_distributed_checkpoint(ranks, optimizer, whole, tmp_path):
    for first, twin in ranks.run(sharded.saved_and_resumed, Setting(optimizer, wrap="fsdp"), str(tmp_path / "saved"), whole):
        check_equal(first, twin, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "BNP @ RMS", "shampoo"])
def test_resuming_from_each_rank_s_own_state_dict(ranks, optimizer):
    for first, twin in ranks.run(sharded.resumed_from_own_state_dict, Setting(optimizer, wrap="fsdp")):
        check_equal(first, twin, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "BNP @ RMS"])
def test_a_checkpoint_of_two_ranks_is_resumed_by_one(ranks, optimizer, tmp_path):
    """State of a parameter's shape is divided like it, so that it can be divided anew."""
    path = str(tmp_path / "saved")
    ranks.run(sharded.saved, Setting(optimizer, wrap="fsdp"), path)
    there = ranks.run(sharded.loaded_and_trained, Setting(optimizer, wrap="fsdp"), path)[0]
    alone = sharded.loaded_and_trained(Setting(optimizer), path)
    check_equal(there, alone, rtol=1e-6, atol=1e-8)


# --- layers that are divided in other ways: where rows are cut, owners step them; and what cannot be ---------------------


@pytest.mark.parametrize("name", sharded.LAYERS)
@pytest.mark.parametrize("copies", [False, True], ids=["parts", "copies"])
def test_layers_of_every_kind(ranks, name, copies):
    alone = sharded.layer(name, alone=True)
    for found in ranks.run(sharded.layer, name, False, copies):
        check_equal(found, alone, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", sharded.REFUSED)
def test_what_cannot_be_done_in_parts_is_refused(ranks, name):
    for outcome in ranks.outcomes(sharded.refused, name):
        assert isinstance(outcome, Failed) and outcome.kind == "ValueError" and sharded.REFUSED[name][1] in outcome.message


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["recipes", "options"])
def test_ranks_that_differ_are_refused_on_every_rank(ranks, name, wrap):
    for outcome in ranks.outcomes(sharded.different, name, wrap):
        assert isinstance(outcome, Failed) and outcome.kind == "RuntimeError" and sharded.DIFFERENT[name][1] in outcome.message


def test_other_parameters_are_refused_on_every_rank(ranks):
    for outcome in ranks.outcomes(sharded.different, "parameters", "fsdp"):
        assert isinstance(outcome, Failed) and outcome.kind == "RuntimeError" and "other parameters" in outcome.message


@pytest.mark.parametrize(
    ("what", "message"), [(sharded.late, "make the optimizer after such changes"), (sharded.copied, "call watch")]
)
def test_what_lost_its_ranks_is_refused(ranks, what, message):
    for outcome in ranks.outcomes(what):
        assert isinstance(outcome, Failed) and outcome.kind == "RuntimeError" and message in outcome.message


def test_a_layer_over_two_meshes_is_refused_on_every_rank(four):
    for outcome in four.outcomes(sharded.other_meshes):
        assert isinstance(outcome, Failed) and outcome.kind == "ValueError" and "which different ranks hold" in outcome.message


def test_a_state_dict_of_another_recipe_is_refused_on_every_rank(ranks):
    for outcome in ranks.outcomes(sharded.of_another_recipe):
        assert isinstance(outcome, Failed) and outcome.kind == "ValueError" and "saved by another recipe" in outcome.message


@pytest.mark.parametrize("recipe", ["soap", "adamw", "auto"])
def test_a_state_dict_of_another_mesh(ranks, recipe):
    assert all(ranks.run(sharded.of_another_mesh, recipe))


@pytest.mark.parametrize("name", sharded.FIXED)
def test_a_map_of_a_whole_block(ranks, name):
    alone = sharded.fixed(name, alone=True)
    for found in ranks.run(sharded.fixed, name):
        check_equal(found, alone, rtol=1e-5, atol=1e-6)  # float32


def test_fsdp1_is_refused_where_inputs_are_observed():
    """Its constructor wants an accelerator; what is known of it is its class."""
    model = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(model)
    model._fsdp_wrapped_module = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"FSDP1 .*fully_shard \(FSDP2\)"):
        survey([("", model)])


def test_fsdp1_is_refused_where_matrices_are_asked_for():
    model = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(model)
    model._fsdp_wrapped_module = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"FSDP1 .*fully_shard \(FSDP2\)"):
        check_shared("muon", [model], Muon())


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_bad_row_on_one_rank_is_skipped_on_all(ranks, nonfinite):
    for one in ranks.run(sharded.bad_row, nonfinite):
        assert one == {"raised": nonfinite == "raise", "unchanged": True}


def test_bfloat16_with_kept_rounding(ranks):
    alone = sharded.kahan(alone=True)
    for found in ranks.run(sharded.kahan):
        check_equal(found, alone, rtol=2e-2, atol=2e-3)
        assert found["state"]["weight residual"].abs().max() > 0
