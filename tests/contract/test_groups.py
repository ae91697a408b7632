"""Parameter groups: overrides, later additions, freezing; names; what is refused leaves the optimizer as it was."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from functools import partial

import pytest
import torch
from torch import nn

import precond
from contract.table import EVERY, TWINS, Twin, batches, closure, flat, net, snapshot, train
from precond import KFAC, L2, RMS, SAM, AdaGrad, Fixed, GradientNorm, PreconditionedGD, Route, is_matrix

each = pytest.mark.parametrize("name", EVERY)
by_name = pytest.mark.parametrize("twin", TWINS, ids=str)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@by_name
def test_a_group_may_override_every_option(twin: Twin):
    """Each other number, and the opposite of each switch, in the second of two groups."""
    changed = {
        "lr": 2e-3, "momentum": 0.3, "weight_decay": 0.07, "maximize": not twin.options.get("maximize", False),
        "lr_decay": 0.02, "eps": 1e-4, "alpha": 0.7, "centered": True, "betas": (0.5, 0.6), "amsgrad": not twin.options.get("amsgrad", False),
    }  # fmt: skip
    known = twin.theirs([nn.Parameter(torch.ones(1))]).param_groups[0]
    second = {k: v for k, v in changed.items() if k in known}
    ends = []
    for make in (twin.ours, twin.theirs):
        model = net()
        groups = [{"params": [model.conv.weight, model.norm.weight]}, {"params": list(model.head.parameters()), **second}]
        optimizer = make(groups)
        train(model, optimizer, batches(6))
        for key, value in second.items():
            optimizer.param_groups[1][key] = value * 1.1 if isinstance(value, float) else value
        train(model, optimizer, batches(6))
        ends.append(flat(model))
    assert relative(*ends) <= 1e-12


def test_a_tensor_option_may_change_in_place():
    ends = []
    for make in (precond.sgd, torch.optim.SGD):
        model = net()
        decay = torch.tensor(0.1, dtype=torch.float64)
        optimizer = make(model.parameters(), lr=0.1, weight_decay=decay)
        train(model, optimizer, batches(4), lambda t, decay=decay: decay.mul_(2))
        ends.append(flat(model))
    assert relative(*ends) <= 1e-12


def test_a_group_without_weight_takes_no_part():
    """SAM of the first layer alone (R9): its radius is that of the first layer's gradient."""
    weights = []
    for only in (True, False):
        model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.arange(1.0, p.numel() + 1).view(p.shape) / 10)
        rest = {"params": model[1], "sam.rho": 0.0, "lr": 0.0}
        groups = [{"params": model[0]}, rest] if only else model[0]
        optimizer = PreconditionedGD(groups, lr=0.1, preconditioner=Fixed(), regularizers=[SAM(0.5)])
        optimizer.step(precond.LossClosure(lambda m=model: m(torch.ones(1, 3).double()).square().sum()))
        weights.append(model[0].weight.detach().clone())
    assert torch.equal(*weights)


def test_names_of_groups_that_come_later():
    model = net()
    optimizer = precond.adam(model.conv)
    optimizer.add_param_group({"params": model.norm})
    optimizer.add_param_group({"params": model.head.parameters()})
    names = [n for g in optimizer.param_groups for n in g["param_names"]]
    assert names == ["weight", "bias", "1.weight", "1.bias", "param_0", "param_1"]
    train(model, optimizer, batches(2))
    fresh = precond.adam(model.conv)
    fresh.add_param_group({"params": model.norm})
    fresh.add_param_group({"params": model.head.parameters()})
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(snapshot(fresh), snapshot(optimizer), strict=True))


def _body_and_two_heads():
    """Of the groups the second has a name less than the third, whose number is that of a layer of the first."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    return nn.ModuleDict({"body": body, "norm": nn.LayerNorm(4), "head": nn.Linear(4, 4)})


def _groups_of(model, named):
    return [{"params": part.named_parameters() if named else part, "lr": 0.01 * k} for k, part in enumerate(model.values(), 1)]


@pytest.mark.parametrize("named", [False, True], ids=["modules", "named parameters"])
def test_each_parameter_has_a_name_of_its_own(named):
    """And so its own state: groups whose parameters are called alike have a prefix, which may be taken as well."""
    model = _body_and_two_heads()
    optimizer = precond.adamw(_groups_of(model, named))
    optimizer.add_param_group({"params": [("weight", nn.Parameter(torch.ones(4))), ("3.weight", nn.Parameter(torch.ones(4)))]})
    names = [n for g in optimizer.param_groups for n in g["param_names"]]
    assert len(set(names)) == len(names) == 10
    assert names[:6] == ["0.weight", "0.bias", "2.weight", "2.bias", "weight", "bias"]  # as they were always called


@pytest.mark.parametrize("alike", [False, True], ids=["as saved now", "as saved when names were alike"])
@pytest.mark.parametrize("named", [False, True], ids=["modules", "named parameters"])
def test_parameters_called_alike_load_the_state_of_each(named, alike):
    def make():
        model = _body_and_two_heads()
        return model, precond.adamw(_groups_of(model, named))

    model, optimizer = make()
    model["head"](model["norm"](model["body"](torch.randn(8, 4)))).square().mean().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    if alike:
        saved["param_groups"][2]["param_names"] = ["2.weight", "2.bias"]
    other, fresh = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.load_state_dict(saved)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert fresh.state[q]["step"] == 1 and torch.equal(optimizer.state[p]["exp_avg"], fresh.state[q]["exp_avg"])


LATER = {
    "parameters": lambda head: head.parameters(),
    "a list": lambda head: [head.weight, head.bias],
    "the module": lambda head: head,
}
MADE = {name: partial(precond.RECIPES[name], lr=0.01) for name in ("auto", "muon", "whitening", "adamw", "soap")}
MADE["KFAC"] = partial(PreconditionedGD, lr=0.01, preconditioner=KFAC())


@pytest.mark.parametrize("given", LATER.values(), ids=LATER)
@pytest.mark.parametrize("make_of", MADE.values(), ids=MADE)
def test_what_is_added_of_the_model_is_stepped_as_from_the_start(make_of, given):
    """Names and kinds are the model's, whatever way they came in: rules by name and joint blocks depend on them."""

    def make(later):
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh()).double()
        model = nn.Sequential(OrderedDict(body=model, head=nn.Linear(6, 3).double()))
        for i, p in enumerate(model.parameters()):
            nn.init.normal_(p, generator=torch.Generator().manual_seed(i))
        head = model.head
        if later:
            del model.head
        optimizer = make_of(model)
        if later:
            model.head = head
            optimizer.add_param_group({"params": given(head)})
        return model, optimizer

    ends = []
    for later in (True, False):
        model, optimizer = make(later)
        assert [n for g in optimizer.param_groups for n in g["param_names"]] == [n for n, _ in model.named_parameters()]
        for k in range(5):
            optimizer.zero_grad()
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(k)).double()
            model(x).cos().mean().backward()
            optimizer.step()
        ends.append((flat(model), [(r.name, r.kind, r.preconditioner) for r in optimizer.explain().rows]))
    assert ends[0][1] == ends[1][1]
    assert relative(ends[0][0], ends[1][0]) <= 1e-9


@pytest.mark.parametrize("given", LATER.values(), ids=LATER)
def test_state_under_the_names_of_before_is_loaded(given):
    def make():
        model = net()
        head = model.head
        del model.head
        optimizer = precond.adamw(model)
        model.head = head
        optimizer.add_param_group({"params": given(head)})
        return model, optimizer

    model, optimizer = make()
    train(model, optimizer, batches(3))
    for names in (["param_0", "param_1"], ["weight", "bias"], ["1.weight", "1.bias"]):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][1]["param_names"] = names
        _other, fresh = make()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fresh.load_state_dict(saved)
        assert all(torch.equal(a, b) for a, b in zip(snapshot(fresh), snapshot(optimizer), strict=True))


def test_a_parameter_whose_name_is_not_known_has_that_of_its_module():
    """Parameters without names beside a module leave all groups without; rules and ``explain()`` know the module's."""
    model, scale = net(), nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = precond.adamw([{"params": model}, {"params": [scale]}])
    names = [n for n, _ in model.named_parameters()]
    assert [row.name for row in optimizer.explain().rows] == [*names, f"param_{len(names)}"]


def test_a_module_may_join_parameters_without_names():
    model = net()
    optimizer = precond.adam(list(model.conv.parameters()))
    optimizer.add_param_group({"params": model.head, "lr": 0.5})
    assert "param_names" not in optimizer.param_groups[1] and len(optimizer.state) == 4


class _Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.body(self.table(x)).tanh())


@pytest.mark.parametrize("recipe", ["adamw", "muon", "whitening", "auto"])
def test_a_container_made_for_a_group_alone_may_go(recipe):
    """What is known of its layers stays known where the plan is made anew, and state is loaded."""

    def run(keep):
        torch.manual_seed(0)
        model = _Words().double()
        containers = []

        def make():
            parts = nn.ModuleList([nn.Sequential(model.table), model.body])
            containers.extend([parts] * keep)
            return precond.RECIPES[recipe]([{"params": model.head}, {"params": parts, "lr": 0.01}], lr=0.02)

        optimizer = make()
        for k in range(4):
            model.head.bias.requires_grad_(k % 2 == 0)
            optimizer.zero_grad()
            model(torch.randint(5, (16,), generator=torch.Generator().manual_seed(k))).cos().mean().backward()
            optimizer.step()
            saved = optimizer.state_dict()
            optimizer = make()
            optimizer.load_state_dict(saved)
        return flat(model), [(r.name, r.kind, r.block, r.preconditioner) for r in optimizer.explain().rows]

    (kept, rows), (gone, same) = run(keep=True), run(keep=False)
    assert rows == same and torch.equal(kept, gone)


@each
def test_state_of_frozen_parameters_waits_in_the_state_dict(name):
    model = net()
    optimizer = EVERY[name](model)
    train(model, optimizer, batches(3))
    model.head.weight.requires_grad_(False)
    before = model.head.weight.detach().clone()
    train(model, optimizer, batches(2, seed=2))
    assert torch.equal(model.head.weight, before)
    ends = []
    other = net()
    other.load_state_dict(model.state_dict())
    other.head.weight.requires_grad_(False)
    successor = EVERY[name](other)
    successor.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other, successor)):
        m.head.weight.requires_grad_(True)
        train(m, o, batches(3, seed=3))
        ends.append(flat(m))
    assert torch.equal(*ends) and not torch.equal(model.head.weight, before)


def route(rule):
    return Route([(rule, AdaGrad(), 0.5)], otherwise=RMS())


def test_a_rule_may_be_a_predicate_or_a_pattern():
    ends = []
    for rule in (is_matrix, "*e*d.weight", lambda leaf: leaf.name == "head.weight"):
        model = net()
        model.conv.requires_grad_(False)
        train(model, PreconditionedGD(model, lr=0.01, preconditioner=route(rule)), batches(3))
        ends.append(flat(model))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


REFUSED = {
    "negative lr": ({"lr": -1.0}, ValueError, "lr must be a finite number >= 0"),
    "lr of two numbers": ({"lr": torch.ones(2)}, ValueError, "one group per rate"),
    "betas": ({"betas": (0.9, 2.0)}, ValueError, "must lie in"),
    "another recipe": ({"decoupled_weight_decay": False}, ValueError, r"use precond\.adam for it"),
    "another penalty": ({"sam.adaptive": True}, ValueError, "groups may differ in rho of SAM, not in adaptive"),
    "16 bits": ({"params": [nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]}, ValueError, "rounding='kahan'"),
    "nothing": ({"params": []}, ValueError, "nothing to optimize"),
    "integers": ({"params": [nn.Parameter(torch.ones(2, dtype=torch.long), requires_grad=False)]}, ValueError, "no floating-point"),
    "complex": ({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]}, TypeError, "view_as_complex"),
}  # fmt: skip


REFUSED["twice"] = ({"params": None}, ValueError, "two groups of params|more than one")


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("late", [False, True], ids=["at once", "later"])
def test_refused_groups_change_nothing(case, late):
    model = net()
    options, error, words = REFUSED[case]
    bad = {"params": [nn.Parameter(torch.ones(2))], **options}
    bad["params"] = model.head if bad["params"] is None else bad["params"]
    recipe = {"lr": 0.01, "regularizers": [SAM(0.1)]}
    if not late:
        if case in ("nothing", "integers"):  # harmless beside others
            assert precond.adamw([{"params": model}, bad], **recipe).param_groups[1]["params"] == []
            return
        with pytest.raises(error, match=words):
            precond.adamw([{"params": model}, bad], **recipe)
        return
    optimizer = precond.adamw(model, **recipe)
    train(model, optimizer, batches(2))
    before, states = flat(model), snapshot(optimizer)
    with pytest.raises(error, match=words):
        optimizer.add_param_group(bad)
    assert len(optimizer.param_groups) == 1 and len(optimizer.state) == 6 and torch.equal(flat(model), before)
    assert all(torch.equal(a, b) for a, b in zip(states, snapshot(optimizer), strict=True))
    train(model, optimizer, batches(1))
    assert not torch.equal(flat(model), before)


def test_scalars_that_differ_and_structure_that_does_not():
    model = net()
    groups = [{"params": model.conv, "gradientnorm.lam": 0.1}, {"params": model.head, "gradientnorm.lam": 0.2, "l2.lam": 0.0}]
    options = {"preconditioner": RMS(), "regularizers": [GradientNorm(0.3), L2(0.1)]}
    optimizer = PreconditionedGD(groups, **options)
    optimizer.step(closure(model, optimizer, batches(1)[0]))
    optimizer.param_groups[1]["gradientnorm.power"] = 1
    with pytest.raises(ValueError, match="not in power"):
        optimizer.step(closure(model, optimizer, batches(1)[0]))


def test_decay_groups_leave_biases_norms_and_embeddings_out():
    model = nn.ModuleDict({"table": nn.Embedding(3, 2), "norm": nn.LayerNorm(2), "out": nn.Linear(2, 2)})
    decayed, spared = precond.adamw(precond.decay_groups(model, 0.1)).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert decayed["param_names"] == ["out.weight"] and len(spared["params"]) == 4


class Roles(nn.Module):
    def __init__(self, tie=False):
        super().__init__()
        self.table, self.body, self.norm, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 5)
        if tie:
            self.head.weight = self.table.weight


def test_role_groups_give_each_role_its_rate():
    groups = precond.role_groups(Roles(), 0.1, embedding=10.0, output=0.5, vector=2.0, weight_decay=0.3)
    found = {n: (g["lr"], g["weight_decay"]) for g in precond.adamw(groups).param_groups for n in g["param_names"]}
    rates = {"table": 1.0, "body": 0.1, "norm": 0.2, "head": 0.05}
    assert found == {n: (pytest.approx(rates[n.split(".")[0]]), 0.3) for n in found}
    assert len(found) == 7


def test_what_a_head_shares_has_the_rate_of_layers():
    groups = precond.role_groups(Roles(tie=True), 0.1, embedding=10.0).copy()
    assert {n: g["lr"] for g in groups for n, _ in g["params"]}["table.weight"] == 0.1


def test_rates_of_roles_are_checked():
    with pytest.raises(ValueError, match="embedding"):
        precond.role_groups(Roles(), 0.1, embedding=-1.0)
