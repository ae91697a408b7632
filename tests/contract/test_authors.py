"""Slips of who writes a preconditioner or a regularizer: each is an error that says what to return, none is silence."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import precond
from precond import RMS, Momentum, PreconditionedGD, Route
from precond.algebra.spaces import Cotangent, Tangent
from precond.optim.preconditioners import Preconditioner


@dataclass(frozen=True)
class Rows(precond.Preconditioner):
    """A number for each row."""

    decay: float = 0.9

    def init(self, block):
        return {"r": tuple(torch.zeros(p.shape[:1]) for p in block.params)}

    def observe(self, state, seen):
        for r, g in zip(state["r"], seen.gradient, strict=True):
            r.lerp_(g.square().flatten(1).mean(1) if g.ndim > 1 else g.square(), 1 - self.decay)

    def map(self, state):
        pairs = zip(state["r"], state.block.params, strict=True)
        return precond.InverseRoot(tuple((r.sqrt() + 1).view(-1, *[1] * (p.ndim - 1)).expand_as(p) for r, p in pairs))


@dataclass(frozen=True)
class Penalty(precond.Regularizer):
    lam: float = 0.1
    space: str = "z"

    def term(self, at):
        return at.space.raised(at.p)


def own(base, **methods):
    """A class with other methods."""
    return dataclass(frozen=True)(type("Mine", (base,), methods))


def rebinding(self, state, seen):
    state["r"] = tuple(r + 1 for r in state["r"])


def late(self, state, seen):
    state["seen"] = seen.gradient[0]


def probing(returned):
    return own(Penalty, probes=True, scalars=("lam",), probe=lambda self, at: returned(at))


@dataclass
class Changeable(precond.Preconditioner):
    decay: float = 0.9

    init, observe, map = Rows.init, Rows.observe, Rows.map


@dataclass(frozen=True)
class Spaceless(precond.Regularizer):
    lam: float = 0.1

    def term(self, at):
        return Cotangent(at.p)


P, R = Rows, Penalty
AT_ONCE = {
    "partition: leaves": (
        lambda: own(P, partition=lambda self, x: [(leaf,) for leaf in x])(),
        r"partition returned .* Part\(index",
    ),
    "partition: one left out": (lambda: own(P, partition=lambda self, x: P.partition(self, x)[1:])(), "each once"),
    "partition: one twice": (lambda: own(P, partition=lambda self, x: 2 * P.partition(self, x))(), "each once"),
    "partition: nothing": (lambda: own(P, partition=lambda self, x: None)(), "partition returned None"),
    "init: list": (lambda: own(P, init=lambda self, b: {"r": [torch.zeros(2)]})(), "'r' is list.*return a dict"),
    "init: float": (lambda: own(P, init=lambda self, b: {"r": 0.0})(), "'r' is float 0.0.*return a dict"),
    "init: None inside": (lambda: own(P, init=lambda self, b: {"r": None})(), "'r' is NoneType.*return a dict"),
    "init: numbers": (lambda: own(P, init=lambda self, b: {"r": (0.0,)})(), "'r' is a tuple with"),
    "init: nothing": (lambda: own(P, init=lambda self, b: None)(), "init returned NoneType; return a dict"),
    "init: too many": (lambda: own(P, init=lambda self, b: {"r": (torch.zeros(2),) * 3})(), "3 tensors, the block 1"),
    "init: device": (lambda: own(P, init=lambda self, b: {"r": torch.zeros(2, device="meta")})(), "device=p.device"),
    "init: dtype": (
        lambda: own(P, init=lambda self, b: {"r": torch.zeros(2, dtype=torch.bfloat16)})(),
        r"Mine.init: 'r' is torch.bfloat16, gradients of '.*' come in torch.float32; make it of block.zeros\(\)",
    ),
    "init: step": (lambda: own(P, init=lambda self, b: {"step": torch.zeros(())})(), "another name"),
    "no methods": (lambda: own(Preconditioner)(), r"lacks init\(self, block\).*map\(self, state\), which returns P"),
    "a class": (lambda: Rows, r"pass an object of it, Rows\(...\)"),
    "not frozen": (Changeable, r"write @dataclass\(frozen=True\)"),
    "not frozen, within": (lambda: RMS() @ Changeable(), r"Changeable may change.*frozen=True"),
    "not frozen, routed": (lambda: Route([("*", Changeable())]), r"Changeable may change.*frozen=True"),
}
AT_A_STEP = {
    "observe: rebinds": (lambda: own(P, observe=rebinding)(), r"state\['r'\] = .*copy_\(new\)"),
    "observe: a new key": (lambda: own(P, observe=late)(), r"make all tensors in init"),
    "observe: returns": (lambda: own(P, observe=lambda self, state, seen: {"r": 1})(), "in place.*returns nothing"),
    "refresh: rebinds": (lambda: own(P, refresh=lambda self, s: s.update(r=s["r"]))(), r"state\['r'\] = "),
    "refresh: returns": (lambda: own(P, refresh=lambda self, s: s["r"])(), "refresh returned tuple; return nothing"),
    "map: nothing": (lambda: own(P, map=lambda self, s: None)(), "map returned NoneType; return a LinearMap"),
    "map: tensors": (lambda: own(P, map=lambda self, s: s["r"])(), "map returned tuple; return a LinearMap"),
    "map: shape": (lambda: own(P, map=lambda self, s: precond.InverseRoot((torch.ones(7),)))(), r"\(7,\).*\(2, 3\)"),
    "rebinds, composed": (lambda: own(P, observe=rebinding)() @ RMS(), r"state\['r'\] = "),
    "map, routed": (lambda: Route([("*", own(P, map=lambda self, s: None)())]), "return a LinearMap"),
}
TERMS = {
    "term: tuple": (lambda: own(R, term=lambda self, at: at.p)(), r"term returned tuple; return at.space.raised\(v\)"),
    "term: nothing": (lambda: own(R, term=lambda self, at: None)(), r"term returned NoneType; return at.space.raised\(v\)"),
    "term: shapes": (lambda: own(R, term=lambda self, at: Tangent(at.p[:1]))(), "one tensor for each"),
    "probe: a tangent": (lambda: probing(lambda at: Tangent(at.p))(), r"return a tuple of Tangents, \(Tangent\(d\),\)"),
    "probe: tensors": (lambda: probing(lambda at: (at.p,))(), "return a tuple of Tangents"),
}
CHOICES = {
    "a penalty's class": ({"regularizers": [Penalty]}, r"pass an object of it, Penalty\(...\)"),
    "momentum's class": ({"momentum": Momentum}, r"pass an object of it, Momentum\(...\)"),
    "one penalty": ({"regularizers": Penalty()}, "put it in brackets"),
    "no list": ({"regularizers": 0.1}, r"such as \[precond.L2\(1e-4\)\]"),
    "no space": ({"regularizers": [Spaceless()]}, "Spaceless lacks 'space'; give it a field"),
    "scalars: a word": (lambda: {"regularizers": [own(Penalty, scalars="lam")()]}, r"scalars is 'lam'; .*\('lam',\)"),
    "no term": (lambda: {"regularizers": [own(precond.Regularizer)()]}, r"lacks term\(self, at\), which returns"),
}


def step(preconditioner, **options):
    model = nn.Linear(3, 2)
    optimizer = PreconditionedGD(model, lr=0.1, preconditioner=preconditioner, **options)

    def run():
        optimizer.zero_grad()
        loss = model(torch.ones(5, 3)).square().mean()
        loss.backward()
        return loss

    return lambda: [optimizer.step(run) for _ in range(2)]


@pytest.mark.parametrize("name", AT_ONCE)
def test_found_at_construction(name):
    make, words = AT_ONCE[name]
    with pytest.raises((TypeError, ValueError), match=words):
        step(make())


@pytest.mark.parametrize("name", AT_A_STEP)
def test_found_at_the_step(name):
    make, words = AT_A_STEP[name]
    run = step(make())
    with pytest.raises((TypeError, ValueError), match=words):
        run()


@pytest.mark.parametrize("name", TERMS)
def test_terms(name):
    make, words = TERMS[name]
    run = step(Rows(), regularizers=[make()])
    with pytest.raises((TypeError, ValueError), match=words):
        run()


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    options, words = CHOICES[name]
    with pytest.raises(TypeError, match=words):
        step(Rows(), **(options() if callable(options) else options))


def test_what_is_right_passes():
    step(Rows(), regularizers=[Penalty(), probing(lambda at: ())()])()
    step(RMS() @ Rows(), regularizers=[Penalty(space="p")], momentum=Momentum())()


def test_a_penalty_without_a_number_acts_where_it_says():
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    numberless = own(Penalty, scalars=(), where="first", term=lambda self, at: at.space.raised(at.space.project(at.p)))
    optimizer = precond.sgd([("first", p), ("second", q)], lr=0.5, regularizers=[numberless()])
    p.grad, q.grad = torch.zeros(2), torch.zeros(2)
    optimizer.step()
    assert p.tolist() == [0.5, 0.5] and q.tolist() == [1.0, 1.0]  # p − ½·p where it acts


def test_groups_of_a_penalty_without_a_number_say_how_to_leave_some_out():
    groups = [{"params": [nn.Parameter(torch.ones(2))]}, {"params": [nn.Parameter(torch.ones(2))], "mine.lam": 0.2}]
    with pytest.raises(ValueError, match=r"differ in nothing of Mine, not in lam.*by where="):
        precond.sgd(groups, lr=0.1, regularizers=[own(Penalty, scalars=())()])


def test_what_it_says_of_its_statistics_decides_how_a_state_without_them_goes_on():
    """Without a second moment a parameter begins anew, without what is optional it goes on; a state dict may lack that alone."""

    def trained(**says):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        optimizer = PreconditionedGD(layer, 0.1, preconditioner=own(Rows, **says)(), momentum=Momentum(0.9))
        for _ in range(3):
            layer(torch.ones(4, 3)).square().mean().backward()
            optimizer.step()
        return layer, optimizer

    for says, step in (({"second_moments": frozenset({"r"})}, 1), ({}, 4)):
        layer, optimizer = trained(**says)
        del optimizer.state[layer.weight]["r"]
        optimizer.step()
        assert optimizer.state[layer.weight]["step"] == step and optimizer.state[layer.bias]["step"] == 4
    for says in ({"optional": frozenset({"r"})}, {}):
        layer, optimizer = trained(**says)
        saved = optimizer.state_dict()
        del saved["state"][0]["r"]
        if says:
            optimizer.load_state_dict(saved)
            assert optimizer.state[layer.weight]["step"] == 3
        else:
            with pytest.raises(ValueError, match=r"lacks 'r'"):
                optimizer.load_state_dict(saved)
