"""What is given as ``params``: parameters, modules, groups, lazy modules, parameters frozen and thawed."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import precond
from inputs.layers import data
from inputs.steps import check_step, copies, stepped
from precond import BNP, RMS, PreconditionedGD, Route, adamw, decay_groups

torch.set_num_threads(1)


@pytest.mark.parametrize(
    "wrap", [lambda m: m.parameters(), lambda m: m.named_parameters(), lambda m: [{"params": m.parameters()}]]
)
@pytest.mark.parametrize(
    "make", [lambda p: BNP(), lambda p: BNP() @ RMS(), lambda p: Route([("*", BNP())])], ids=["BNP", "@", "Route"]
)
def test_parameters_instead_of_a_module_are_refused(wrap, make):
    model = nn.Linear(3, 2)
    with pytest.raises(TypeError, match="observes the inputs of layers: pass the model itself"):
        PreconditionedGD(wrap(model), preconditioner=make(None))


def test_groups_of_modules_and_of_decay_are_observed():
    """A weight and its bias stay one block also where their groups differ."""
    torch.manual_seed(0)
    x = data(6, 4)
    for groups in (decay_groups, lambda m: [{"params": m[0]}, {"params": m[1]}]):
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
        before = copies(*model[0].parameters())
        stepped(
            model,
            lambda model=model: model(x),
            groups=groups(model) if groups is not decay_groups else decay_groups(model, 0.1),
        )
        check_step(list(model[0].parameters()), x, before)


@pytest.mark.parametrize("make", [adamw, lambda m: PreconditionedGD(m, preconditioner=BNP())], ids=["adamw", "BNP"])
def test_lazy_modules_need_a_first_forward(make):
    model = nn.Sequential(nn.LazyConv1d(4, 1), nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"lazy modules .* call the model on a batch first"):
        make(model)
    model(torch.randn(2, 3, 5))
    optimizer = make(model)
    model(torch.randn(2, 3, 5)).sum().backward()
    optimizer.step()
    if make is not adamw:
        assert optimizer.state[model[2].weight]["count"].item() == 2


def test_parameters_frozen_and_thawed_in_mid_training():
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3).double(), data(6, 4)
    optimizer = PreconditionedGD(layer, lr=0.1, preconditioner=BNP(decay=0.0, damping=0.0))

    def step() -> list[Tensor]:
        before = copies(layer.weight, layer.bias)
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
        return before

    check_step([layer.weight, layer.bias], x, step())
    layer.bias.requires_grad_(False)
    before = step()
    check_step([layer.weight], x, before[:1])
    assert torch.equal(layer.bias, before[1])
    layer.bias.requires_grad_(True)
    check_step([layer.weight, layer.bias], x, step())
    layer.weight.requires_grad_(False)
    before = step()
    assert torch.equal(layer.weight, before[0])
    torch.testing.assert_close(layer.bias.detach(), before[1] - 0.1 * layer.bias.grad)


def test_a_weight_that_was_frozen_is_observed_from_its_first_step():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double(), data(6, 4)
    model[0].requires_grad_(False)
    optimizer = PreconditionedGD(model, lr=0.1, preconditioner=BNP(decay=0.0, damping=0.0))
    for thawed in (False, True):
        model[0].requires_grad_(thawed)
        before = copies(model[0].weight, model[0].bias)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    check_step([model[0].weight, model[0].bias], x, before)


def test_a_frozen_weight_is_no_reason_for_a_warning():
    layer = nn.Linear(4, 2).double()
    layer.weight.requires_grad_(False)
    optimizer = PreconditionedGD(layer, lr=0.1, preconditioner=BNP())
    layer(data(6, 4)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_block_that_a_group_adds_is_observed():
    first, second = nn.Linear(4, 4).double(), nn.Linear(4, 2).double()
    optimizer = PreconditionedGD(first, lr=0.1, preconditioner=BNP(decay=0.0, damping=0.0))
    optimizer.add_param_group({"params": second})
    x = data(6, 4)
    with torch.no_grad():
        hidden = first(x)
    before = copies(second.weight, second.bias)
    second(first(x)).square().mean().backward()
    optimizer.step()
    check_step([second.weight, second.bias], hidden, before)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("recipe", ["bnp", "whitening", "auto"])
def test_a_layer_outside_of_the_model_is_told(recipe, late):
    """Its weights are stepped, without statistics; a number beside the model, such as a temperature, is no layer."""
    first, second, temperature = nn.Linear(4, 4), nn.Linear(4, 2), nn.Parameter(torch.ones(()))
    groups = [{"params": first}, {"params": [temperature]}, {"params": second.parameters()}]
    make = precond.RECIPES[recipe]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = make(groups[:2])
        second.requires_grad_(False)
        frozen = make([*groups[:2], {"params": list(second.parameters())}])
        second.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"'param_\d' is of no module that the optimizer has") as told:
        if late:
            optimizer.add_param_group(groups[2])
        else:
            optimizer = make(groups)
    assert len(told) == 1
    assert [row.name for row in optimizer.explain().rows if "is of no module" in row.why] == ["param_3"]
    with pytest.warns(UserWarning, match=r"'param_\d' is of no module that the optimizer has"):
        second(first(torch.ones(3, 4))).sum().backward()
        frozen.step()  # which finds it thawed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            optimizer.zero_grad()
            second(first(torch.randn(3, 4))).sum().backward()
            optimizer.step()
        optimizer.add_param_group({"params": nn.Linear(2, 2)})
