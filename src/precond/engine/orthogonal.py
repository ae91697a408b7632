"""Muon's step in place: Newton–Schulz in Gram form, in scratch memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from precond.engine.cells import Cell
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
        torch._foreach_add_(state["step"], 1)
        W, m = as_matrix(p[0]), as_matrix(self._average(cell, g[0], maximize))
        X, norm = self._unit(m)
        narrow = W.dtype == torch.float32 and self.P.arithmetic == "bfloat16"
        dtype = torch.bfloat16 if narrow else W.dtype
        # X lies at the start of the workspace: in the same dtype this is its own memory.
        held, *rest = WORKSPACE.take(dtype, W.shape, W.shape, *[(min(W.shape),) * 2] * 5)
        held.copy_(X)
        end, gram = Iteration(self.P.coefficients, int(self.P.steps))(held, lambda *shapes: rest)
        state["gram"].copy_(gram)
        state["norm"].copy_(norm)
        if self.decay:
            W.mul_(1 - lr * self.decay)
        W.add_(X.copy_(end), alpha=-lr * self.P.factor(*W.shape))

    def _average(self, cell: Cell, g: Tensor, maximize: bool) -> Tensor:
        """What is orthogonalized, in scratch."""
        (a,) = WORKSPACE.take(g.dtype, g.shape)
        if maximize:
            g = torch.neg(g, out=a)
        if self.momentum is None:
            return a.copy_(g)
        beta, rest = self.momentum.beta, 1 - self.momentum.dampening
        self.momentum.fold(cell.average, (g,))
        (m,) = cell.average["m"]
        if self.momentum.kind == "nesterov":
            return torch.mul(g, rest, out=a).add_(m, alpha=beta)
        return a.copy_(m)  # a correction of its bias does not change its direction

    def _unit(self, m: Tensor) -> tuple[Tensor, Tensor]:
        """(m / max(‖m‖, ε) in the memory of m, ‖m‖)."""
        norm = m.norm()
        if norm.isfinite() and norm > 1e-12:
            return m.div_(norm.clamp_min(self.P.eps)), norm
        X, norm = normalized(m, self.P.eps)
        return m.copy_(X), norm


def muon(cell: Cell, P: Muon, momentum: Momentum | None, decay: float) -> Orthogonal | None:
    """The kernel of a contiguous matrix, or None."""
    (p,) = cell.block.tensors
    average = momentum is None or (momentum.of == "cotangent" and "clean" not in cell.average and "m" in cell.average)
    if P.root != "newton-schulz" or not p.is_contiguous() or not average:
        return None
    return Orthogonal(P, momentum, decay)
