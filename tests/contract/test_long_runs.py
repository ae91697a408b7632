"""Freezing, thawing, counting and cycling over a long training: resumed or not, it is the same."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import nn

import precond
from contract.table import OWN, batches, closure, flat, net
from precond import Momentum, Polar, PreconditionedGD
from precond.algebra import vec
from precond.analysis.curvature import Objective

FROZEN = {"a layer": "head", "a bias": "head.bias", "a weight": "head.weight"}
SCHEDULED = {name: OWN[name] for name in OWN if "cholesky" in name or "olar" in name or name.startswith("auto,")}
RESUMED = {5: "after freezing", 7: "while frozen", 8: "after thawing"}


def set_frozen(model, which, on):
    for name, p in model.named_parameters():
        if name.startswith(FROZEN[which]):
            p.requires_grad_(not on)


def stepped(model, optimizer, which, start, saved=None):
    """Steps up to the twelfth, something being frozen from the fifth on and thawed before the eighth; ``saved`` is called at three moments."""
    data = batches(12)
    for t in range(start, 12):
        if t in (5, 8):
            set_frozen(model, which, t == 5)
        if saved is not None and t in RESUMED:
            file = io.BytesIO()
            torch.save((model.state_dict(), optimizer.state_dict()), file)
            file.seek(0)
            saved[t] = torch.load(file, weights_only=True)
        torch.manual_seed(100 + t)
        optimizer.step(closure(model, optimizer, data[t]))
    return flat(model)


@pytest.mark.parametrize("which", FROZEN)
@pytest.mark.parametrize("name", [*precond.RECIPES, *SCHEDULED])
def test_resume_through_freezing(name, which):
    make = {**precond.RECIPES, **SCHEDULED}[name]
    model, saved = net(), {}
    never = stepped(model, make(model), which, 0, saved)
    for start, resumed in RESUMED.items():
        weights, state = saved[start]
        model, frozen = net(), start < 8
        model.load_state_dict(weights)
        set_frozen(model, which, frozen and start == 7 and which == "a weight")  # before the state is loaded, or after
        optimizer = make(model, lr=9.0)
        optimizer.load_state_dict(state)
        set_frozen(model, which, frozen)
        assert torch.equal(stepped(model, optimizer, which, start), never), resumed


@pytest.mark.parametrize("name", precond.RECIPES)
def test_steps_are_counted_beyond_2_to_the_24(name):
    model = nn.Linear(3, 2)
    optimizer = precond.RECIPES[name](model)

    def step():
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()

    step()
    state = optimizer.state_dict()
    assert all(e["step"].dtype == torch.float32 for e in state["state"].values())  # as torch.optim's
    for e in state["state"].values():
        e["step"] = torch.tensor(2.0**24 - 2)
    optimizer.load_state_dict(state)
    for _ in range(4):
        step()
    assert {int(e["step"]) for e in optimizer.state.values()} == {2**24 + 2}
    step()
    state = optimizer.state_dict()
    other = precond.RECIPES[name](model)
    other.load_state_dict(state)
    assert {int(e["step"]) for e in other.state.values()} == {2**24 + 3}
    if name == "adamw":
        theirs = torch.optim.AdamW(model.parameters())
        theirs.load_state_dict(state)
        theirs.step()
        assert theirs.state[model.weight]["step"] == 2**24 + 4


def test_a_count_that_grows_past_the_limit_while_it_runs():
    p = nn.Parameter(torch.ones(2))
    optimizer = precond.adam([p])
    optimizer.state[p]["step"].fill_(2**24 - 1)
    for _ in range(3):
        p.grad = torch.ones(2)
        optimizer.step()
    assert optimizer.state[p]["step"] == 2**24 + 2


@pytest.mark.parametrize("name", precond.RECIPES)
def test_a_parameter_that_never_has_a_gradient_is_left_as_it_is(name):
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(6, 3), "unused": nn.Linear(4, 4)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = precond.RECIPES[name](model)
    x, y = torch.randn(12, 6), torch.randint(3, (12,))
    if name != "sgd":
        with pytest.raises(RuntimeError, match="take a step first"):
            optimizer.map()
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model["used"](x), y).backward()
        optimizer.step()
    params = list(model["used"].parameters())
    whole, alone = M(optimizer.map(), list(model.parameters())), M(optimizer.map(params), params)
    assert whole.isfinite().all() and torch.equal(whole[21:, 21:], torch.eye(20)) and not whole[21:, :21].any()
    torch.testing.assert_close(whole[:21, :21], alone)
    objective = Objective(model["used"], nn.functional.cross_entropy, [(x, y)])
    torch.testing.assert_close(M(precond.preconditioner_of(optimizer, objective), params), alone)


def M(P, params):
    """P Pᵀ as a matrix; muon states no root."""
    like = tuple(p.detach() for p in params)
    size = sum(p.numel() for p in like)
    return torch.stack([vec.flatten(P.gram(vec.unflatten(e, like))) for e in torch.eye(size)])


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))


CYCLED = {
    "muon": (lambda m: precond.muon(m), ("momentum", "betas")),
    "auto": (lambda m: precond.auto(m), ("momentum",)),
    "adamw": (lambda m: precond.adamw(m), ("betas",)),
    "PreconditionedGD": (
        lambda m: PreconditionedGD(m, preconditioner=precond.RMS(), momentum=Momentum(0.9)),
        ("momentum.beta",),
    ),
    "PreconditionedGD, two averages": (
        lambda m: PreconditionedGD(m, preconditioner=Polar(momentum=Momentum(0.9, "heavy_ball")), momentum=Momentum(0.9)),
        ("momentum.beta", "momentum_2.beta"),
    ),
}


@pytest.mark.parametrize("scheduler", ["OneCycleLR", "CyclicLR"])
@pytest.mark.parametrize("name", CYCLED)
def test_schedulers_cycle_every_momentum(name, scheduler):
    make, keys = CYCLED[name]
    model = layers()
    optimizer = make(model)
    options = {
        "OneCycleLR": {"max_lr": 0.01, "total_steps": 9},
        "CyclicLR": {"base_lr": 1e-3, "max_lr": 0.01, "step_size_up": 4},
    }
    cycle = getattr(torch.optim.lr_scheduler, scheduler)(optimizer, **options[scheduler])
    seen = []
    for _ in range(8):
        model(torch.ones(5, 4)).square().mean().backward()
        optimizer.step()
        now = [optimizer.param_groups[0][key] for key in keys]
        now = [x[0] if isinstance(x, tuple) else x for x in now]
        momenta = {c.momentum.beta for c in optimizer._bound.cells}
        assert len(set(now)) == 1 and momenta == set(now)
        seen.append(now[0])
        cycle.step()
    assert max(seen) - min(seen) > 0.05


a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
MIXED = {
    "in one list": lambda: precond.adamw([("a", a), b]),
    "in groups": lambda: precond.adamw([{"params": [("a", a)]}, {"params": [b]}]),
    "added without": lambda: precond.adamw([("a", a)]).add_param_group({"params": [b]}),
    "added with": lambda: precond.adamw([a]).add_param_group({"params": [("b", b)]}),
}


@pytest.mark.parametrize("name", MIXED)
def test_names_for_all_parameters_or_none(name):
    with pytest.raises(ValueError, match="names some parameters and not others"):
        MIXED[name]()
    precond.adamw(nn.Linear(2, 2)).add_param_group({"params": [b]})  # a module's names were not asked for


def test_auto_says_that_all_is_frozen():
    with pytest.warns(UserWarning, match="all parameters are frozen"):
        precond.auto(layers().requires_grad_(False))
