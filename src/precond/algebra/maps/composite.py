"""Maps made of maps."""

from __future__ import annotations

from collections.abc import Sequence

from precond.algebra import vec
from precond.algebra.maps.base import Identity, LinearMap, Piecewise
from precond.algebra.maps.dense import Dense
from precond.algebra.maps.diagonal import Diagonal
from precond.algebra.vec import Scalar, Vec


class Product(LinearMap):
    """P = P₁P₂: p = P₁z₁, z₁ = P₂z₂.

    Args:
        outer: P₁.
        inner: P₂.

    Example:
        >>> import torch, precond
        >>> P1, P2 = precond.Dense(torch.tensor([[0.0, 1.0], [1.0, 0.0]])), precond.Diagonal((torch.tensor([1.0, 3.0]),))
        >>> precond.Product(P1, P2).mv((torch.tensor([1.0, 1.0]),))
        (tensor([3., 1.]),)
    """

    def __init__(self, outer: LinearMap, inner: LinearMap):
        self.outer, self.inner = outer, inner
        self.like = inner.like if inner.like is not None else outer.like
        self.root, self.diagonal = outer.root and inner.root, outer.diagonal and inner.diagonal

    def mv(self, v: Vec) -> Vec:
        return self.outer.mv(self.inner.mv(v))

    def rmv(self, v: Vec) -> Vec:
        return self.inner.rmv(self.outer.rmv(v))

    def solve(self, v: Vec) -> Vec:
        return self.inner.solve(self.outer.solve(v))

    def rsolve(self, v: Vec) -> Vec:
        return self.outer.rsolve(self.inner.rsolve(v))

    def gram(self, v: Vec) -> Vec:
        return self.outer.mv(self.inner.gram(self.outer.rmv(v)))

    def gram_solve(self, v: Vec) -> Vec:
        return self.outer.rsolve(self.inner.gram_solve(self.outer.solve(v)))

    def _conjugated(self, v: Vec, scales: Sequence[Scalar]) -> Vec:
        return self.outer.mv(self.inner.conjugated(self.outer.solve(v), scales))

    def damped(self, delta: float) -> LinearMap:
        # In the coordinates of the outer map: there the entries live whose tiny denominators the damping is for.
        return self if delta == 0 else self.outer @ self.inner.damped(delta)

    @property
    def T(self) -> LinearMap:
        return Product(self.inner.T, self.outer.T)


class BlockDiagonal(Piecewise):
    """Maps side by side: each acts on the tensors at its own positions.

    Args:
        blocks: pairs (positions, map).
        like: example of all tensors.
        rest: the map of the tensors at positions that none names, one that takes any shape; None: they are left as they are.

    Example:
        >>> import torch, precond
        >>> P = precond.BlockDiagonal([([1], precond.Diagonal((torch.tensor([5.0]),)))])
        >>> P.mv((torch.tensor([1.0]), torch.tensor([1.0])))
        (tensor([1.]), tensor([5.]))
    """

    def __init__(
        self, blocks: Sequence[tuple[Sequence[int], LinearMap]], like: Vec | None = None, rest: LinearMap | None = None
    ):
        self.blocks, self.like = tuple((tuple(i), m) for i, m in blocks), like
        self.rest = Identity() if rest is None else rest
        self.root = all(m.root for _, m in self.blocks)
        self.diagonal = all(m.diagonal for _, m in self.blocks)

    def _each(self, method: str, *each: Sequence[Scalar]) -> Vec:
        out = list(getattr(self.rest, method)(*each))
        for positions, block in self.blocks:
            own = getattr(block, method)(*(tuple(x[i] for i in positions) for x in each))
            for i, t in zip(positions, own, strict=True):
                out[i] = t
        return tuple(out)

    def conjugated(self, v: Vec, scales: Sequence[Scalar]) -> Vec:
        return self._each("conjugated", v, scales)

    def damped(self, delta: float) -> LinearMap:
        return BlockDiagonal([(i, m.damped(delta)) for i, m in self.blocks], self.like, self.rest.damped(delta))

    def bounded(self, t: Scalar) -> LinearMap:
        return BlockDiagonal([(i, m.bounded(t)) for i, m in self.blocks], self.like, self.rest)

    @property
    def T(self) -> LinearMap:
        return BlockDiagonal([(i, m.T) for i, m in self.blocks], self.like, self.rest.T)


def compose(a: LinearMap, b: LinearMap) -> LinearMap:
    """P = a b in the simplest form: identities vanish, diagonals and dense matrices are multiplied out.

    Args:
        a: P₁, applied last.
        b: P₂.

    Example:
        >>> import torch, precond
        >>> D = precond.Diagonal((torch.tensor([2.0]),))
        >>> compose(D, D).d, compose(D, precond.Identity()) is D
        ((tensor([4.]),), True)
    """
    if isinstance(a, Identity):
        return b
    if isinstance(b, Identity):
        return a
    match a, b:
        case Diagonal(), Diagonal():
            product = Diagonal(vec.mul(a.d, b.d))
            product.means = a.means
            return product
        case Dense(), Dense():
            return Dense(a.matrix @ b.matrix, a.like or b.like)
        case Dense(), Diagonal():
            return Dense(a.matrix * vec.flatten(b.d), b.like)
        case Diagonal(), Dense():
            return Dense(vec.flatten(a.d)[:, None] * b.matrix, a.like)
    return Product(a, b)


def block_diagonal(blocks: Sequence[tuple[Sequence[int], LinearMap]], like: Vec) -> LinearMap:
    """A block-diagonal map, or its only block where that block covers everything in order.

    Args:
        blocks: pairs (positions, map).
        like: example of all tensors.

    Returns:
        A :class:`BlockDiagonal`, or the map itself.

    Example:
        >>> import torch, precond
        >>> D, like = precond.Diagonal((torch.tensor([2.0]),)), (torch.ones(1),)
        >>> block_diagonal([((0,), D)], like) is D
        True
    """
    if len(blocks) == 1 and tuple(blocks[0][0]) == tuple(range(len(like))):
        return blocks[0][1]
    return BlockDiagonal(blocks, like)
