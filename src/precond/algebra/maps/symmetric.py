"""Kronecker products that are given by their Gram matrix, maps whose root is not stated, and matrices cut into tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from precond.algebra.maps.base import LinearMap, Piecewise
from precond.algebra.maps.dense import Kronecker, _mean_inverse, sides_of
from precond.algebra.maps.diagonal import InverseRoot
from precond.algebra.maps.eigen import eigenpairs
from precond.algebra.vec import Vec


class SymmetricKronecker(LinearMap):
    """P = (A ⊗ B)^(1/2), given by M = A ⊗ B with symmetric positive A, B, on one tensor W seen row-major as a matrix (out, rest).

    M vec(W) = vec(A W B) takes no root; P is symmetric, and taken by eigendecompositions only when asked for. None stands for the
    identity on that side. Sides (k, n, n) act on k matrices side by side, W (k, out, …). Where A or B is singular, ``solve`` is the
    pseudo-inverse.

    Args:
        A: (out, out), or (k, out, out), or None.
        B: (rest, rest), or (k, rest, rest), or None.
        like: example (W,), which :meth:`damped` and :meth:`to_dense` need.

    Example:
        >>> P = SymmetricKronecker(torch.diag(torch.tensor([4.0, 1.0])), None)
        >>> P.gram((torch.ones(2, 1),))[0].T, P.mv((torch.ones(2, 1),))[0].T
        (tensor([[4., 1.]]), tensor([[2., 1.]]))
    """

    def __init__(self, A: Tensor | None, B: Tensor | None, like: Vec | None = None):
        self.A, self.B, self.like = A, B, like
        self.from_left = B is None

    @cached_property
    def _eigen(self) -> list[tuple[Tensor, Tensor] | None]:
        return [None if X is None else eigenpairs(X) for X in (self.A, self.B)]

    def _power(self, power: float, v: Vec) -> Vec:
        left, right = (None if eigen is None else _powered(*eigen, power) for eigen in self._eigen)
        return Kronecker(left, right).mv(v)

    def mv(self, v: Vec) -> Vec:
        return self._power(0.5, v)

    rmv = mv

    def solve(self, v: Vec) -> Vec:
        return self._power(-0.5, v)

    rsolve = solve

    def gram(self, v: Vec) -> Vec:
        return Kronecker(self.A, self.B).mv(v)

    def damped(self, delta: float) -> LinearMap:
        if delta == 0:
            return self
        if self.like is None:
            raise ValueError("SymmetricKronecker: give `like` to damp it")
        (W,) = self.like
        (a, U), (b, V) = sides_of(W, *self._eigen)
        m = (a[..., :, None] * b[..., None, :]).clamp_min(0)  # what is singular may have rounded below zero
        rotation = Kronecker(U, V, self.like)
        return rotation @ InverseRoot(((1 / m + delta * _mean_inverse(m, 2)).reshape(W.shape),)) @ rotation.T

    @property
    def T(self) -> LinearMap:
        return self


def _powered(values: Tensor, V: Tensor, power: float) -> Tensor:
    """A power of a symmetric positive matrix; eigenvalues that are zero to rounding stay zero."""
    n = values.shape[-1]
    least = values.amax(-1, keepdim=True) * n * torch.finfo(values.dtype).eps if n else 0.0
    some = values > least
    return (V * torch.where(some, torch.where(some, values, 1.0) ** power, 0.0)[..., None, :]) @ V.mT


class Unrooted(LinearMap):
    """The Gram matrix of a map, of which no root is stated: what needs one is refused.

    Args:
        map: a map whose M is meant.

    Raises:
        ValueError: where P itself, its transpose or its inverse is asked for.

    Example:
        >>> import torch, precond
        >>> M = Unrooted(precond.Diagonal((torch.tensor([2.0]),)))
        >>> M.gram((torch.tensor([1.0]),)), M.root
        ((tensor([4.]),), False)
    """

    root = False

    def __init__(self, map: LinearMap):
        self.map, self.like = map, map.like

    def _refuse(self, v: Vec) -> Vec:
        raise ValueError("this preconditioner states M = P Pᵀ and no root P; use space='p', or a penalty that M alone serves")

    mv = rmv = solve = rsolve = _refuse

    def gram(self, v: Vec) -> Vec:
        return self.map.gram(v)

    def gram_solve(self, v: Vec) -> Vec:
        return self.map.gram_solve(v)

    def damped(self, delta: float) -> LinearMap:
        return self if delta == 0 else Unrooted(self.map.damped(delta))


class Tiled(Piecewise):
    """One tensor, seen as a matrix (out, rest) that is cut into tiles, with a map for each.

    Args:
        tiles: (rows, columns, a map of one tensor of that shape), in the order of rows and then of columns.
        like: example of the tensor.
        stacked: whether it is several tensors side by side, (k, out, …).

    Example:
        >>> import torch, precond
        >>> left, right = precond.Scaled(precond.Identity(), 1.0), precond.Scaled(precond.Identity(), 2.0)
        >>> rows, W = slice(0, 1), (torch.tensor([[1.0, 1.0, 1.0]]),)
        >>> Tiled([(rows, slice(0, 1), left), (rows, slice(1, 3), right)], W).mv(W)
        (tensor([[1., 2., 2.]]),)
    """

    like: Vec

    def __init__(self, tiles: Sequence[tuple[slice, slice, LinearMap]], like: Vec, stacked: bool = False):
        self.tiles, self.like, self.stacked = tuple(tiles), like, stacked
        self.root, self.diagonal = all(m.root for *_, m in tiles), all(m.diagonal for *_, m in tiles)

    def _each(self, method: str, v: Vec) -> Vec:
        (W,) = v
        X = W.flatten(2) if self.stacked else W.reshape(W.shape[0], -1)
        strips: dict[int, list[Tensor]] = {}
        for rows, columns, tile in self.tiles:
            strips.setdefault(rows.start, []).extend(getattr(tile, method)((X[..., rows, columns],)))
        return (
            torch.cat([pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1) for pieces in strips.values()], -2).view(
                W.shape
            ),
        )

    def _of(self, f: Callable[[LinearMap], LinearMap]) -> Tiled:
        return Tiled([(r, c, f(m)) for r, c, m in self.tiles], self.like, self.stacked)

    def damped(self, delta: float) -> LinearMap:
        return self if delta == 0 else self._of(lambda m: m.damped(delta))

    @property
    def T(self) -> LinearMap:
        return self._of(lambda m: m.T)
