"""Orthogonal matrices on the sides of a matrix, whole or with a few columns of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from precond.algebra.maps.base import LinearMap, Scaled
from precond.algebra.maps.dense import Kronecker
from precond.algebra.precision import rounding
from precond.algebra.vec import Vec


@dataclass(frozen=True, eq=False)
class CompactWY:
    r"""The orthogonal matrix Q = I − Z Yᵀ (n, n): reflections, one after the other, in the compact form of Schreiber & Van Loan (1989).

    A product with it takes 4nr operations a column. Columns beyond the first r are unit vectors but for what the reflections mix in.

    Attributes:
        Z, Y: (…, n, r), of matrices side by side.

    Example:
        >>> import torch
        >>> U = torch.tensor([[0.6], [0.8]], dtype=torch.float64)
        >>> Q = CompactWY.completing(U)
        >>> whole = Q @ torch.eye(2, dtype=torch.float64)
        >>> (whole.T @ whole).round(decimals=6), whole[:, 0].abs().round(decimals=6)
        (tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64), tensor([0.6000, 0.8000], dtype=torch.float64))
    """

    Z: Tensor
    Y: Tensor

    @classmethod
    def completing(cls, U: Tensor) -> CompactWY:
        """Q whose first r columns are orthonormal ones U (…, n, r), some with the other sign.

        The rest of Q is a function of U that no sign changes.
        """
        # A row that is zero but for rounding would decide the sign of a reflection.
        A, tau = torch.geqrf(torch.nn.functional.hardshrink(U, rounding(U.shape[-2], U.dtype)))
        Y = A.tril(-1)
        Y.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        # Z = Y T, T⁻¹ = diag(1/τ) + the upper part of YᵀY; τ is 0 where a column is a unit vector already.
        upper = (Y.mT @ Y).triu_(1).mul_(tau[..., None])
        T = torch.linalg.solve_triangular(upper, tau.diag_embed(), upper=True, unitriangular=True)
        return cls(Y @ T, Y)

    @property
    def T(self) -> CompactWY:
        """Qᵀ."""
        return CompactWY(self.Y, self.Z)

    @property
    def ndim(self) -> int:
        """The number of dimensions, 2 or, of matrices side by side, more."""
        return self.Y.ndim

    def __matmul__(self, X: Tensor) -> Tensor:
        return _minus(X, self.Z, self.Y.mT @ X)

    def from_right(self, X: Tensor) -> Tensor:
        """X Q."""
        return _minus(X, X @ self.Z, self.Y.mT)


def _minus(X: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """X − A B."""
    return torch.addmm(X, A, B, alpha=-1) if X.ndim == 2 else torch.baddbmm(X, A, B, alpha=-1)


Orthogonal = Tensor | CompactWY


def completed(U: Tensor) -> Orthogonal:
    """A square orthogonal matrix itself; of n × r orthonormal columns, an orthogonal matrix of which they are the first.

    Args:
        U: (…, n, r) with orthonormal columns, r ≤ n.

    Returns:
        U where r = n, else a :class:`CompactWY` (n, n); columns may have the other sign.

    Example:
        >>> import torch
        >>> completed(torch.eye(3)).shape, type(completed(torch.eye(3)[:, :1])).__name__
        (torch.Size([3, 3]), 'CompactWY')
    """
    return U if U.shape[-2] == U.shape[-1] else CompactWY.completing(U)


def transposed(Q: Orthogonal) -> Orthogonal:
    """Qᵀ."""
    return Q.mT if isinstance(Q, Tensor) else Q.T


def from_right(Q: Orthogonal, X: Tensor) -> Tensor:
    """X Q."""
    return X @ Q if isinstance(Q, Tensor) else Q.from_right(X)


class Rotation(LinearMap):
    """P = A ⊗ B with orthogonal A and B on one tensor W, seen row-major as a matrix (out, rest): W ↦ A W Bᵀ.

    None stands for the identity on that side. Sides of three dimensions act on k matrices side by side, W (k, out, …).

    Args:
        A: (out, out), (k, out, out), a :class:`CompactWY`, or None.
        B: (rest, rest), (k, rest, rest), a :class:`CompactWY`, or None.
        like: example (W,), which :meth:`to_dense` needs.

    Example:
        >>> import torch
        >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> Rotation(turn, None).mv((torch.tensor([[1.0], [2.0]]),))[0].T
        tensor([[-2.,  1.]])
    """

    def __init__(self, A: Orthogonal | None, B: Orthogonal | None, like: Vec | None = None):
        self.A, self.B, self.like = A, B, like

    def mv(self, v: Vec) -> Vec:
        (W,) = v
        X = Kronecker.matrices(W, self.A, self.B)
        if self.A is not None:
            X = self.A @ X
        if self.B is not None:
            X = from_right(transposed(self.B), X)
        return (X.reshape(W.shape),)

    def rmv(self, v: Vec) -> Vec:
        return self.T.mv(v)

    def add_to(self, p: Vec, v: Vec, keep: float, by: float) -> None:
        """The last product falls into p."""
        A, B = self.A, self.B
        W, X = (Kronecker.matrices(*t, A, B) for t in (p, v))
        if isinstance(B, Tensor) and p[0].is_contiguous():
            left, right = X if A is None else A @ X, B.mT
        elif isinstance(A, Tensor) and p[0].is_contiguous():
            left, right = A, X if B is None else from_right(transposed(B), X)
        else:
            return super().add_to(p, v, keep, by)
        (W.addmm_ if W.ndim == 2 else W.baddbmm_)(left, right, beta=keep, alpha=by)

    solve, rsolve = rmv, mv

    def gram(self, v: Vec) -> Vec:
        return v

    @property
    def T(self) -> LinearMap:
        A, B = (None if Q is None else transposed(Q) for Q in (self.A, self.B))
        return Rotation(A, B, self.like)

    def damped(self, delta: float) -> LinearMap:
        return self if delta == 0 else Scaled(self, (1 + delta) ** -0.5)
