"""The step of a large layer: as few products of matrices as it takes, in 16 bits where that is faster, in scratch memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from precond.algebra.vec import Scalar, Tensors, Vec
from precond.optim.blocks import State
from precond.optim.engine.kernels.factors import Cached, Factor, Factors, SpikedFactor, WholeFactor, dot
from precond.optim.engine.kernels.polar.step import PolarStep
from precond.optim.preconditioners.kronecker import fold
from precond.optim.preconditioners.muon import normalized
from precond.optim.preconditioners.polar_roots import root_of
from precond.optim.preconditioners.workspace import WORKSPACE


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
class _Average:
    """m in the coordinates of P₁ without R. All of it may be written over.

    Attributes:
        X: (m_w − m_b μᵀ)/σ, in scratch memory.
        bias: m_b, or None.
        A, B: scratch memory of the shape of X, in the precision of products.
    """

    X: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor

    @property
    def wide(self) -> bool:
        return self.X.shape[0] <= self.X.shape[1] + (self.bias is not None)

    def begin(self) -> tuple[Tensor, Tensor]:
        """(X in the precision of products, memory that is free)."""
        return (self.X if self.A.dtype == self.X.dtype else self.A.copy_(self.X)), self.B


@dataclass(frozen=True)
class _InSubspace:
    """R and Q = L^(−1/2) of a tall layer, which are aI and cI but for the directions N, and for the bias.

    Attributes:
        N: (n, k), orthonormal columns.
        RQ, RQR: on the coordinates of [N, bias].
        a, c: on what is orthogonal to N.
    """

    N: Tensor
    RQ: Tensor
    RQR: Tensor
    a: float
    c: float


_Tangent = tuple[Tensor, Tensor | None]


@dataclass
class LargeStep(PolarStep[_Outer, _Average, _Tangent]):
    r"""(dW, db) = P₁ L^(−1/2) P₁ᵀm in which no more is multiplied than must be.

    With X = (m_w − m_b μᵀ)/σ the step of a wide layer is L^(−1/2)X·RRᵀ/σ, and ‖L^(−1/2)[XR, m_b]‖² = ⟨L^(−1/2)X, L^(−1/2)X·RRᵀ⟩ +
    ‖L^(−1/2)m_b‖²; that of a tall one is X·(R Q)·Rᵀ/σ with Q = L^(−1/2) from the right, bias included.

    Attributes:
        halves: whether products are in bfloat16.
    """

    halves: bool = True
    _last: _Average = field(init=False, repr=False)
    _left: Cached[Factor] = field(default_factory=Cached, init=False, repr=False)
    _right: Cached[tuple[Tensor, Tensor, Tensor]] = field(default_factory=Cached, init=False, repr=False)
    _in_subspace: Cached[_InSubspace] = field(default_factory=Cached, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._factors = Factors(False)
        self._narrow_factors = Factors(True) if self.halves else self._factors

    def _make(self, outer: State, mean: Tensor, std: Tensor, beta: float | Tensor) -> _Outer:
        inverse = std[0].reciprocal()
        known = self._factors(outer), self._narrow_factors(outer)
        return _Outer(mean[0], inverse, mean[0] * inverse, *(R[0] for R in known if R))

    def _memory(self, g: Tensors) -> Vec:
        shape, dtype = torch.Size((g[0].shape[0], g[0].numel() // g[0].shape[0])), g[0].dtype
        if self.halves:
            (X,), (A, B) = WORKSPACE.take(dtype, shape), WORKSPACE.take(torch.bfloat16, shape, shape)
        else:
            X, A, B = WORKSPACE.take(dtype, shape, shape, shape)
        bias = torch.empty_like(g[1]) if len(g) > 1 else None
        self._last = _Average(X, bias, A, B)
        return (X.view_as(g[0]),) if bias is None else (X.view_as(g[0]), bias)

    def _average(self, P1: _Outer | None) -> _Average:
        m = self._last
        if P1 is not None:
            if m.bias is not None:
                m.X.addr_(m.bias, P1.mean, alpha=-1)
            m.X.mul_(P1.inverse)
        return m

    def _unit(self, P1: _Outer | None, m: _Average) -> tuple[_Average, float]:
        Z, size = normalized(m.X if m.bias is None else torch.cat([m.X, m.bias[:, None]], 1), 1e-37)
        n = m.X.shape[1]
        return replace(m, X=Z[:, :n].contiguous(), bias=None if m.bias is None else Z[:, n].contiguous()), float(size)

    def _gram(self, P1: _Outer | None, m: _Average) -> Tensor:
        """Of Z = [XR, m_b]: ZZᵀ, or ZᵀZ of a tall layer; never of 16 bits, in which that of one direction has eigenvalues below −ελ₁."""
        Z, bias = m.X, m.bias
        if P1 is not None and (R := P1.narrow if m.wide else P1.R) is not None:
            A, B = (m.A, m.B) if m.wide else (torch.empty_like(Z), torch.empty_like(Z))
            Z = R.times(A.copy_(Z), B).to(m.X.dtype)
        if bias is not None and not m.wide:
            Z = torch.cat([Z, bias[:, None]], 1)
        gram = Z.new_empty(2 * (len(Z) if m.wide else Z.shape[1],))
        fold(gram, Z, not m.wide, 0.0, 1.0)
        return gram if bias is None or not m.wide else gram.addr_(bias, bias)

    def _turned(self, state: State, P1: _Outer | None, m: _Average) -> tuple[_Tangent, Scalar]:
        """((dW·σ in scratch memory, db before dW μ is taken from it), the length squared)."""
        if m.wide:
            turned = self._wide
        elif root_of(state).whole or (P1 is not None and isinstance(P1.R, WholeFactor)):
            turned = self._tall
        else:
            turned = self._tall_in_few_directions
        D, db, square = turned(state, P1, m)
        return (D if D.dtype == m.X.dtype else m.X.copy_(D), db), square

    def _move(self, p: Tensors, P1: _Outer | None, d: _Tangent, keep: float, alpha: float) -> None:
        dW, db = d
        if keep != 1:
            torch._foreach_mul_(p, keep)
        W = p[0].view_as(dW)
        if P1 is None:
            W.add_(dW, alpha=alpha)
        else:
            W.addcmul_(dW, P1.inverse, value=alpha)
        if db is not None:
            p[1].add_(db if P1 is None else torch.addmv(db, dW, P1.shifted, alpha=-1), alpha=alpha)

    def _wide(self, state: State, P1: _Outer | None, m: _Average) -> tuple[Tensor, Tensor | None, float]:
        """(dW·σ, db, the length squared)."""
        Y, free = m.begin()
        found = self._left(_version(state), lambda: self._make_left(state)).onto(Y, free)
        Y, free = (found, Y) if found is free else (found, free)
        if P1 is None or P1.narrow is None:
            square = dot(Y, Y)
        else:
            Y, square = P1.narrow.gram(Y, free)
        db = None
        if m.bias is not None:
            db = root_of(state).times(state, m.bias[:, None])[:, 0]
            square += dot(db, db)
        return Y, db, square

    def _tall(self, state: State, P1: _Outer | None, m: _Average) -> tuple[Tensor, Tensor | None, float]:
        """The same, R L^(−1/2) being multiplied once for all steps with them."""
        X, bias, n = m.X, m.bias, m.X.shape[1]
        R = None if P1 is None else P1.R
        # With statistics of one sample P₁ is the identity for a step, whatever R is.
        Q, RQ, narrow = self._right((_version(state), R), lambda: self._make_right(state, R, n))
        db = None if bias is None else X @ RQ[:, n] + bias * Q[n, n]
        A, B = m.begin()
        Y = torch.mm(A, narrow, out=B)
        if bias is not None:
            Y.addr_(bias.to(Y.dtype), Q[:n, n].to(Y.dtype))
        square = dot(Y, Y)
        if db is not None:
            square += dot(db, db)
        return Y if P1 is None or P1.narrow is None else P1.narrow.back(Y, A), db, square

    def _tall_in_few_directions(self, state: State, P1: _Outer | None, m: _Average) -> tuple[Tensor, Tensor | None, float]:
        """The same where R and L^(−1/2) differ from multiples of the identity in a few directions, which are all that is multiplied."""
        X, bias = m.X, m.bias
        R = None if P1 is None else P1.R
        M = self._in_subspace((_version(state), R), lambda: self._make_in_subspace(state, R, X.shape[1]))
        T = X @ M.N
        k, square = T.shape[1], dot(X, X)
        few = T if bias is None else torch.cat([T, bias[:, None]], 1)
        Y, D = few @ M.RQ, few @ M.RQR
        outside = square - dot(T, T)
        if outside > 1e-3 * square:
            D[:, :k].sub_(T, alpha=M.a**2 * M.c)
        else:  # little but rounding errors is left of such a difference
            X.addmm_(T, M.N.T, alpha=-1)
            outside = dot(X, X)
        X.addmm_(D[:, :k], M.N.T, beta=M.a**2 * M.c)
        return X, None if bias is None else D[:, k], (M.a * M.c) ** 2 * outside + dot(Y, Y)

    def _make_left(self, state: State) -> Factor:
        """L^(−1/2) of a wide layer, in the precision of products."""
        if not root_of(state).whole:
            return SpikedFactor.of(state["basis"], state["leading"], state["rest"], state["rest"].dtype)
        Q = self._narrow(state["root"])
        return WholeFactor(Q, [(0, len(Q))])

    def _make_right(self, state: State, R: Factor | None, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """(Q = L^(−1/2), R Q without the bias's row, without its column too in the precision of products) of a tall layer."""
        Q = root_of(state).matrix(state)
        RQ = Q[:n] if R is None else R.left(Q[:n])
        return Q, RQ, self._narrow(RQ[:, :n])

    def _make_in_subspace(self, state: State, R: Factor | None, n: int) -> _InSubspace:
        V, s, c = state["basis"], state["leading"], float(state["rest"])
        assert R is None or isinstance(R, SpikedFactor)
        N = torch.linalg.qr(V[:n] if R is None else torch.cat([R.U, V[:n]], 1)).Q
        k, bias = N.shape[1], len(V) - n
        eye = torch.eye(k + bias).to(V)
        on_N = torch.cat([N.T @ V[:n], V[n:]])  # V in the coordinates of [N, bias]
        Q = c * eye + (on_N * (s - c)) @ on_N.T
        if R is None:
            return _InSubspace(N, Q, Q, 1.0, c)
        U = N.T @ R.U
        eye[:k, :k] = R.a * (eye[:k, :k] - (U * R.once) @ U.T)
        return _InSubspace(N, eye @ Q, eye @ Q @ eye, R.a, c)

    def _narrow(self, A: Tensor) -> Tensor:
        """In the precision of products."""
        return A.bfloat16() if self.halves else A


def _version(state: State) -> int:
    """A number that changes when L^(−1/2) does."""
    return state["root" if root_of(state).whole else "basis"]._version
