"""Inverses of R's Gram matrix with a multiple of the identity, and their roots, from the smaller side of R."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from precond.algebra import vec
from precond.algebra.maps.base import LinearMap
from precond.algebra.maps.eigen import eigh
from precond.algebra.vec import Vec


class Woodbury(LinearMap):
    r"""P = (RᵀR + δI)^(−1/2), symmetric, of rows R (m, n): M = P Pᵀ is the Gauss–Newton step's with Levenberg's and Marquardt's damping.

    Where m < n nothing larger than (m, m) is factored: M = (I − Rᵀ(RRᵀ + δI)⁻¹R)/δ (Woodbury), and every other function of RᵀR + δI
    likewise, f(RᵀR + δI) = f(δ)I + RᵀU diag((f(k + δ) − f(δ))/k) UᵀR with RRᵀ = U diag(k) Uᵀ.

    Args:
        rows: R, (m, n), such as ``gauss_newton_root(objective).to_dense()`` or ``Residuals.linearized()[1]``.
        damping: δ > 0.
        like: example of the vectors that P acts on, n entries in all; None: vectors of one tensor (n,).

    Raises:
        ValueError: for rows that are no matrix of as many columns as there are entries, or a damping that is not positive.

    Example:
        >>> P = Woodbury(torch.tensor([[1.0, 0.0]]), 1.0)
        >>> P.gram((torch.tensor([2.0, 2.0]),))
        (tensor([1., 2.]),)

    References:
        Levenberg (1944); Marquardt (1963); Hager (1989), Updating the inverse of a matrix.
    """

    like: Vec

    def __init__(self, rows: Tensor, damping: float, like: Vec | None = None):
        if rows.ndim != 2:
            raise ValueError(f"Woodbury: rows must be a matrix (m, n), got shape {tuple(rows.shape)}")
        if not damping > 0:
            raise ValueError(
                f"Woodbury: damping must be > 0, got {damping!r}; 1e-8 of the mean of RRᵀ's diagonal is small in float64"
            )
        self.like = (rows.new_zeros(rows.shape[1]),) if like is None else tuple(t.detach() for t in like)
        n = sum(t.numel() for t in self.like)
        if n != rows.shape[1]:
            raise ValueError(
                f"Woodbury: rows have {rows.shape[1]} columns, the vectors {n} entries; give a column for each entry"
            )
        self.rows, self.damping = rows, damping

    @property
    def _wide(self) -> bool:
        return self.rows.shape[0] < self.rows.shape[1]

    @cached_property
    def _gram(self) -> Tensor:
        """The smaller one of RRᵀ and RᵀR."""
        return self.rows @ self.rows.T if self._wide else self.rows.T @ self.rows

    @cached_property
    def _cholesky(self) -> Tensor:
        """Of the smaller one + δI; a damping below its rounding leaves it indefinite, and is raised until it is not."""
        K, least = self._gram, torch.finfo(self._gram.dtype).eps * float(self._gram.diagonal().sum())
        for damping in (self.damping, *(least * 10**k for k in range(6))):
            L, info = torch.linalg.cholesky_ex(
                K + max(damping, self.damping) * torch.eye(len(K), dtype=K.dtype, device=K.device)
            )
            if not bool(info):
                return L
        raise torch.linalg.LinAlgError("Woodbury: RRᵀ + δI is not positive definite; are the rows finite?")

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        k, U = eigh(self._gram)
        return k.clamp_min(0), U

    def _solved(self, x: Tensor) -> Tensor:
        return torch.cholesky_solve(x[:, None], self._cholesky)[:, 0]

    def fitted(self, r: Tensor) -> Vec:
        """Rᵀ(RRᵀ + δI)⁻¹ r = M Rᵀr, the step for residuals r (m,), which loses nothing to the difference in M."""
        flat = self.rows.T @ self._solved(r) if self._wide else self._solved(self.rows.T @ r)
        return vec.unflatten(flat, self.like)

    def gram(self, v: Vec) -> Vec:
        x = vec.flatten(v).to(self.rows.dtype)
        if self._wide:
            out = (x - self.rows.T @ self._solved(self.rows @ x)) / self.damping
        else:
            out = self._solved(x)
        return vec.unflatten(out.to(vec.flatten(v).dtype), v)

    def _of(self, at_rest: float, slope: Callable[[Tensor], Tensor], v: Vec) -> Vec:
        """f(RᵀR + δI) v, from f(δ) and (f(k + δ) − f(δ))/k."""
        x = vec.flatten(v).to(self.rows.dtype)
        k, U = self._eigen
        if self._wide:
            out = at_rest * x + self.rows.T @ (U @ (slope(k) * (U.T @ (self.rows @ x))))
        else:
            out = at_rest * x + U @ (slope(k) * k * (U.T @ x))
        return vec.unflatten(out.to(vec.flatten(v).dtype), v)

    def mv(self, v: Vec) -> Vec:
        d = self.damping**0.5
        return self._of(1 / d, lambda k: -1 / (d * (k + d * d).sqrt() * ((k + d * d).sqrt() + d)), v)

    rmv = mv

    def solve(self, v: Vec) -> Vec:
        d = self.damping**0.5
        return self._of(d, lambda k: 1 / ((k + d * d).sqrt() + d), v)

    rsolve = solve

    def damped(self, delta: float) -> LinearMap:
        mean = self.damping + float(self.rows.square().sum()) / self.rows.shape[1]
        return self if delta == 0 else Woodbury(self.rows, self.damping + delta * mean, self.like)

    @property
    def T(self) -> LinearMap:
        return self
