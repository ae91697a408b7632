"""Layers that are put in the place of others after the optimizer was made."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import precond
from precond.optim.recipes import RECIPES


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2)))


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(32, 4)).square().mean().backward()
    optimizer.step()


def names(optimizer):
    return {name: p for g in optimizer.param_groups for name, p in zip(g["param_names"], g["params"], strict=True)}


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_layer_of_the_same_shape_is_stepped(recipe, before):
    """With the state of the one before, as for parameters that are replaced."""
    model = net()
    optimizer = RECIPES[recipe](model, lr=0.1)
    for _ in range(before):
        step(model, optimizer)
    model[2][0] = nn.Linear(8, 6)
    start = model[2][0].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            step(model, optimizer)
    assert not torch.equal(model[2][0].weight, start)
    assert names(optimizer) == dict(model.named_parameters())
    assert set(optimizer.state) <= set(model.parameters())
    assert {int(s["step"]) for s in optimizer.state.values()} == {before + 2}


def test_a_part_of_the_same_shapes_is_stepped_as_if_its_values_had_been_written():
    def train(write):
        model = net()
        optimizer = precond.auto(model, lr=0.1)
        torch.manual_seed(1)
        step(model, optimizer)
        torch.manual_seed(2)
        part = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2))
        if write:
            model[2].load_state_dict(part.state_dict())
        else:
            model[2] = part
        for _ in range(2):
            step(model, optimizer)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(train(True), train(False))


OTHERS = [nn.Linear(8, 6, bias=False), nn.Sequential(nn.Linear(8, 6)), nn.AdaptiveAvgPool1d(6)]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("new", OTHERS, ids=lambda m: type(m).__name__)
def test_another_layer_gets_one_warning(recipe, new):
    model = net()
    optimizer = RECIPES[recipe](model, lr=0.1)
    step(model, optimizer)
    model[2][0] = new
    with pytest.warns(UserWarning, match=r"'2.0.bias' of the model (is|are) no longer the parameter") as told:
        step(model, optimizer)
    assert len(told) == 1 and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)
    assert torch.equal(model[2][1].weight, names(optimizer)["2.1.weight"])


def _tie(model):
    model[2].weight = model[0].weight


def _tie_to_a_new_one(model):
    model[0].weight = model[2].weight = nn.Parameter(model[0].weight.detach().clone())


def _remove(model):
    del model[2]  # the layer behind it has its name now


@pytest.mark.parametrize(
    ("change", "gone"),
    [(_tie, ["2.weight"]), (_tie_to_a_new_one, ["2.weight"]), (_remove, ["2.weight", "2.bias"])],
    ids=["tied", "tied to a new one", "removed"],
)
@pytest.mark.parametrize("recipe", ["adamw", "soap", "whitening", "auto"])
def test_what_is_stepped_already_takes_no_other_place(recipe, change, gone):
    """It is stepped once, with its own state, and by all engines alike."""
    ends = []
    for engine in ("auto", "loop"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 6)).double()
        optimizer = RECIPES[recipe](model, lr=0.01, engine=engine)
        for k in range(4):
            if k == 2:
                change(model)
            with warnings.catch_warnings(record=True) as told:
                optimizer.zero_grad()
                model(torch.randn(8, 6, dtype=torch.float64)).square().mean().backward()
                optimizer.step()
            assert len(told) == (k == 2) and all(repr(gone[0]) in str(w.message) for w in told)
        held = [p for g in optimizer.param_groups for p in g["params"]]
        assert len(set(held)) == len(held) == 6 and set(model.parameters()) < set(held)
        assert all(optimizer.state[names(optimizer)[name]]["step"] <= 2 for name in gone)
        # Of auto a bias whose weight has gone, or is another layer's too, is stepped by other statistics, and begins anew.
        assert all(optimizer.state[p]["step"] == 4 for p in model.parameters() if recipe != "auto" or p.ndim == 2)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.__setitem__(0, nn.Sequential(m[0])),
        lambda m: m.__setitem__(2, nn.Sequential(m[2], nn.Identity())),
        lambda m: m.append(nn.Identity()),
        lambda m: m.__setitem__(1, nn.Tanh()),
    ],
    ids=["wrapped", "a part wrapped", "appended", "an activation"],
)
def test_layers_that_moved_within_the_model_are_stepped_on(change):
    model = net()
    optimizer = precond.auto(model, lr=0.1)
    step(model, optimizer)
    change(model)
    start = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
    assert {int(s["step"]) for s in optimizer.state.values()} == {2}
