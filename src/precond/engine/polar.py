"""Polar's step in place, alone or in the coordinates of BNP or Whitening: two products of matrices, in 16 bits where that is faster."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from precond.blocks import State
from precond.engine.cells import Cell
from precond.engine.factors import Factor, Factors
from precond.engine.layer import Kept, is_plain
from precond.engine.precision import in_16_bits
from precond.engine.workspace import WORKSPACE
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
        mean, inverse, shifted: μ, 1/σ and μ/σ.
        R: R, or None for the identity.
        narrow: R in the precision of products, or None.
    """

    mean: Tensor
    inverse: Tensor
    shifted: Tensor
    R: Factor | None = None
    narrow: Factor | None = None


@dataclass(frozen=True)
class _Space:
    """Scratch of the weight's shape: fresh memory costs as much as several passes. X, Y in its dtype, A, B in that of products."""

    X: Tensor
    Y: Tensor
    A: Tensor
    B: Tensor


# Lengths whose squares stay in the range of float32.
_LEAST, _MOST = 1e-12, 1e15


@dataclass
class PolarStep:
    r"""W ← (1 − αλ)W − α dW, b likewise, with (dW, db) = P₁ (s·L^(−1/2)) P₁ᵀ m.

    With X = (m_w − m_b μᵀ)/σ the step of a wide layer is L^(−1/2)X·RRᵀ/σ, and ‖L^(−1/2)[XR, m_b]‖² = ⟨L^(−1/2)X, L^(−1/2)X·RRᵀ⟩ +
    ‖L^(−1/2)m_b‖²; that of a tall one is X·(R Q)·Rᵀ/σ with Q = L^(−1/2) from the right, bias included.
    """

    P: Polar
    outer: BNP | Whitening | None
    momentum: Momentum
    decay: float
    _halves: bool = True
    _root: tuple[tuple[int, Factor | None], Tensor] | None = field(default=None, repr=False)
    _seen: int = field(default=-1, repr=False)

    def __post_init__(self) -> None:
        if self.outer is not None:
            self._kept, self._factors = Kept(self.outer, self._make), Factors(False)
            self._narrow_factors = Factors(True) if self._halves else self._factors

    def __call__(self, cell: Cell, p: Tensors, g: Tensors, lr: Scalar, maximize: bool) -> None:
        state = cell.state if self.outer is None else cell.state["inner"]
        P1 = None
        if self.outer is not None:
            if cell.inputs:
                self.outer.observe(cell.state["outer"], Seen((), cell.inputs))
            P1 = self._kept(cell.state["outer"])
        if maximize:
            g = torch._foreach_neg(g)
        self.momentum.fold(cell.average, tuple(g))
        if cell.inputs:
            self.P.hear(state, cell.inputs)
        space = self._space(p[0])
        X, bias = self._pulled(cell, g, P1, space.X)
        if first := self._is_first(state):
            z = tuple(p) if self.outer is None else self.outer.map(cell.state["outer"]).solve(tuple(p))
            self.P.measure(state, augmented(z))
        rows, columns = X.shape[0], X.shape[1] + len(p) - 1
        if share := self.P.share(state, (rows, columns), first):
            self._renew(state, P1, X, bias, space, share)
        step, size = self._wide if rows <= columns else self._tall, 1.0
        dW, db, norm = step(state, P1, X, bias, space)
        if not _LEAST < norm < _MOST:
            X, bias, size = self._unit(*self._pulled(cell, g, P1, space.X))
            dW, db, norm = step(state, P1, X, bias, space)
        state["norm"].fill_(norm * size)
        alpha = -float(lr) * self.P.reach(state, (rows, columns)) / norm if norm > 0 else 0.0
        if self.decay:
            torch._foreach_mul_(p, 1 - float(lr) * self.decay)
        W = p[0].view_as(dW)
        if P1 is None:
            W.add_(dW, alpha=alpha)
        else:
            W.addcmul_(dW, P1.inverse, value=alpha)
        if db is not None:
            p[1].add_(db if P1 is None else torch.addmv(db, dW, P1.shifted, alpha=-1), alpha=alpha)
        if self.outer is not None:
            self.outer.refresh(cell.state["outer"])

    def _is_first(self, state: State) -> bool:
        """Whether nothing was observed yet; looked at where L is another than when it was last."""
        if self._seen == state["gram"]._version:
            return False
        fresh = self.P.is_fresh(state)
        if not fresh:
            self._seen = state["gram"]._version
        return fresh

    def _space(self, like: Tensor) -> _Space:
        shape = torch.Size((like.shape[0], like[0].numel()))
        if self._halves:
            return _Space(*WORKSPACE.take(like.dtype, shape, shape), *WORKSPACE.take(torch.bfloat16, shape, shape))
        return _Space(*WORKSPACE.take(like.dtype, shape, shape, shape, shape))

    def _pulled(self, cell: Cell, g: Tensors, P1: _Outer | None, X: Tensor) -> tuple[Tensor, Tensor | None]:
        """((m_w − m_b μᵀ)/σ in X, m_b or None) of the momentum m, which is folded already."""
        bias = torch.empty_like(g[1]) if len(g) > 1 else None
        self.momentum.write(cell.average, tuple(g), (X.view_as(g[0]),) if bias is None else (X.view_as(g[0]), bias))
        if P1 is not None:
            if bias is not None:
                X.addr_(bias, P1.mean, alpha=-1)
            X.mul_(P1.inverse)
        return X, bias

    @staticmethod
    def _unit(X: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, float]:
        """(X/s, m_b/s, s) with s the norm of both."""
        m, size = normalized(X if bias is None else torch.cat([X, bias[:, None]], 1), 1e-37)
        X.copy_(m[:, : X.shape[1]])
        return X, None if bias is None else m[:, -1].contiguous(), float(size)

    def _renew(self, state: State, P1: _Outer | None, X: Tensor, bias: Tensor | None, space: _Space, share: float) -> None:
        """Take the root of z₁'s momentum Z = [XR, m_b]; of a wide layer ZZᵀ = X·RRᵀ·Xᵀ + m_b m_bᵀ."""
        wide = X.shape[0] <= X.shape[1] + (bias is not None)
        if wide and P1 is not None and P1.narrow is not None:
            A = space.A.copy_(X)
            gram = (P1.narrow.gram(A, space.B) @ A.T).to(X.dtype)
            gram = (gram + gram.T) / 2
            if bias is not None:
                gram.addr_(bias, bias)
        else:
            Z = self._in_z1(X, bias, P1)
            gram = Z @ Z.T if wide else Z.T @ Z
        square = float(gram.trace())
        if _LEAST**2 < square < _MOST**2:
            self.P.fold(state, gram.div_(square), share)
        else:
            X, bias, _ = self._unit(X.clone(), bias)
            self.P.renew(state, self._in_z1(X, bias, P1), share)

    @staticmethod
    def _in_z1(X: Tensor, bias: Tensor | None, P1: _Outer | None) -> Tensor:
        """Z = [XR, m_b]."""
        Z = X if P1 is None or P1.R is None else P1.R.times(X, torch.empty_like(X))
        return Z if bias is None else torch.cat([Z, bias[:, None]], 1)

    def _make(self, outer: State, mean: Tensor, std: Tensor, beta: float | Tensor) -> _Outer:
        inverse = std[0].reciprocal()
        known = self._factors(outer), self._narrow_factors(outer)
        return _Outer(mean[0], inverse, mean[0] * inverse, *(R[0] for R in known if R))

    def _wide(
        self, state: State, P1: _Outer | None, X: Tensor, bias: Tensor | None, space: _Space
    ) -> tuple[Tensor, Tensor | None, float]:
        """(dW·σ in scratch memory, db, ‖L^(−1/2)m‖), before the gain."""
        root = self._narrow_root(state)
        A, B = space.A, space.B
        Y = D = torch.mm(root, A.copy_(X) if self._halves else X, out=B)
        if P1 is not None and P1.narrow is not None:
            D = P1.narrow.gram(Y, A)
            if self._halves:
                Y, D = space.Y.copy_(Y), X.copy_(D)
        elif self._halves:
            Y = D = X.copy_(Y)
        square = float(torch.dot(Y.flatten(), D.flatten()))
        db = None
        if bias is not None:
            db = state["root"] @ bias
            square += float(torch.dot(db, db))
        return D, db, max(square, 0.0) ** 0.5

    def _tall(
        self, state: State, P1: _Outer | None, X: Tensor, bias: Tensor | None, space: _Space
    ) -> tuple[Tensor, Tensor | None, float]:
        """The same."""
        n, Q = X.shape[1], state["root"]
        R = None if P1 is None else P1.R
        right, A, B = self._narrow_root(state, R, n), space.A, space.B
        db = None if bias is None else X @ (Q[:n, n] if R is None else R.left(Q[:n, n:])[:, 0]) + bias * Q[n, n]
        Y = torch.mm(A.copy_(X) if self._halves else X, right, out=B)
        if self._halves:
            Y = X.copy_(Y)
        if bias is not None:
            Y.addr_(bias, Q[:n, n])
        square = float(torch.dot(Y.flatten(), Y.flatten()))
        if db is not None:
            square += float(torch.dot(db, db))
        if P1 is not None and P1.narrow is not None:
            Y = X.copy_(P1.narrow.back(A.copy_(Y), B)) if self._halves else P1.narrow.back(Y, A)
        return Y, db, square**0.5

    def _narrow(self, A: Tensor) -> Tensor:
        """In the precision of products."""
        return A.bfloat16() if self._halves else A

    def _narrow_root(self, state: State, R: Factor | None = None, n: int | None = None) -> Tensor:
        """L^(−1/2), or of a tall layer R L^(−1/2) without the row and column of the bias."""
        # With statistics of one sample P₁ is the identity for a step, whatever R is.
        version = state["root"]._version, R
        if self._root is None or self._root[0] != version:
            Q = state["root"][:n, :n]
            self._root = version, self._narrow(Q if R is None else R.left(Q))
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
    halves = inner.arithmetic == "bfloat16" and in_16_bits(cell.block.tensors[0])
    return PolarStep(inner, outer, momentum, decay, halves)
