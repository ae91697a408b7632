"""Orthogonal matrices on the sides of a matrix, whole or with a few columns of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from precond.maps.base import LinearMap, Scaled
from precond.vec import Vec


@dataclass(frozen=True, eq=False)
class Reflected:
    r"""The orthogonal matrix Q = I − Y T Yᵀ (n, n): reflections, one after the other, in the compact form of Schreiber & Van Loan (1989).

    A product with it takes 4nr operations a column. Columns beyond the first r are unit vectors but for what the reflections mix in.

    Attributes:
        Y: (n, r).
        core: T (r, r).
    """

    Y: Tensor
    core: Tensor

    @classmethod
    def completing(cls, U: Tensor) -> Reflected:
        """Q whose first r columns are orthonormal ones U (n, r), some with the other sign."""
        A, tau = torch.geqrf(U)
        Y = A.tril(-1)
        Y.diagonal().fill_(1.0)
        # T⁻¹ = diag(1/τ) + the upper part of YᵀY; τ is 0 where a column is a unit vector already.
        upper = (Y.T @ Y).triu_(1).mul_(tau[:, None])
        T = torch.linalg.solve_triangular(upper, tau.diag(), upper=True, unitriangular=True)
        return cls(Y, T)

    @property
    def T(self) -> Reflected:
        """Qᵀ."""
        return Reflected(self.Y, self.core.T)

    def __matmul__(self, X: Tensor) -> Tensor:
        return self.onto_(X.clone())

    def onto_(self, X: Tensor) -> Tensor:
        """X ← Q X."""
        return X.addmm_(self.Y, self.core @ (self.Y.T @ X), alpha=-1)

    def from_right_(self, X: Tensor) -> Tensor:
        """X ← X Q."""
        return X.addmm_((X @ self.Y) @ self.core, self.Y.T, alpha=-1)


Orthogonal = Tensor | Reflected


def completed(U: Tensor) -> Orthogonal:
    """A square orthogonal matrix itself; of n × r orthonormal columns, an orthogonal matrix of which they are the first."""
    return U if U.shape[0] == U.shape[1] else Reflected.completing(U)


class Rotation(LinearMap):
    """P = A ⊗ B with orthogonal A and B on one tensor W, seen row-major as a matrix (out, rest): W ↦ A W Bᵀ.

    None stands for the identity on that side.
    """

    def __init__(self, A: Orthogonal | None, B: Orthogonal | None, like: Vec | None = None):
        self.A, self.B, self.like = A, B, like

    def _apply(self, v: Vec, A: Orthogonal | None, B: Orthogonal | None) -> Vec:
        (W,) = v
        X = W.reshape(W.shape[0], -1)
        if A is not None:
            X = A @ X
        if B is not None:
            X = (B @ X.T).T
        return (X.reshape(W.shape),)

    def mv(self, v: Vec) -> Vec:
        return self._apply(v, self.A, self.B)

    def rmv(self, v: Vec) -> Vec:
        return self.T.mv(v)

    solve, rsolve = rmv, mv

    def gram(self, v: Vec) -> Vec:
        return v

    @property
    def T(self) -> LinearMap:
        return Rotation(None if self.A is None else self.A.T, None if self.B is None else self.B.T, self.like)

    def damped(self, delta: float) -> LinearMap:
        return self if delta == 0 else Scaled(self, (1 + delta) ** -0.5)
