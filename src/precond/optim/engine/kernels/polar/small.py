"""The step of small layers, whose cost is that of calling operations: few, on [W b] as one matrix, and those of all layers at once."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from precond.algebra.maps import parted
from precond.algebra.vec import Scalar, Tensors, Vec
from precond.optim.blocks import State
from precond.optim.engine.kernels.factors import root
from precond.optim.engine.kernels.polar.step import PolarStep
from precond.optim.preconditioners.muon import normalized


@dataclass
class SmallStep(PolarStep[Tensor, Tensor, Tensor]):
    r"""P₁ is a matrix A from the right, of each group of rows: Z = [m_w m_b]A and d = L^(−1/2)Z Aᵀ, of a tall layer Z L^(−1/2)Aᵀ.

    A = [[σ⁻¹R, 0], [−μᵀσ⁻¹R, 1]].

    Attributes:
        groups: of rows that see different inputs.
    """

    groups: int = 1
    _scratch: Vec = field(default=(), init=False, repr=False)
    _views: Vec = field(default=(), init=False, repr=False)
    _A: tuple[Tensor, ...] = field(default=(), init=False, repr=False)
    _onto: tuple[Tensor, ...] = field(default=(), init=False, repr=False)

    @property
    def joint(self) -> Hashable:
        return SmallStep, self.P, self.momentum

    def _make(self, outer: State, mean: Tensor, std: Tensor, beta: float | Tensor) -> Tensor:
        n = std.shape[-1]
        if not self._A:
            N = n + len(outer.block.tensors) - 1
            A = torch.eye(N).to(std).repeat(self.groups, 1, 1)
            self._A, self._onto = (A, A[:, :n, :n], A[:, n:, :n]), (A.mT[..., :n], A.mT[..., n:])
        A, within, last = self._A
        if (R := root(outer, std)) is None:
            within.diagonal(dim1=-2, dim2=-1).copy_(std).reciprocal_()
        else:
            torch.div(R, std[..., None], out=within)
        if last.numel():
            torch.matmul(mean[:, None], within, out=last).neg_()
        return A

    def _memory(self, g: Tensors) -> Vec:
        if not self._scratch:
            self._scratch = tuple(torch.empty(self._shape, dtype=g[0].dtype) for _ in range(2))
            self._views = parted(self._scratch[0], tuple(g))
        return self._views

    def _written(self, memory: Vec) -> Vec:
        return self._scratch[:1]  # a norm of views that leave gaps takes four times as long

    def _average(self, P1: Tensor | None) -> Tensor:
        m, Z = self._scratch
        return m if P1 is None else self._from_right(m, P1, Z)

    def _from_right(self, X: Tensor, P1: Tensor, out: Tensor) -> Tensor:
        if self.groups == 1:
            return torch.mm(X, P1[0], out=out)
        torch.bmm(self._by_group(X), P1, out=self._by_group(out))
        return out

    def _by_group(self, X: Tensor) -> Tensor:
        """Rows (A, …) as (groups, rows, inputs)."""
        return X.view(self.groups, X.shape[0] // self.groups, -1)

    def _gram(self, P1: Tensor | None, m: Tensor) -> Tensor:
        return m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m

    def _turned(self, state: State, P1: Tensor | None, m: Tensor) -> tuple[Tensor, Scalar]:
        """(d before Aᵀ is applied to it, its norm squared)."""
        first, second = self._scratch
        Y, Q = second if m is first else first, state["root"]
        torch.mm(*((Q, m) if m.shape[0] <= m.shape[1] else (m, Q)), out=Y)
        flat = Y.view(-1)
        return Y, torch.dot(flat, flat)

    def _unit(self, P1: Tensor | None, m: Tensor) -> tuple[Tensor, float]:
        unit, size = normalized(m, 1e-37)
        return unit, float(size)

    def _move(self, p: Tensors, P1: Tensor | None, d: Tensor, keep: float, alpha: float) -> None:
        if P1 is None:
            torch._foreach_mul_(p, keep)
            torch._foreach_add_(p, parted(d, tuple(p)), alpha=alpha)
            return
        D = self._by_group(d)
        for t, onto in zip(p, self._onto, strict=False):
            self._by_group(t).baddbmm_(D, onto, beta=keep, alpha=alpha)
