"""Symmetric maps, and products of any map with a block of vectors."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from precond.algebra import vec
from precond.algebra.maps import Diagonal, Identity, LinearMap, Product, Scaled, Transposed
from precond.algebra.vec import Vec

Block = tuple[Tensor, ...]
"""k vectors at once: the tensors of a Vec, each with a leading dimension k."""


class BlockMap(LinearMap):
    """A map that is applied to several vectors at once by ``mm``."""

    @abstractmethod
    def mm(self, block: Block) -> Block:
        """A V for the k vectors of a block."""

    def to_dense(self) -> Tensor:
        return dense(self)


class SymmetricMap(BlockMap):
    """A map A = Aᵀ."""

    def rmv(self, v: Vec) -> Vec:
        return self.mv(v)

    def solve(self, v: Vec) -> Vec:
        raise NotImplementedError(f"{type(self).__name__} is known by its products alone and has no inverse")

    rsolve = solve

    @property
    def T(self) -> LinearMap:
        return self


class Shifted(SymmetricMap):
    """A + s·I: an L2 penalty (s/2)‖p‖² that the loss does not contain.

    Args:
        map: A, symmetric.
        s: the shift; negative ones are allowed.

    Example:
        >>> A = Diagonal((torch.tensor([1.0, 2.0]),))
        >>> Shifted(A, 0.5).mv((torch.ones(2),))
        (tensor([1.5000, 2.5000]),)
    """

    def __init__(self, map: LinearMap, s: float):
        self.map, self.s, self.like = map, s, map.like

    def mv(self, v: Vec) -> Vec:
        return vec.add(self.map.mv(v), v, alpha=self.s)

    def mm(self, block: Block) -> Block:
        return vec.add(apply_block(self.map, block), block, alpha=self.s)


def apply_block(map: LinearMap, block: Block) -> Block:
    """``map`` applied to each of the k vectors of a block, in as few passes as the map allows."""
    match map:
        case BlockMap():
            return map.mm(block)
        case Product():
            return apply_block(map.outer, apply_block(map.inner, block))
        case Identity():
            return block
        case Scaled():
            return vec.scale(apply_block(map.map, block), map.s)
        case Diagonal():
            return tuple(d * t for d, t in zip(map.d, block, strict=True))
        case Transposed(map=SymmetricMap() as symmetric):
            return symmetric.mm(block)
    return stacked([map.mv(v) for v in unstacked(block)])


def stacked(vectors: list[Vec]) -> Block:
    """Vectors as one block."""
    return tuple(torch.stack(parts) for parts in zip(*vectors, strict=True))


def unstacked(block: Block) -> list[Vec]:
    """The vectors of a block."""
    return list(zip(*(t.unbind(0) for t in block), strict=True))


def to_rows(block: Block) -> Tensor:
    """A block as a matrix (k, n), one flattened vector a row."""
    return torch.cat([t.reshape(len(t), t.shape[1:].numel()) for t in block], dim=1)


def from_rows(rows: Tensor, like: Vec) -> Block:
    """The inverse of :func:`to_rows` for the shapes of ``like``."""
    parts = rows.split([t.numel() for t in like], dim=1)
    return tuple(part.reshape(len(rows), *t.shape) for part, t in zip(parts, like, strict=True))


def example_of(map: LinearMap, caller: str) -> Vec:
    """``map.like``, what the map acts on.

    Raises:
        ValueError: where the map takes vectors of any shape and none is stated.
    """
    if map.like is None:
        raise ValueError(
            f"{caller}: the map takes vectors of any shape; multiply it with one that states them, such as hessian(objective)"
        )
    return tuple(t.detach() for t in map.like)


def length(like: Vec) -> int:
    """n, the number of entries."""
    return sum(t.numel() for t in like)


def dense(map: LinearMap, chunk: int = 256) -> Tensor:
    """The matrix of a map, (m, n), from products with blocks of unit vectors."""
    like = example_of(map, "dense")
    n, flat = length(like), vec.flatten(like)
    columns = []
    for start in range(0, n, chunk):
        k = min(chunk, n - start)
        units = flat.new_zeros(k, n)
        units[torch.arange(k), torch.arange(start, start + k)] = 1
        columns.append(to_rows(apply_block(map, from_rows(units, like))))
    return torch.cat(columns).T if columns else flat.new_zeros(0, 0)
