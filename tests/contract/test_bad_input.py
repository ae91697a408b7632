"""What bad input gets: one table of errors, each with the words that tell the remedy, and nothing half-changed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import precond
from contract.table import batches, closure, flat, net, snapshot, train
from precond import (
    BNP,
    L1,
    L2,
    RMS,
    SAM,
    AdaGrad,
    Dense,
    Fixed,
    GradientNorm,
    GramOnly,
    LossClosure,
    Momentum,
    Muon,
    PreconditionedGD,
    Preconditioner,
    Regularizer,
    Route,
    Schatten,
    is_matrix,
)


def p(*shape, dtype=torch.float32, grad=True):
    return nn.Parameter(torch.zeros(shape or (2,), dtype=dtype), requires_grad=grad)


def gd(preconditioner=None, *regularizers, **options):
    return PreconditionedGD([p()], preconditioner=preconditioner or RMS(), regularizers=regularizers, **options)


one = p()
CONSTRUCTION = {
    "space": (lambda: L2(0.1, space="q"), ValueError, "space must be one of 'z', 'p'"),
    "space, near": (lambda: SAM(0.1, space="zz"), ValueError, "did you mean 'z'"),
    "negative lr": (lambda: gd(lr=-1), ValueError, "lr must be a finite number >= 0, got -1"),
    "nan lr": (lambda: gd(lr=float("nan")), ValueError, "lr must be a finite number"),
    "negative lr, a tensor": (lambda: gd(lr=torch.tensor(-1.0)), ValueError, "lr must be a finite number >= 0, got -1"),
    "two lr": (lambda: gd(lr=torch.ones(2)), ValueError, "one group per rate"),
    "negative λ": (lambda: L2(-0.1), ValueError, "lam must be a finite number >= 0"),
    "negative ρ": (lambda: SAM(-0.1), ValueError, "rho must be a finite number >= 0"),
    "text λ": (lambda: L1("x"), TypeError, "lam must be a number"),
    "decay": (lambda: RMS(decay=1.0), ValueError, r"decay must lie in \[0, 1\)"),
    "beta": (lambda: Momentum(1.5), ValueError, r"beta must lie in \[0, 1\)"),
    "betas": (lambda: precond.adamw([p()], betas=(0.9, 1.0)), ValueError, r"adamw: betas\[1\] must lie in"),
    "BNP's decay": (lambda: BNP(decay=-0.1), ValueError, "decay must be a finite number >= 0"),
    "contradiction": (lambda: Momentum(0.9, "nesterov", bias_correction=True), ValueError, "leave bias_correction out"),
    "centered": (lambda: RMS(centered=True), ValueError, "needs start='zero' and bias_correction=False"),
    "nesterov": (lambda: precond.sgd([p()], nesterov=True), ValueError, "needs momentum > 0"),
    "nesterov, dampening of a group": (
        lambda: precond.sgd([{"params": [p()], "dampening": 0.3}], momentum=0.9, nesterov=True), ValueError, "needs dampening=0",
    ),
    "q": (lambda: GradientNorm(0.1, q=0.5), ValueError, "q must be >= 1"),
    "method": (lambda: GradientNorm(0.1, method="forwards"), ValueError, "did you mean 'forward'"),
    "no parameters": (lambda: precond.adamw([]), ValueError, "params is empty"),
    "no floating ones": (lambda: precond.adamw([p(dtype=torch.int8, grad=False)]), ValueError, "no floating-point parameter"),
    "twice, in groups": (lambda: precond.adamw([{"params": [one]}, {"params": [one]}]), ValueError, "two groups of params"),
    "a tensor": (lambda: precond.adamw(one), TypeError, r"pass \[tensor\]"),
    "a mapping": (lambda: precond.adamw({"w": one}), TypeError, "a group is passed in a list"),
    "groups and tensors": (lambda: precond.adamw([{"params": [one]}, p()]), TypeError, "mixes groups with other things"),
    "a module among tensors": (lambda: precond.adamw([one, nn.Linear(2, 2)]), TypeError, "pass the module itself"),
    "a sparse parameter": (lambda: precond.adamw([nn.Parameter(torch.zeros(2).to_sparse())]), TypeError, r"only dense \(strided\)"),
    "no group": (lambda: gd().add_param_group([p()]), TypeError, "expected a dict with 'params', got list"),
    "a set": (lambda: precond.adamw([{"params": {one}}]), TypeError, "pass a list"),
    "no tensors": (lambda: precond.adamw([1.0]), TypeError, "params must hold tensors, got float"),
    "complex": (lambda: precond.adamw([p(dtype=torch.complex64)]), TypeError, "view_as_complex"),
    "parameters where a model is needed": (lambda: precond.bnp([p()]), TypeError, "pass the model itself"),
    "two probes": (lambda: gd(None, SAM(0.1), GradientNorm(0.1)), ValueError, "at most one regularizer may"),
    "no root": (lambda: gd(Fixed(GramOnly(torch.eye(2))), GradientNorm(0.1, q=1)), ValueError, "states no root"),
    "no root, L1": (lambda: gd(Fixed(GramOnly(torch.eye(2))), L1(0.1)), ValueError, "use space='p'"),
    "circular": (lambda: gd(None, SAM(0.1), statistics_from="total"), ValueError, "'loss' or 'lagged', or space='p'"),
    "16-bit probes": (
        lambda: PreconditionedGD([p(dtype=torch.bfloat16)], preconditioner=RMS(), regularizers=[SAM(0.1)]),
        ValueError,
        "rounding='kahan'",
    ),
    "no preconditioner": (lambda: PreconditionedGD([p()], preconditioner=torch.eye(2)), TypeError, "preconditioner must be one"),
    "no regularizer": (lambda: gd(None, 0.1), TypeError, r"such as precond.L2\(1e-4\)"),
    "no momentum": (lambda: gd(momentum=0.9), TypeError, r"Momentum\(0.9\) is one"),
    "nonfinite": (lambda: gd(nonfinite="skp"), ValueError, "did you mean 'skip'"),
    "no kernel": (lambda: gd(AdaGrad() @ RMS(), engine="fused"), ValueError, "use engine='auto'"),
    "no root outside": (lambda: Muon() @ RMS(), ValueError, r"the outer one, Muon, states .* no root .* RMS\(\) @ Muon\("),
    "no root in a route outside": (
        lambda: BNP() @ Route([(is_matrix, Route([(is_matrix, Schatten())]) @ RMS())]),
        ValueError,
        "the outer one, Route, states M = P Pᵀ and no root",
    ),
    "not square": (lambda: Dense(torch.ones(2, 3)), ValueError, "must be square"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_construction(case):
    build, error, words = CONSTRUCTION[case]
    with pytest.raises(error, match=words):
        build()


def vector_loss(model, batch):
    return lambda: model(batch[0]).sum(1)


STEPS = {
    "no second gradient": (SAM(0.1), lambda m, o, b: closure(m, o, b)() and o.step(), RuntimeError, "pass a closure to step"),
    "probed half": (
        GradientNorm(0.1, method="central"),
        lambda m, o, b: (closure(m, o, b)(), o.probe(), m(b[0]).sum().backward(), o.step()),
        RuntimeError,
        "call probe\\(\\) until it returns False",
    ),
    "no backward": (SAM(0.1), lambda m, o, b: (o.zero_grad(), o.step(lambda: m(b[0]).sum())), RuntimeError, r"LossClosure\(f\)"),
    "nothing returned": (SAM(0.1), lambda m, o, b: o.step(lambda: None), TypeError, "returned None; it must return the loss"),
    "a vector": (L2(0.1), lambda m, o, b: o.step(vector_loss(m, b)), ValueError, r"loss.mean\(\)"),
    "a vector, LossClosure": (L2(0.1), lambda m, o, b: o.step(LossClosure(vector_loss(m, b))), ValueError, r"loss.mean\(\)"),
    "exact, standard closure": (
        GradientNorm(0.1, method="exact"), lambda m, o, b: o.step(closure(m, o, b)), TypeError, r"step\(LossClosure\(f\)\)"
    ),
    "exact, no closure": (
        GradientNorm(0.1, method="exact"), lambda m, o, b: closure(m, o, b)() and o.step(), RuntimeError, "LossClosure"
    ),
    "another shape": (
        L2(0.1),
        lambda m, o, b: o.load_state_dict(_with(o, lambda s: s["state"][0].update(exp_avg=torch.ones(3)))),
        ValueError,
        "has shape",
    ),
    "another recipe": (
        L2(0.1), lambda m, o, b: o.load_state_dict(_with(o, lambda s: s["state"][0].update(momentum_buffer=1))), ValueError,
        "saved by another recipe",
    ),
    "fewer groups": (L2(0.1), lambda m, o, b: o.load_state_dict(_with(o, lambda s: s["param_groups"].pop())), ValueError, "groups"),
    "no state dict": (L2(0.1), lambda m, o, b: o.load_state_dict({"a": 1}), ValueError, "is the file truncated"),
    "a flattened state dict": (L2(0.1), lambda m, o, b: o.load_state_dict({"state.weight.step": 1.0}), ValueError, "is flattened"),
    "a bad option": (
        L2(0.1),
        lambda m, o, b: o.load_state_dict(_with(o, lambda s: s["param_groups"][0].update(betas=(0.9, 2.0)))),
        ValueError,
        "must lie in",
    ),
    "an unknown parameter": (L2(0.1), lambda m, o, b: o.map([p()]), ValueError, "not this optimizer's"),
    "a bad group": (
        L2(0.1), lambda m, o, b: o.add_param_group({"params": [("new", p())], "betas": (0.9, 2.0)}), ValueError, "must lie in"
    ),
}  # fmt: skip


def _with(optimizer, change):
    state = optimizer.state_dict()
    change(state)
    return state


@pytest.mark.parametrize("case", STEPS)
def test_steps_and_loading(case):
    regularizer, act, error, words = STEPS[case]
    model = net(dropout=0.0)
    optimizer = precond.adamw(model, regularizers=[regularizer])
    data = batches(3)
    if case == "exact, standard closure" or not getattr(regularizer, "exact", False):
        for batch in data[:2]:
            if getattr(regularizer, "exact", False):
                optimizer.step(LossClosure(lambda b=batch: nn.functional.cross_entropy(model(b[0]), b[1])))
            else:
                train(model, optimizer, [batch])
    before, states, groups = flat(model), snapshot(optimizer), [dict(g) for g in optimizer.param_groups]
    with pytest.raises(error, match=words):
        act(model, optimizer, data[2])
    optimizer.restore()
    assert torch.equal(flat(model), before)
    assert all(torch.equal(a, b) for a, b in zip(states, snapshot(optimizer), strict=True))
    assert [g["betas"] for g in optimizer.param_groups] == [g["betas"] for g in groups]


def test_sparse_gradients():
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = precond.adamw(table)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"weight.*sparse=False"):
        optimizer.step()


def test_the_map_before_the_first_step():
    with pytest.raises(RuntimeError, match="take a step first"):
        precond.adamw([p()]).map()


def test_saving_at_a_probed_point():
    model = net()
    optimizer = precond.adamw(model, regularizers=[SAM(0.1)])
    closure(model, optimizer, batches(1)[0])()
    assert optimizer.probe() and optimizer.probing
    with pytest.raises(RuntimeError, match="finish the step or call restore"):
        optimizer.state_dict()
    optimizer.restore()


FAILS: set[str] = set()
"""Where the next step raises."""


def fail(where: str) -> None:
    if where in FAILS:
        raise ArithmeticError(where)


@dataclass(frozen=True)
class Failing(Preconditioner):
    """Of each tensor alone; that of matrices fails before it has written anything."""

    def init(self, block):
        return {"r": block.zeros()}

    def observe(self, state, seen):
        if state.block.params[0].ndim == 2:
            fail("observe")
        state["r"][0].lerp_(seen.gradient[0].square(), 0.1 / (1 - 0.9 ** float(state.steps[0])))

    def map(self, state):
        return precond.InverseRoot((state["r"][0].sqrt() + 1e-3,))


@dataclass(frozen=True)
class FailingPenalty(Regularizer):
    """Raises where its term is asked for."""

    lam: float = 0.0
    space: str = "p"
    scalars = ("lam",)

    def term(self, at):
        fail("term")
        return at.space.raised(at.p, at["lam"])


@pytest.mark.parametrize("where", ["observe", "term"])
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_a_step_that_raises_counts_for_nothing_that_has_not_moved(where, engine):
    """What a user's class raises is not the end: the steps after it are as if it had not been."""

    def train_two(fails):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
        penalty = [FailingPenalty(0.1)] if where == "term" else []
        optimizer = PreconditionedGD(model, lr=0.1, preconditioner=Failing(), regularizers=penalty, engine=engine)
        x = torch.randn(6, 3, dtype=torch.float64)
        for k in range(5):
            optimizer.zero_grad()
            model(x + k).square().mean().backward()
            if fails and k == 2:
                FAILS.add(where)
                for _ in range(2):
                    with pytest.raises(ArithmeticError):
                        optimizer.step()
                FAILS.clear()
            optimizer.step()
        return [*(p.detach() for p in model.parameters()), *(optimizer.state[p]["step"] for p in model.parameters())]

    found, expected = train_two(True), train_two(False)
    assert [t.item() for t in expected[2:]] == [5, 5]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_a_failing_step_has_moved_has_counted():
    """A root that cannot be renewed, after the move."""

    @dataclass(frozen=True)
    class Late(Failing):
        def refresh(self, state, carried=()):
            fail("refresh")

    p = nn.Parameter(torch.ones(2))
    for engine in ("auto", "loop"):
        optimizer = PreconditionedGD([p], lr=0.1, preconditioner=Late(), engine=engine)
        p.grad = torch.ones(2)
        FAILS.add("refresh")
        before = p.detach().clone()
        with pytest.raises(ArithmeticError):
            optimizer.step()
        FAILS.clear()
        assert not torch.equal(p, before)
        assert optimizer.state[p]["step"].item() == 1
