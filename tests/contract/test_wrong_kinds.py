"""Arguments and later values of another kind: the error names the argument and its value, and nothing has changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import precond
from contract.table import flat, snapshot


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))


def stepped(recipe=precond.adamw, **options):
    model = net()
    optimizer = recipe(model, **options)
    model(torch.ones(3, 4)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def probed(scale):
    model = net()
    optimizer = precond.sgd(model, lr=0.1, regularizers=[precond.SAM(0.05)])
    model(torch.ones(3, 4)).sum().backward()
    return optimizer.probe(scale)


data = [(torch.ones(3, 4), torch.ones(3, 2))]
CASES = {
    "a group's key": (lambda: precond.adamw([{"param": net()}]), TypeError, r"must have 'params'.*this one has 'param'"),
    "an empty group": (lambda: precond.adamw([{}]), TypeError, "this one has nothing"),
    "no params": (lambda: precond.auto(None), TypeError, "params must be a module, or an iterable.*got None"),
    "a class": (lambda: precond.auto(nn.Linear), TypeError, r"params must be.*got the class Linear; write Linear\(\)"),
    "a group of nothing": (lambda: precond.adamw([{"params": None}]), TypeError, "params must be.*got None"),
    "a state dict, None": (lambda: stepped()[1].load_state_dict(None), TypeError, "state_dict must be a dict.*got None"),
    "a state dict, a path": (lambda: stepped()[1].load_state_dict("x"), TypeError, "got 'x' of type str; read a file by torch.load"),
    "groups, None": (
        lambda: stepped()[1].load_state_dict({"state": {}, "param_groups": None}), ValueError, "is the file truncated"
    ),
    "groups, ints": (lambda: stepped()[1].load_state_dict({"state": {}, "param_groups": [3]}), ValueError, "truncated"),
    "groups without params": (
        lambda: stepped()[1].load_state_dict({"state": {}, "param_groups": [{}]}), ValueError, "dicts with 'params'"
    ),
    "state, None": (lambda: stepped()[1].load_state_dict({"state": None, "param_groups": []}), ValueError, "is the file truncated"),
    "decay_groups without names": (
        lambda: precond.decay_groups(net().parameters(), 0.1), TypeError, "decay_groups: model must be.*pass the model"
    ),
    "decay_groups, a string": (lambda: precond.decay_groups(net(), "x"), TypeError, "decay_groups: weight_decay must be a number, got 'x'"),
    "decay_groups, negative": (lambda: precond.decay_groups(net(), -1), ValueError, "weight_decay must be a finite number >= 0, got -1"),
    "role_groups without names": (lambda: precond.role_groups(net().parameters(), 0.1), TypeError, "role_groups: model must be"),
    "role_groups, a string": (lambda: precond.role_groups(net(), "x"), TypeError, "role_groups: lr must be a number, got 'x'"),
    "probe, a closure": (lambda: probed(lambda: 1), TypeError, "grad_scale must be a number.*probe takes no closure: give it to step"),
    "probe, a string": (lambda: probed("x"), TypeError, "grad_scale must be a number, got 'x'"),
    "probe, negative": (lambda: probed(-1), ValueError, "grad_scale must be a positive number, got -1"),
    "probe, zero": (lambda: probed(0), ValueError, "grad_scale must be a positive number, got 0"),
    "probe, two": (lambda: probed(torch.ones(2)), ValueError, "grad_scale must hold one number"),
    "probe, unasked": (lambda: stepped()[1].probe("x"), TypeError, "grad_scale must be a number"),
    "step, a loss": (
        lambda: stepped()[1].step(torch.ones(())), TypeError, r"closure must be a function.*loss.backward\(\) and then step\(\)"
    ),
    "step, a number": (lambda: stepped()[1].step(3), TypeError, "closure must be a function without arguments, got 3"),
    "LossClosure": (lambda: precond.LossClosure(3), TypeError, "LossClosure: f must be a function without arguments, got 3"),
    "diagnose without a loss": (
        lambda: precond.diagnose(net(), data=data), TypeError, "Sequential does not take a batch of data, 2 parts.*give loss_fn="
    ),
    "diagnose, an optimizer's name": (
        lambda: precond.diagnose(net(), "adam", data=data, loss_fn=F.mse_loss), TypeError, "optimizer must be.*got 'adam'"
    ),
    "diagnose, an optimizer's class": (
        lambda: precond.diagnose(net(), torch.optim.Adam, data=data, loss_fn=F.mse_loss), TypeError, "got the class Adam"
    ),
    "diagnose, a loss's name": (
        lambda: precond.diagnose(net(), data=data, loss_fn="mse"), TypeError, "loss_fn must be a function.*got 'mse'"
    ),
    "diagnose, no data": (lambda: precond.diagnose(net(), data=3, loss_fn=F.mse_loss), TypeError, "data must be a loader.*got 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_argument(case):
    act, error, words = CASES[case]
    with pytest.raises(error, match=words):
        act()


MOMENTUM = {"lr": 0.1, "momentum": 0.9}
LATER = [
    (precond.adamw, {}, "lr", "a", TypeError), (precond.adamw, {}, "lr", None, TypeError),
    (precond.adamw, {}, "lr", float("nan"), ValueError), (precond.adamw, {}, "lr", torch.ones(2), ValueError),
    (precond.adamw, {}, "weight_decay", -5, ValueError), (precond.adamw, {}, "weight_decay", "a", TypeError),
    (precond.adamw, {}, "betas", 0.9, TypeError), (precond.adamw, {}, "betas", (0.9,), ValueError),
    (precond.adamw, {}, "betas", (0.9, 2.0), ValueError), (precond.adamw, {}, "eps", None, TypeError),
    (precond.adamw, {}, "maximize", "no", TypeError), (precond.adamw, {}, "amsgrad", "x", TypeError),
    (precond.sgd, MOMENTUM, "momentum", 2.0, ValueError), (precond.sgd, MOMENTUM, "dampening", "a", TypeError),
    (precond.auto, {}, "momentum", "a", TypeError), (precond.auto, {}, "weight_decay", -5, ValueError),
    (precond.auto, {}, "whitening.decay", 2.0, ValueError), (precond.soap, {}, "betas", None, TypeError),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "options", "key", "value", "error"), LATER)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_later_value_of_a_group(recipe, options, key, value, error, loaded):
    model, optimizer = stepped(recipe, **options)
    before, states, group = flat(model), snapshot(optimizer), optimizer.param_groups[0]
    good = group[key]
    shown = (
        r"a tensor|must hold one" if isinstance(value, torch.Tensor) else repr(value).replace("(", r"\(").replace(")", r"\)")
    )
    with pytest.raises(error, match=f"{recipe.__name__}: '?{key}'? of parameter group 0.*({shown})"):
        if loaded:
            saved = optimizer.state_dict()
            saved["param_groups"][0][key] = value
            optimizer.load_state_dict(saved)
        else:
            group[key] = value
            optimizer.step()
    assert torch.equal(flat(model), before)
    assert all(torch.equal(a, b) for a, b in zip(states, snapshot(optimizer), strict=True))
    group[key] = good
    optimizer.step()
    assert not torch.equal(flat(model), before)


def test_a_key_that_was_deleted():
    _, optimizer = stepped()
    del optimizer.param_groups[0]["betas"]
    with pytest.raises(ValueError, match="adamw: parameter group 0 lacks 'betas'; put it back"):
        optimizer.step()


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("recipe", [precond.sgd, precond.adamw, precond.muon, precond.auto])
def test_data_of_another_shape(recipe, engine):
    model, optimizer = stepped(recipe, lr=0.1, engine=engine)
    optimizer.zero_grad()
    model[0].weight.data = torch.ones(8, 5)
    model(torch.ones(3, 5)).sum().backward()
    states = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"'0.weight' has the shape \(8, 5\), and had \(8, 4\) when the optimizer was made"
        ):
            optimizer.step()
    assert torch.equal(model[0].weight, torch.ones(8, 5))
    assert all(torch.equal(a, b) for a, b in zip(states, snapshot(optimizer), strict=True))
