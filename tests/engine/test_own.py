"""Methods of one's own, written for one block, are taken side by side without knowing it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import precond
from contract.table import flat
from engine.test_stacks import TOLERANCE, data, model, train
from precond import BNP, L2, RMS, SAM, Momentum, Muon, PreconditionedGD, Route
from precond.optim.blocks import Stack


@dataclass(frozen=True)
class TensorRMS(precond.Preconditioner):
    """CONTRIBUTING's example: one number per tensor."""

    decay: float = 0.99
    eps: float = 1e-8

    def init(self, block):
        return {"r": tuple(torch.zeros((), dtype=p.dtype) for p in block.params)}

    def observe(self, state, seen):
        for r, g in zip(state["r"], seen.gradient, strict=True):
            r.lerp_(g.square().mean(), 1 - self.decay)

    def map(self, state):
        r = [r / (1 - self.decay**t) for r, t in zip(state["r"], state.steps, strict=True)]
        shapes = zip(r, state.block.params, strict=True)
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
        for r, t, p in zip(state["r"], state.steps, state.block.params, strict=True):
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
