"""A matrix for each dimension of a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from precond.algebra.maps.base import LinearMap
from precond.algebra.vec import Vec


class Tucker(LinearMap):
    r"""P = A₁ ⊗ A₂ ⊗ … on one tensor W: W ↦ W ×₁ A₁ ×₂ A₂ …, each matrix on a dimension of its own.

    Args:
        sides: of each dimension a matrix (n, n), its diagonal (n,), or None for the identity.
        like: the tensor.
        shape: W is seen in this shape, of as many dimensions as there are sides; None: its own.

    References:
        Kolda & Bader (2009), Tensor decompositions and applications.
    """

    def __init__(self, sides: Sequence[Tensor | None], like: Vec | None = None, shape: Sequence[int] | None = None):
        self.sides, self.like, self.shape = tuple(sides), like, None if shape is None else tuple(shape)

    def _each(self, v: Vec, on: Callable[[Tensor, Tensor], Tensor], transpose: bool = False) -> Vec:
        (W,) = v
        X = W.reshape(W.shape if self.shape is None else self.shape)
        for dim, side in enumerate(self.sides):
            if side is not None:
                A = torch.diag(side) if side.ndim == 1 else side
                moved = X.movedim(dim, 0)
                X = on(A.T if transpose else A, moved.reshape(len(moved), -1)).reshape(moved.shape).movedim(0, dim)
        return (X.reshape(W.shape),)

    def mv(self, v: Vec) -> Vec:
        return self._each(v, torch.matmul)

    def rmv(self, v: Vec) -> Vec:
        return self._each(v, torch.matmul, transpose=True)

    def solve(self, v: Vec) -> Vec:
        return self._each(v, torch.linalg.solve)

    def rsolve(self, v: Vec) -> Vec:
        return self._each(v, torch.linalg.solve, transpose=True)
