"""Muon's step in place: Newton–Schulz in Gram form, in scratch memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from precond.engine.cells import Cell
from precond.engine.precision import in_16_bits
from precond.engine.workspace import WORKSPACE
from precond.momentum import Momentum
from precond.preconditioners import Muon
from precond.preconditioners.kronecker import as_matrix
from precond.preconditioners.muon import normalized
from precond.preconditioners.newton_schulz import Iteration
from precond.vec import Scalar, Tensors


@dataclass(frozen=True)
class Orthogonal:
    """W ← (1 − αλ)W − αγ·NS(m)."""

    P: Muon
    momentum: Momentum | None
    decay: float

    def __call__(self, cell: Cell, p: Tensors, g: Tensors, lr: Scalar, maximize: bool) -> None:
        state, lr = cell.state, float(lr)
        W, m = as_matrix(p[0]), as_matrix(self._average(cell, g[0], maximize))
        norm, scale = self._norm(m)
        narrow = self.P.arithmetic == "bfloat16" and in_16_bits(W)
        # m lies at the start of the workspace: in the same dtype X is m itself.
        X, *rest = WORKSPACE.take(torch.bfloat16 if narrow else W.dtype, W.shape, W.shape, *[(min(W.shape),) * 2] * 6)
        end, gram = Iteration(self.P.coefficients, int(self.P.steps))(X.copy_(m), lambda *shapes: rest, scale)
        state["gram"].copy_(gram)
        state["norm"].copy_(norm)
        if self.decay:
            W.mul_(1 - lr * self.decay)
        W.add_(m.copy_(end), alpha=-lr * self.P.factor(*W.shape))

    def _average(self, cell: Cell, g: Tensor, maximize: bool) -> Tensor:
        """What is orthogonalized, in scratch."""
        (a,) = WORKSPACE.take(g.dtype, g.shape)
        if maximize:
            g = torch.neg(g, out=a)
        if self.momentum is None:
            return a.copy_(g)
        self.momentum.fold(cell.average, (g,))
        return self.momentum.write(cell.average, (g,), (a,))[0]

    def _norm(self, m: Tensor) -> tuple[Tensor, float]:
        """(‖m‖, what m is to be multiplied by so that its norm is one); where squares leave the range, m is divided in place."""
        norm = m.norm()
        if 1e-12 < (size := norm.item()) < 1e12:
            return norm, 1 / max(size, self.P.eps)
        X, norm = normalized(m, self.P.eps)
        m.copy_(X)
        return norm, 1.0


def muon(cell: Cell, P: Muon, momentum: Momentum | None, decay: float) -> Orthogonal | None:
    """The kernel of a contiguous matrix, or None."""
    (p,) = cell.block.tensors
    average = momentum is None or (momentum.of == "cotangent" and "clean" not in cell.average and "m" in cell.average)
    if P.root != "newton-schulz" or not p.is_contiguous() or not average:
        return None
    return Orthogonal(P, momentum, decay)
