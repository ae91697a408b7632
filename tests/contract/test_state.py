"""Resuming is as if never stopped; inf and NaN change nothing where that is asked for; loading is all or nothing."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import precond
from contract.table import EVERY, OWN, TWINS, batches, closure, flat, net, snapshot, train
from precond import RMS, SAM, PreconditionedGD
from precond.optim.recipes import RECIPES

each = pytest.mark.parametrize("name", EVERY)


def saved(optimizer, model):
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "model": model.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each
def test_resume_is_as_if_never_stopped(name, dtype):
    if dtype == torch.bfloat16 and ("SAM" in name or "gradient norm" in name):
        pytest.skip("finite differences are refused there")
    data, moment = batches(14, dtype), 5  # roots of the table's rows are renewed before and after
    whole = net(dtype)
    uninterrupted = EVERY[name](whole)
    files = []
    train(whole, uninterrupted, data, lambda t: files.append(saved(uninterrupted, whole)) if t == moment - 1 else None)
    (file,) = files
    model = net(dtype)
    model.load_state_dict(file["model"])
    optimizer = EVERY[name](model, lr=99.0)
    optimizer.load_state_dict(file["optimizer"])
    for t, batch in enumerate(data[moment:], start=moment):
        torch.manual_seed(100 + t)
        optimizer.step(closure(model, optimizer, batch))
    assert torch.equal(flat(model), flat(whole))


@pytest.mark.parametrize("policy", ["raise", "skip"])
@each
def test_inf_and_nan_change_nothing(name, policy):
    """In the gradient, in the loss, and in the second gradient where one is asked for."""
    model = net()
    optimizer = EVERY[name](model, nonfinite=policy)
    train(model, optimizer, batches(3))
    before, states = flat(model), snapshot(optimizer)
    run = closure(model, optimizer, batches(1)[0])

    def poisoned(where):
        calls = 0

        def call():
            nonlocal calls
            calls += 1
            loss = run()
            if where == "loss":
                return loss * torch.nan
            if where == "gradient" or calls == 2:
                model.head.weight.grad[0, 0] = torch.inf
            return loss

        return call

    for where in ["gradient", "loss", *(["second gradient"] if optimizer.last.gradients > 1 else [])]:
        if policy == "raise":
            with pytest.raises(FloatingPointError, match="nothing was changed"):
                optimizer.step(poisoned(where))
        else:
            optimizer.step(poisoned(where))
            assert optimizer.last.skipped
        assert torch.equal(flat(model), before), where
        assert all(torch.equal(a, b) for a, b in zip(states, snapshot(optimizer), strict=True)), where
    train(model, optimizer, batches(1))
    assert not torch.equal(flat(model), before) and flat(model).isfinite().all()


@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_nan_propagates_as_in_torch(twin):
    ends = []
    for make in (twin.ours, twin.theirs):
        model = net()
        optimizer = make(model.parameters())
        closure(model, optimizer, batches(1)[0])()
        model.conv.bias.grad[1] = torch.nan
        optimizer.step()
        ends.append(flat(model).isnan())
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", ["adamw(lr=0.005)", "composition", "plain"])
def test_deepcopy_and_pickle_go_on(name):
    model = net()
    optimizer = EVERY[name](model)
    train(model, optimizer, batches(3))
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    train(model2, optimizer2, batches(3, seed=2))
    train(model, optimizer, batches(3, seed=2))
    assert torch.equal(flat(model), flat(model2))


@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_frozen_and_thawed_in_mid_training(twin):
    ends = []
    for make in (twin.ours, twin.theirs):
        model = net()
        model.conv.weight.requires_grad_(False)
        optimizer = make(model.parameters())

        def hook(t, model=model):
            if t == 3:
                model.conv.weight.requires_grad_(True)
            if t == 6:
                model.head.bias.requires_grad_(False)
                model.head.bias.grad = None

        train(model, optimizer, batches(9), hook)
        ends.append(flat(model))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


def test_loading_by_name_follows_parameters_that_moved():
    model = net()
    optimizer = precond.adamw(model)
    train(model, optimizer, batches(3))
    other = precond.adamw(list(reversed(list(model.named_parameters()))))
    other.load_state_dict(optimizer.state_dict())
    for p in model.parameters():
        assert torch.equal(other.state[p]["exp_avg"], optimizer.state[p]["exp_avg"])
    fewer = precond.adamw([(n, p) for n, p in model.named_parameters() if "head" in n])
    with pytest.warns(UserWarning, match=r"ignored: conv\.bias"):
        fewer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_distributed_checkpoint_state_dicts(name, flatten):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = net()
    optimizer = OWN[name](model)
    train(model, optimizer, batches(2))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    fresh = OWN[name](model, lr=99.0)
    set_optimizer_state_dict(model, fresh, state, options=options)
    for p in model.parameters():
        for key, value in optimizer.state[p].items():
            assert torch.equal(fresh.state[p][key], value), key


def test_hooks_of_torch_run():
    model = net()
    optimizer = precond.adamw(model)
    seen = []
    optimizer.register_step_pre_hook(lambda *a: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *a: seen.append("post"))
    optimizer.register_state_dict_post_hook(lambda o, d: seen.append("save"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("load"))
    train(model, optimizer, batches(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", "post", "save", "load"]


def test_kahan_adds_up_what_rounding_loses():
    ends = {}
    for rounding in ("nearest", "kahan"):
        p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        optimizer = precond.sgd([p], lr=1e-4, rounding=rounding)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        ends[rounding] = p.float().mean().item()
    assert ends["nearest"] == 1.0 and abs(ends["kahan"] - 0.99) < 4e-3
    assert precond.adamw([p]).state[p]["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize("scale", [1.0, 2.0**10])
@pytest.mark.parametrize("regularizer", [None, SAM(0.02), precond.GradientNorm(1e-3, method="central")], ids=str)
def test_the_loss_scale_does_not_matter(regularizer, scale):
    ends = []
    for scaled in (False, True):
        model = net(torch.float32)
        optimizer = precond.adamw(model, lr=0.003, regularizers=[] if regularizer is None else [regularizer])
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scaled)
        for t, (x, y) in enumerate(batches(4, torch.float32)):
            torch.manual_seed(t)
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            while optimizer.probe(grad_scale=scaler.get_scale() if scaled else None):
                scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            if t == 2:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        ends.append(flat(model))
    torch.testing.assert_close(*ends, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("which", [1, 2])
def test_overflow_in_either_pass_skips_and_backs_off(which):
    model = net(torch.float32)
    optimizer = precond.adamw(model, regularizers=[SAM(0.02)])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = flat(model)
    x, y = batches(1, torch.float32)[0]
    backward = 0

    def run():
        nonlocal backward
        backward += 1
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if backward == which:
            model.conv.weight.grad[0] = torch.inf

    run()
    while optimizer.probe(grad_scale=scaler.get_scale()):
        run()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(flat(model), before) and scaler.get_scale() == 512.0 and optimizer.last.skipped
    assert all(t == 0 for e in optimizer.state.values() for k, t in e.items() if k == "step")


def test_autocast():
    model = net(torch.float32)
    optimizer = precond.adamw(model, regularizers=[SAM(0.02)])
    for x, y in batches(3, torch.float32):

        def run(x=x, y=y):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(run)
    assert flat(model).isfinite().all()


def test_odd_shapes():
    params = [nn.Parameter(torch.zeros(0)), nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.ones(1, 1))]
    optimizer = PreconditionedGD(params, lr=0.1, preconditioner=RMS(), max_norm=1.0, nonfinite="raise")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert params[1].item() < 1 and params[2].item() < 1


@pytest.mark.parametrize("theirs", RECIPES)
@pytest.mark.parametrize("ours", RECIPES)
def test_state_of_another_recipe(ours, theirs):
    """Refused, whatever the two have in common; nothing is half loaded."""

    def started(name, momentum):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        more = {"momentum": 0.9} if momentum and name in ("sgd", "rmsprop", "bnp") else {}
        optimizer = RECIPES[name](model, lr=0.1, **more)
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        return optimizer

    for momentum in (True, False):
        mine, other = started(ours, True), started(theirs, momentum).state_dict()
        before, groups = snapshot(mine), [{k: v for k, v in g.items() if k != "params"} for g in mine.param_groups]
        if ours == theirs and momentum:
            mine.load_state_dict(other)
        elif ours != theirs:
            with pytest.raises(ValueError, match=r"by another recipe|another recipe's"):
                mine.load_state_dict(other)
            assert all(torch.equal(a, b) for a, b in zip(before, snapshot(mine), strict=True))
            assert groups == [{k: v for k, v in g.items() if k != "params"} for g in mine.param_groups]


def test_a_state_that_does_not_fit_is_told_in_the_names_of_the_dict():
    def started(recipe):
        model = nn.Linear(4, 3)
        optimizer = recipe(model)
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        return optimizer

    adam = started(precond.adam)
    with pytest.raises(ValueError, match=r"has 'sum', which adam does not keep \(it keeps 'exp_avg', 'exp_avg_sq', 'step'\)"):
        adam.load_state_dict(started(precond.adagrad).state_dict())
    with pytest.raises(ValueError, match=r"lacks 'exp_avg_sq', which adam keeps \(it has 'step'\)"):
        adam.load_state_dict(started(precond.sgd).state_dict())


def test_state_of_torchs_adamw_in_soap():
    model = nn.Linear(4, 3)
    theirs = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    theirs.step()
    with pytest.raises(ValueError, match=r"the state of 'weight' lacks 'left'.*which soap keeps"):
        precond.soap(model).load_state_dict(theirs.state_dict())
