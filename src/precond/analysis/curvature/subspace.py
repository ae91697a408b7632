"""Subspaces that are taken out of a spectrum: what is known to be null, so that the rest is well posed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from precond.algebra.vec import Vec
from precond.analysis.curvature.symmetric import stacked, to_rows

# Vectors that are made dense at once.
_ROWS = 64


class Subspace(ABC):
    """A subspace of the parameters' space, given by the projection along it.

    Attributes:
        dim: its dimension.
    """

    dim: int

    @abstractmethod
    def removed(self, rows: Tensor) -> Tensor:
        """(I − QQᵀ)x for each row x of a matrix (k, n), the columns of Q an orthonormal basis."""

    @abstractmethod
    def within(self, kept: Tensor) -> Subspace:
        """What is left of it when the coordinates where ``kept``, (n,), is False are taken out of the space as well."""


class Span(Subspace):
    """The span of given vectors; those that depend on the others are dropped.

    Args:
        vectors: aligned to the map's vectors.
        rtol: singular values below ``rtol`` times the largest count as zero.

    Raises:
        ValueError: for no vectors.

    Example:
        >>> import torch, precond
        >>> null = Span([(torch.tensor([0.0, 1.0]),)])
        >>> A = precond.Diagonal((torch.tensor([3.0, 0.0]),))
        >>> null.dim, precond.condition_number(A, deflate=null).lam_min
        (1, 3.0)
    """

    def __init__(self, vectors: Sequence[Vec], rtol: float | None = None):
        if not vectors:
            raise ValueError("Span: vectors is empty; give at least one vector, or None as the subspace to deflate")
        self._set(to_rows(stacked(list(vectors))), rtol)

    def _set(self, rows: Tensor, rtol: float | None) -> None:
        self._rtol = rtol
        rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        _, s, Vh = torch.linalg.svd(rows, full_matrices=False)
        rtol = torch.finfo(rows.dtype).eps * max(rows.shape) if rtol is None else rtol
        self.rows = Vh[s > rtol * s[0]] if len(s) and s[0] > 0 else Vh[:0]
        self.dim = len(self.rows)

    def removed(self, rows: Tensor) -> Tensor:
        Q = self.rows.to(rows)
        return rows - (rows @ Q.T) @ Q

    def within(self, kept: Tensor) -> Subspace:
        other = Span.__new__(Span)
        other._set(self.rows * kept, self._rtol)
        return other


class SparseSpan(Subspace):
    """The span of k sparse vectors, projected away by normal equations, x − Sᵀ(SSᵀ)⁺S x.

    Args:
        row: which vector an entry belongs to, (m,).
        column: its position, (m,).
        values: the entries, (m,).
        shape: (k, n).
    """

    def __init__(self, row: Tensor, column: Tensor, values: Tensor, shape: tuple[int, int]):
        self._row, self._column, self._shape = row, column, shape
        square = values.double().new_zeros(shape[0]).index_add(0, row, values.double().square())
        # Kept in float64, so that the same directions serve the same map in float64.
        self._values = values.double() * square[row].clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
        self._cast: dict[torch.dtype, tuple[Tensor, Tensor, Tensor]] = {}
        S = self._sparse(torch.float64)
        G = torch.cat([torch.sparse.mm(S, self._dense(i, min(i + _ROWS, shape[0])).T) for i in range(0, shape[0], _ROWS)], 1)
        s, V = torch.linalg.eigh(G)
        # Dependent vectors (those of dead units, or zero) are dropped; s are squares of singular values.
        keep = s > torch.finfo(values.dtype).eps ** 0.7 * s[-1:].clamp_min(1)
        self.dim = int(keep.sum())
        self._inverse = (V[:, keep] / s[keep]) @ V[:, keep].T

    def _sparse(self, dtype: torch.dtype) -> Tensor:
        indices = torch.stack([self._row, self._column])
        return torch.sparse_coo_tensor(indices, self._values.to(dtype), self._shape, check_invariants=False).coalesce()

    def _dense(self, first: int, last: int) -> Tensor:
        at = (self._row >= first) & (self._row < last)
        flat = (self._row[at] - first) * self._shape[1] + self._column[at]
        return (
            self._values.new_zeros((last - first) * self._shape[1]).index_add(0, flat, self._values[at]).view(last - first, -1)
        )

    def rows(self) -> Tensor:
        """The unit vectors, (k, n), dense, float64."""
        return self._dense(0, self._shape[0])

    def removed(self, rows: Tensor) -> Tensor:
        if rows.dtype not in self._cast:
            S = self._sparse(rows.dtype)
            self._cast[rows.dtype] = S, S.t().coalesce(), self._inverse.to(rows.dtype)
        S, St, inverse = self._cast[rows.dtype]
        return rows - torch.sparse.mm(St, inverse @ torch.sparse.mm(S, rows.T)).T

    def within(self, kept: Tensor) -> SparseSpan:
        return SparseSpan(self._row, self._column, self._values * kept[self._column], self._shape)


class Coordinates(Subspace):
    """The coordinates at which a mask is False, and with them another subspace.

    Args:
        kept: booleans, (n,).
        inner: a subspace, or None.
    """

    def __init__(self, kept: Tensor, inner: Subspace | None = None):
        self.kept = kept
        self.zeros = int(kept.numel() - kept.sum())
        self.inner = inner.within(kept) if inner is not None and self.zeros else inner
        self.dim = self.zeros + (self.inner.dim if self.inner is not None else 0)

    def removed(self, rows: Tensor) -> Tensor:
        if self.zeros:
            rows = rows * self.kept
        return rows if self.inner is None else self.inner.removed(rows)

    def within(self, kept: Tensor) -> Subspace:
        return Coordinates(self.kept & kept, self.inner)
