"""Polar's step in place, alone or in the coordinates of BNP or Whitening: two products of matrices, in 16 bits where the weight has 32."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from precond.blocks import State
from precond.engine.arrow import is_plain
from precond.engine.cells import Cell
from precond.engine.workspace import WIDE, WORKSPACE
from precond.maps import augmented
from precond.momentum import Momentum
from precond.preconditioners import BNP, Composition, Polar, Preconditioner, Whitening
from precond.preconditioners.base import Seen
from precond.preconditioners.muon import normalized
from precond.vec import Scalar, Tensors


@dataclass(frozen=True)
class _Outer:
    """P₁ = U·diag(1, σ⁻¹R) of a layer: w = (z_w Rᵀ)/σ, b = z_b − μᵀw.

    Attributes:
        mean, inverse: μ and 1/σ.
        factor: R, or None for the identity.
        gram: R Rᵀ in the precision of products, or None.
    """

    mean: Tensor
    inverse: Tensor
    factor: Tensor | None = None
    gram: Tensor | None = None


@dataclass
class PolarStep:
    r"""W ← (1 − αλ)W − α dW, b likewise, with (dW, db) = P₁ (s·L^(−1/2)) P₁ᵀ m.

    With X = (m_w − m_b μᵀ)/σ the step of a wide layer is L^(−1/2)X·RRᵀ/σ, and ‖L^(−1/2)[XR, m_b]‖² = ⟨L^(−1/2)X, L^(−1/2)X·RRᵀ⟩ +
    ‖L^(−1/2)m_b‖²; that of a tall one is X·(R Q)·Rᵀ/σ with Q = L^(−1/2) from the right, bias included.
    """

    P: Polar
    outer: Preconditioner | None
    momentum: Momentum
    decay: float
    _halves: bool = True
    _known: tuple[tuple[int, int], _Outer | None] | None = field(default=None, repr=False)
    _gram: tuple[int, Tensor] | None = field(default=None, repr=False)
    _root: tuple[tuple[int, int], Tensor] | None = field(default=None, repr=False)

    def __call__(self, cell: Cell, p: Tensors, g: Tensors, lr: Scalar, maximize: bool) -> None:
        torch._foreach_add_(cell.state["step"], 1)
        state, lr = cell.state if self.outer is None else cell.state["inner"], float(lr)
        P1 = None if self.outer is None else self._outer(cell)
        m, size = self._unit(self._average(cell, g, maximize))
        t = min(cell.state.steps)
        if first := self.P.is_fresh(state):
            z = tuple(p) if self.outer is None else self.outer.map(cell.state["outer"]).solve(tuple(p))
            self.P.measure(state, augmented(z))
        X = m[0].view(m[0].shape[0], -1)
        bias = m[1] if len(m) > 1 else None
        if P1 is not None:
            if bias is not None:
                X.addr_(bias, P1.mean, alpha=-1)
            X.mul_(P1.inverse)
        if first or self.P.due(t):
            Z = X if P1 is None or P1.factor is None else X @ P1.factor
            self.P.renew(state, Z if bias is None else torch.cat([Z, bias[:, None]], 1), first)
        rows, columns = X.shape[0], X.shape[1] + len(m) - 1
        step = self._wide if rows <= columns else self._tall
        dW, db, norm = step(state, P1, X, bias)
        state["norm"].copy_(norm * size)
        alpha = -lr * float(self.P.gain(state, (rows, columns)) * size)
        if self.decay:
            torch._foreach_mul_(p, 1 - lr * self.decay)
        if P1 is not None:
            dW.mul_(P1.inverse)
        p[0].view_as(dW).add_(dW, alpha=alpha)
        if db is not None:
            p[1].add_(db if P1 is None else torch.addmv(db, dW, P1.mean, alpha=-1), alpha=alpha)
        if self.outer is not None:
            self.outer.refresh(cell.state["outer"])

    def _average(self, cell: Cell, g: Tensors, maximize: bool) -> list[Tensor]:
        """The momentum, in memory of its own."""
        if maximize:
            g = torch._foreach_neg(g)
        self.momentum.fold(cell.average, tuple(g))
        current = self.momentum.current(cell.average, tuple(g))
        return [x.clone() if x is kept else x for x, kept in zip(current, cell.average["m"], strict=True)]

    @staticmethod
    def _unit(m: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """(m/‖m‖ in its own memory, ‖m‖)."""
        size = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(m)))
        if not 1e-12 < float(size) < 1e15:
            X, size = normalized(torch.cat([x.flatten() for x in m]), 1e-37)
            for x, part in zip(m, X.split([x.numel() for x in m]), strict=True):
                x.copy_(part.view_as(x))
        else:
            torch._foreach_div_(m, size)
        return m, size

    def _outer(self, cell: Cell) -> _Outer | None:
        """What P₁ is made of; made again where its statistics have changed."""
        outer = cell.state["outer"]
        assert self.outer is not None
        if cell.inputs:
            self.outer.observe(outer, Seen((), cell.inputs))
        version = outer["mean"]._version, outer["factor"]._version if "factor" in outer else 0
        if self._known is None or self._known[0] != version:
            self._known = version, self._made(outer)
        return self._known[1]

    def _made(self, outer: State) -> _Outer | None:
        if int(outer["count"].min()) == 0:
            return None
        (part,) = self.outer.parts(outer.block)  # type: ignore[union-attr]
        if isinstance(self.outer, BNP):
            arrow = self.outer.map(outer)
            return _Outer(arrow.mean[0, 0], 1 / arrow.std[0, 0])  # type: ignore[attr-defined]
        if int(outer["count"].min()) < 2:
            return None
        mean, variance = self.outer.scales(part, outer)  # type: ignore[union-attr]
        R = outer["factor"][0]
        if self._gram is None or self._gram[0] != R._version:
            self._gram = R._version, (Q := self._narrow(R)) @ Q.T
        return _Outer(mean[0], variance[0].rsqrt(), R, self._gram[1])

    def _wide(self, state: State, P1: _Outer | None, X: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """(dW·σ, db, ‖L^(−1/2)m‖), before the gain; the first in the memory of X."""
        root = self._narrow_root(state)
        A, B = WORKSPACE.take(root.dtype, X.shape, X.shape)
        Y = torch.mm(root, A.copy_(X), out=B)
        if P1 is None or P1.gram is None:
            square = X.copy_(Y).square().sum()
        else:
            D = torch.mm(Y, P1.gram, out=A)
            square = torch.dot(Y.flatten().to(X.dtype), X.copy_(D).flatten())
        if bias is None:
            return X, None, square.clamp_min(0).sqrt()
        db = state["root"] @ bias
        return X, db, (square + db.square().sum()).clamp_min(0).sqrt()

    def _tall(self, state: State, P1: _Outer | None, X: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """The same."""
        n, Q = X.shape[1], state["root"]
        R = None if P1 is None else P1.factor
        right = self._narrow_root(state, R, n)
        A, B = WORKSPACE.take(right.dtype, X.shape, X.shape)
        db = None if bias is None else X @ (Q[:n, n] if R is None else R @ Q[:n, n]) + bias * Q[n, n]
        X.copy_(torch.mm(A.copy_(X), right, out=B))
        if bias is not None:
            X.addr_(bias, Q[:n, n])
        square = X.square().sum() if db is None else X.square().sum() + db.square().sum()
        if R is not None:
            X.copy_(torch.mm(A.copy_(X), self._narrow(R).T, out=B))
        return X, db, square.sqrt()

    def _narrow(self, A: Tensor) -> Tensor:
        """In the precision of products."""
        return A.bfloat16() if self._halves and A.dtype == torch.float32 else A

    def _narrow_root(self, state: State, R: Tensor | None = None, n: int | None = None) -> Tensor:
        """L^(−1/2), or of a tall layer R L^(−1/2) without the row and column of the bias."""
        # With statistics of one sample P₁ is the identity for a step, whatever R is.
        version = state["root"]._version, -1 if R is None else R._version
        if self._root is None or self._root[0] != version:
            Q = state["root"][:n, :n]
            self._root = version, self._narrow(Q if R is None else R @ Q)
        return self._root[1]


def polar(cell: Cell, P: Preconditioner, momentum: Momentum | None, decay: float) -> PolarStep | None:
    """The kernel of a contiguous layer, alone or behind BNP or Whitening; or None."""
    outer, inner = (P.outer, P.inner) if isinstance(P, Composition) else (None, P)
    if not isinstance(inner, Polar) or momentum is None or momentum.of != "cotangent":
        return None
    if "clean" in cell.average or "m" not in cell.average:
        return None
    if outer is not None and not (isinstance(outer, BNP | Whitening) and is_plain(outer, cell.block)):
        return None
    if isinstance(outer, BNP) and outer.width_scaling:
        return None
    if not all(t.is_contiguous() for t in cell.block.tensors):
        return None
    halves = inner.arithmetic == "bfloat16" and cell.block.tensors[0].numel() >= WIDE
    return PolarStep(inner, outer, momentum, decay, halves)
