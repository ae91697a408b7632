"""Subspaces that are taken out of a spectrum: what is known to be null, so that the rest is well posed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from precond.curvature.symmetric import stacked, to_rows
from precond.vec import Vec


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
        return rows - (rows @ self.rows.T) @ self.rows

    def within(self, kept: Tensor) -> Subspace:
        other = Span.__new__(Span)
        other._set(self.rows * kept, self._rtol)
        return other


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
