"""Methods of one's own, written for one block, are taken side by side without knowing it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import precond
from contract.table import flat
from engine.test_stacks import TOLERANCE, data, model, train
from precond import BNP, L2, RMS, SAM, SOAP, Momentum, Muon, PreconditionedGD, Route
from precond.optim.blocks import Stack
from precond.optim.engine.cells import Choice
from precond.optim.engine.fused import kernel
from precond.optim.engine.loop import Rules


@dataclass(frozen=True)
class TensorRMS(precond.Preconditioner):
    """CONTRIBUTING's example: one number per tensor."""

    decay: float = 0.99
    eps: float = 1e-8

    def init(self, block):
        return {"r": tuple(z.new_zeros(()) for z in block.zeros())}

    def observe(self, state, seen):
        for r, g in zip(state["r"], seen.gradient, strict=True):
            r.lerp_(g.square().mean(), 1 - self.decay)

    def map(self, state):
        r = [r / (1 - self.decay**t) for r, t in zip(state["r"], state.steps, strict=True)]
        shapes = zip(r, state.block.tensors, strict=True)
        return precond.InverseRoot(tuple((x.sqrt() + self.eps).expand_as(p) for x, p in shapes))


@dataclass(frozen=True)
class Rows(precond.Preconditioner):
    """One number per output row, beside the length of the row itself: it asks for the parameters' values."""

    decay: float = 0.9

    def init(self, block):
        return {"r": tuple(torch.zeros(p.shape[:1], dtype=p.dtype) for p in block.params)}

    def observe(self, state, seen):
        for r, g in zip(state["r"], seen.gradient, strict=True):
            r.mul_(self.decay).add_(g.square().flatten(1).mean(1) if g.ndim > 1 else g.square(), alpha=1 - self.decay)

    def map(self, state):
        out = []
        for r, t, p in zip(state["r"], state.steps, state.block.tensors, strict=True):
            size = p.detach().square().flatten(1).mean(1) if p.ndim > 1 else torch.ones_like(r)
            x = (r / (1 - self.decay**t)).sqrt() / (size.sqrt() + 0.1) + 1e-8
            out.append(x.view(-1, *[1] * (p.ndim - 1)).expand_as(p))
        return precond.InverseRoot(tuple(out))


OWN = {
    "a number per tensor": (TensorRMS(), ()),
    "rows": (Rows(), ()),
    "rows, decayed, SAM in z": (Rows(), (L2(0.01), SAM(0.01))),
    "rows in BNP's coordinates": (BNP() @ Rows(), ()),
    "rows, then Adam's": (Rows() @ RMS(), (L2(0.01),)),
    "BNP in those of rows": (Rows() @ BNP(), (SAM(0.01),)),
    "routed": (Route([(precond.is_hidden, Rows()), ("*", RMS())]), ()),
    "rows, then Muon": (Rows() @ Muon(), ()),
}


@pytest.mark.parametrize("name", OWN)
def test_side_by_side_as_alone(name):
    P, regularizers = OWN[name]
    ends = []
    for engine in ("auto", "loop"):
        net = model()
        optimizer = PreconditionedGD(
            net, lr=3e-3, preconditioner=P, momentum=Momentum(0.9), regularizers=regularizers, engine=engine
        )
        train(net, optimizer, data(8))
        ends.append(flat(net))
    assert (ends[0] - ends[1]).norm() <= TOLERANCE * (ends[1] - flat(model())).norm()


@pytest.mark.parametrize("name", ["a number per tensor", "rows", "rows, then Adam's"])
def test_and_so_they_are(name):
    optimizer = PreconditionedGD(model(), lr=1e-3, preconditioner=OWN[name][0])
    assert max(len(cell.members) for cell in optimizer._bound.cells if isinstance(cell.block, Stack)) >= 6


def test_adams_kernel_runs_in_the_coordinates_of_any_map():
    optimizer = PreconditionedGD(model(), lr=1e-3, preconditioner=Rows() @ RMS(), momentum=Momentum(0.9))
    cells = optimizer._bound.cells
    assert all(kernel(cell, [Choice(cell.preconditioner, cell.momentum)], Rules()) for cell in cells)
    assert any(len(cell.members) > 1 for cell in cells)


@pytest.mark.parametrize("P", [SOAP(every=3), Rows() @ RMS()], ids=["SOAP", "rows, then Adam's"])
def test_members_of_a_stack_have_rates_and_signs_of_their_own(P):
    ends = []
    for engine in ("auto", "loop"):
        net = model()
        params = list(net.parameters())
        groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 1e-2, "maximize": True}]
        optimizer = PreconditionedGD(groups, lr=1e-3, preconditioner=P, momentum=Momentum(0.9), engine=engine)
        assert engine == "loop" or any({leaf.group for leaf in cell.leaves} == {0, 1} for cell in optimizer._bound.cells)
        train(net, optimizer, data(5))
        ends.append(flat(net))
    assert (ends[0] - ends[1]).norm() <= TOLERANCE * (ends[1] - flat(model())).norm()


def _root(L: torch.Tensor) -> torch.Tensor:
    lam, V = torch.linalg.eigh(L)
    lam = lam.clamp_min(0) + 1e-3 * lam.amax(-1, keepdim=True) + 1e-12
    return (V * lam.pow(-0.25)[..., None, :]) @ V.mT


class _Roots(precond.Preconditioner):
    """Roots of each matrix's factor, renewed when it is a matrix's turn; where that is asked for is up to the classes below."""

    def handles(self, block):
        return block.leaves[0].ndim == 2

    def init(self, block):
        eye = torch.eye(block.params[0].shape[0], dtype=torch.float64)
        return {"L": torch.zeros_like(eye), "root": eye}

    def map(self, state):
        return precond.Kronecker(state["root"], None, state.block.params)


@dataclass(frozen=True)
class InObserve(_Roots):
    def observe(self, state, seen):
        (g,) = seen.gradient
        state["L"].lerp_(g @ g.mT, 0.1)
        if state.block.due(state.steps[0], 5)[0]:
            state["root"].copy_(_root(state["L"]))


@dataclass(frozen=True)
class InRefresh(_Roots):
    def observe(self, state, seen):
        (g,) = seen.gradient
        state["L"].lerp_(g @ g.mT, 0.1)

    def refresh(self, state):
        if state.block.due(state.steps[0], 5)[0]:
            state["root"].copy_(_root(state["L"]))


@dataclass(frozen=True)
class OnStacks(precond.Stacked, _Roots):
    def observe(self, state, seen):
        (g,) = seen.gradient
        state["L"].lerp_(g @ g.mT, 0.1)

    def refresh(self, state, carried=()):
        for some in state.due(5):
            part = state.span(some)
            part["root"].copy_(_root(part["L"]))

    def map(self, state):
        return precond.Kronecker(state["root"], None, state.block.tensors)


def _narrow() -> torch.nn.ParameterList:
    torch.manual_seed(0)
    return torch.nn.ParameterList([torch.nn.Parameter(torch.randn(24, 4, dtype=torch.float64)) for _ in range(12)])


@pytest.mark.parametrize("P", [InObserve(), InRefresh(), OnStacks()], ids=lambda P: type(P).__name__)
def test_turns_of_its_own_are_those_of_each_block_alone(P):
    ends, renewed = [], []
    for engine in ("auto", "loop"):
        params = _narrow()
        optimizer = PreconditionedGD(params, lr=1e-2, preconditioner=P, engine=engine)
        found = []
        for t in range(1, 13):
            draw = torch.Generator().manual_seed(t)
            for p in params:
                p.grad = torch.randn(p.shape, generator=draw, dtype=p.dtype)
            before = [None if t == 1 else optimizer.state[p]["root"].clone() for p in params]
            optimizer.step()
            now = [optimizer.state[p]["root"] for p in params]
            found.append(
                [i for i, (a, b) in enumerate(zip(before, now, strict=True)) if a is not None and not torch.equal(a, b)]
            )
        ends.append(torch.cat([p.detach().flatten() for p in params]))
        renewed.append(found)
    assert renewed[0] == renewed[1]
    assert len({tuple(some) for some in renewed[0] if some}) > 1  # in turns: else the comparison says nothing
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-12)


def test_a_plain_class_that_takes_spans_is_told_what_to_ask():
    @dataclass(frozen=True)
    class Spans(_Roots):
        def observe(self, state, seen):
            state.span(slice(0, 1))

    optimizer = PreconditionedGD(_narrow()[:1], lr=0.1, preconditioner=Spans())
    optimizer.param_groups[0]["params"][0].grad = torch.ones(24, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"precond\.Stacked.*block\.due"):
        optimizer.step()
