"""Maps of float32 matrices, on vectors aligned to parameters of 16 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from precond.algebra import vec
from precond.algebra.maps.base import Identity, LinearMap, Piecewise
from precond.algebra.maps.composite import BlockDiagonal
from precond.algebra.vec import Scalar, Vec


def wide(t: Tensor) -> torch.dtype:
    """float32, or what is wider: the dtype of what optimizers keep of a parameter."""
    return torch.promote_types(t.dtype, torch.float32)


class Widened(Piecewise):
    """P of float32, or wider, on vectors that may be of 16 bits: they are widened before, and P v stays wide.

    Args:
        map: P.

    Example:
        >>> import torch, precond
        >>> P = Widened(precond.Dense(torch.tensor([[1.0, 2.0], [0.0, 1.0]])))
        >>> P.mv((torch.tensor([1.0, 1.0], dtype=torch.bfloat16),))
        (tensor([3., 1.]),)
    """

    def __init__(self, map: LinearMap):
        self.map, self.like, self.root, self.diagonal = map, map.like, map.root, map.diagonal

    def _each(self, method: str, v: Vec, *more: Sequence[Scalar]) -> Vec:
        return getattr(self.map, method)(vec.map_(lambda t: t.to(wide(t)), v), *more)

    def conjugated(self, v: Vec, scales: Sequence[Scalar]) -> Vec:
        return self._each("conjugated", v, scales)

    def damped(self, delta: float) -> LinearMap:
        return Widened(self.map.damped(delta))

    def bounded(self, t: Scalar) -> LinearMap:
        return Widened(self.map.bounded(t))

    @property
    def T(self) -> LinearMap:
        return Widened(self.map.T)


def of_parameters(blocks: Sequence[tuple[Sequence[int], LinearMap]], like: Vec) -> BlockDiagonal:
    """Maps that an optimizer keeps, in float32 at least, as one; of parameters of 16 bits each is :class:`Widened`.

    Args:
        blocks: pairs (positions, map).
        like: example of all tensors.

    Example:
        >>> import torch, precond
        >>> p = (torch.ones(2, dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16))
        >>> of_parameters([((0,), precond.Kronecker(2 * torch.eye(2), None))], p).mv(p)
        (tensor([2., 2.]), tensor([1.]))
    """
    if all(t.dtype == wide(t) for t in like):
        return BlockDiagonal(blocks, like)
    return BlockDiagonal([(i, Widened(m)) for i, m in blocks], like, Widened(Identity()))
