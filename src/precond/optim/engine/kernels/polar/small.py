"""The step of a small layer, whose cost is that of calling operations: few, on [W b] as one matrix."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from precond.algebra.maps import parted
from precond.algebra.vec import Tensors, Vec
from precond.optim.blocks import State
from precond.optim.engine.cells import Cell
from precond.optim.engine.kernels.factors import root
from precond.optim.engine.kernels.polar.step import PolarStep
from precond.optim.preconditioners.muon import normalized


@dataclass
class SmallStep(PolarStep[Tensor, Tensor, Tensor]):
    r"""P₁ is a matrix A from the right: Z = [m_w m_b]A and d = L^(−1/2)Z Aᵀ, of a tall layer Z L^(−1/2)Aᵀ.

    A = [[σ⁻¹R, 0], [−μᵀσ⁻¹R, 1]].
    """

    _scratch: tuple[Tensor, ...] = field(default=(), init=False, repr=False)
    _flat: Tensor | None = field(default=None, init=False, repr=False)
    _views: Vec = field(default=(), init=False, repr=False)
    _A: tuple[Tensor, ...] = field(default=(), init=False, repr=False)
    _onto: tuple[Tensor, ...] = field(default=(), init=False, repr=False)

    def _make(self, outer: State, mean: Tensor, std: Tensor, beta: float | Tensor) -> Tensor:
        n = std.shape[-1]
        if not self._A:
            A = torch.eye(n + len(outer.block.tensors) - 1).to(std)
            self._A, self._onto = (A, A[:n, :n], A[n:, :n]), (A.T[:, :n], *A[n:])
        A, within, last = self._A
        if (R := root(outer, std)) is None:
            within.diagonal().copy_(std[0]).reciprocal_()
            if len(last):
                torch.div(mean, std, out=last).neg_()
            return A
        torch.div(R, std.mT, out=within)
        if len(last):
            torch.mm(mean, within, out=last).neg_()
        return A

    def _average(self, cell: Cell, g: Tensors, P1: Tensor | None) -> Tensor:
        if not self._scratch:
            self._scratch = tuple(torch.empty(self._shape, dtype=g[0].dtype) for _ in range(3))
            self._views = parted(self._scratch[0], tuple(g))
            self._flat = self._scratch[2].view(-1)
        m, Z, _ = self._scratch
        self.momentum.write(cell.average, g, self._views)
        return m if P1 is None else torch.mm(m, P1, out=Z)

    def _gram(self, P1: Tensor | None, m: Tensor) -> Tensor:
        return m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m

    def _turned(self, state: State, P1: Tensor | None, m: Tensor) -> tuple[Tensor, float]:
        """(d before Aᵀ is applied to it, its norm)."""
        Y, Q = self._scratch[2], state["root"]
        torch.mm(*((Q, m) if m.shape[0] <= m.shape[1] else (m, Q)), out=Y)
        assert self._flat is not None
        return Y, torch.dot(self._flat, self._flat).item() ** 0.5

    def _unit(self, P1: Tensor | None, m: Tensor) -> tuple[Tensor, float]:
        unit, size = normalized(m, 1e-37)
        return unit, float(size)

    def _move(self, p: Tensors, P1: Tensor | None, d: Tensor, keep: float, alpha: float) -> None:
        if P1 is None:
            torch._foreach_mul_(p, keep)
            torch._foreach_add_(p, parted(d, tuple(p)), alpha=alpha)
            return
        W, *b = p
        (W if W.ndim == 2 else W.flatten(1)).addmm_(d, self._onto[0], beta=keep, alpha=alpha)
        if b:
            b[0].addmv_(d, self._onto[1], beta=keep, alpha=alpha)
