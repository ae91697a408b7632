"""Options and keys that do not exist: told with what was meant; and warnings, which name the user's line."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from torch import nn

import precond
from precond import L2, RMS, AdaGrad, PreconditionedGD, Route
from precond.optim import torch_classes
from precond.optim.recipes import RECIPES


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


CLASSES = {name: getattr(torch_classes, name) for name in torch_classes.__all__ if name != "Recipe"}


@pytest.mark.parametrize("name", [*RECIPES, *CLASSES])
@pytest.mark.parametrize(("option", "meant"), [("regularizer", "regularizers"), ("nonfinit", "nonfinite"), ("zeta", None)])
def test_an_unknown_option(name, option, meant):
    make = {**RECIPES, **CLASSES}[name]
    recipe = name.lower()
    with pytest.raises(TypeError) as told:
        make(net(), **{option: 1})
    text = str(told.value)
    assert text.startswith(f"{recipe} has no option {option!r}") and (f"did you mean {meant!r}?" in text) == bool(meant)
    own = set(inspect.signature(make).parameters) - {"params", "self", "options"}
    assert own | {"max_norm", "average"} <= set(text.partition("options are ")[2].split(", "))


def test_options_of_another_recipe():
    for option in ("betas", "eps"):
        with pytest.raises(
            TypeError, match=f"auto has no option {option!r}; its options are lr, weight_decay, momentum, choice"
        ):
            precond.auto(net(), **{option: 1})


@pytest.mark.parametrize(
    ("key", "meant"),
    [("weight_dacay", "weight_decay"), ("learning_rate", "lr"), ("LR", "lr"), ("beta", "betas"), ("maximise", "maximize")],
)
def test_a_misspelt_key_of_a_group(key, meant):
    model = net()
    with pytest.warns(UserWarning, match=f"{key!r}, which is none of its options and does nothing; did you mean {meant!r}"):
        optimizer = precond.adamw([{"params": model[0], key: 1.0}])
    with pytest.warns(UserWarning, match=f"did you mean {meant!r}"):
        optimizer.add_param_group({"params": model[2], key: 1.0})


@pytest.mark.parametrize("recipe", RECIPES)
def test_keys_of_a_users_own_are_let_be(recipe):
    own = {
        "initial_lr": 1.0,
        "name": "a",
        "lr_scale": 0.5,
        "max_momentum": 0.9,
        "base_momentum": 0.8,
        "layer": 3,
        "group_name": "b",
        7: 8,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RECIPES[recipe]([{"params": net(), **own}], lr=0.1)
        if recipe not in ("adam", "bnp", "whitening", "auto"):
            RECIPES[recipe](torch.optim.AdamW([nn.Parameter(torch.ones(2, 2))]).param_groups)


def test_patterns_that_fit_no_name():
    model = net()
    with pytest.warns(UserWarning, match=r"pattern '7\.\*' fits no.*the parameters are 0.weight, 0.bias, 2.weight, 2.bias"):
        PreconditionedGD(model, preconditioner=Route([("7.*", AdaGrad())], otherwise=RMS()))
    with pytest.warns(UserWarning, match="'0.wieght' fits no parameter's name; did you mean '0.weight'"):
        precond.adamw(model, regularizers=[L2(0.1, where="0.wieght")])
    with pytest.warns(UserWarning, match=r"'head\.\*' fits no"):
        precond.muon(model, where="head.*")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rules = [("2.*", AdaGrad()), (lambda leaf: False, AdaGrad())]  # a predicate may hold for nothing
        PreconditionedGD(model, preconditioner=Route(rules, otherwise=RMS()), regularizers=[L2(0.1, where="*.bias")])


class Silent(nn.Module):
    """A layer whose inputs no one observes: it is called by a function."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return nn.functional.linear(self.a(x), self.b.weight, self.b.bias)


WARNINGS = {
    "frozen": lambda: precond.auto(net().requires_grad_(False)),
    "no layer known": lambda: precond.auto(nn.LayerNorm(3)),
    "twice": lambda: precond.adamw([p := nn.Parameter(torch.ones(2)), p]),
    "a class": lambda: precond.optim.Auto(nn.LayerNorm(3)),
    "a key": lambda: precond.adamw([{"params": net(), "weight_dacay": 1}]),
    "parameters alone": lambda: _probe(),
    "not called": lambda: _step(),
    "by name": lambda: precond.adamw(nn.Linear(2, 2)).load_state_dict(precond.adamw(net()).state_dict()),
}


def _probe():
    model = net()
    optimizer = precond.sgd(model.parameters(), regularizers=[precond.SAM(0.1)])
    model(torch.ones(2, 4)).sum().backward()
    optimizer.probe()


def _step():
    model = Silent()
    optimizer = precond.auto(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0)  # which wraps step
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("case", WARNINGS)
def test_warnings_name_the_line_of_the_user(case):
    with pytest.warns(UserWarning) as told:
        WARNINGS[case]()
    assert {warning.filename for warning in told} == {__file__}
