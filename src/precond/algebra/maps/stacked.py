"""Maps of several blocks alike side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from precond.algebra import vec
from precond.algebra.maps.base import LinearMap, Piecewise
from precond.algebra.vec import Scalar, Vec


class StackedBlocks(Protocol):
    """What puts tensors of several blocks side by side, and takes them apart: :class:`precond.optim.blocks.Stack`."""

    @property
    def all_tensors(self) -> Vec: ...

    def gathered(self, v: Sequence[Tensor]) -> Vec: ...

    def scattered(self, v: Vec) -> Vec: ...


class OfMembers(Piecewise):
    """A map of stacked tensors, (k, …), on the tensors of all members one after the other.

    Args:
        map: of the stacked tensors.
        stack: which tensors are stacked.
    """

    like: Vec

    def __init__(self, map: LinearMap, stack: StackedBlocks):
        self.map, self.stack, self.root, self.diagonal = map, stack, map.root, map.diagonal
        self.like = stack.all_tensors

    def _each(self, method: str, v: Vec) -> Vec:
        return self.stack.scattered(getattr(self.map, method)(self.stack.gathered(v)))

    def conjugated(self, v: Vec, scales: Sequence[Scalar]) -> Vec:
        stacked = self.stack.gathered(v)
        members = [scales[j :: len(stacked)] for j in range(len(stacked))]
        each = [s[0] if vec.uniform(s) else _column(s, t) for s, t in zip(members, stacked, strict=True)]
        return self.stack.scattered(self.map.conjugated(stacked, each))

    def damped(self, delta: float) -> LinearMap:
        return self if delta == 0 else OfMembers(self.map.damped(delta), self.stack)

    def bounded(self, t: Scalar) -> LinearMap:
        return OfMembers(self.map.bounded(t), self.stack)

    @property
    def T(self) -> LinearMap:
        return OfMembers(self.map.T, self.stack)


def _column(scales: Sequence[Scalar], like: Tensor) -> Tensor:
    """A number for each member, (k, 1, …)."""
    each = [torch.as_tensor(s, dtype=like.dtype, device=like.device) for s in scales]
    return torch.stack(each).view(-1, *[1] * (like.ndim - 1))


class Vectorized(Piecewise):
    """A map of one block's tensors, on stacked ones, (k, …): by ``torch.vmap``.

    Args:
        run: runs a function of a block's map and further vectors for all members at once.
        of: the map of a block, from what ``run`` gives it.
        like: example of the stacked tensors.
        root, diagonal: as of any map.
    """

    like: Vec

    def __init__(
        self,
        run: Callable[[Callable[..., Vec], Vec], Vec],
        like: Vec,
        root: bool,
        diagonal: bool,
        change: Callable[[LinearMap], LinearMap] = lambda P: P,
    ):
        self.run, self.like, self.root, self.diagonal, self.change = run, like, root, diagonal, change

    def _each(self, method: str, v: Vec) -> Vec:
        return self.run(lambda P, v: getattr(self.change(P), method)(v), v)

    def _changed(self, f: Callable[[LinearMap], LinearMap]) -> Vectorized:
        before = self.change
        return Vectorized(self.run, self.like, self.root, self.diagonal, lambda P: f(before(P)))

    def damped(self, delta: float) -> LinearMap:
        return self if delta == 0 else self._changed(lambda P: P.damped(delta))

    def bounded(self, t: Scalar) -> LinearMap:
        return self._changed(lambda P: P.bounded(t))

    @property
    def T(self) -> LinearMap:
        return self._changed(lambda P: P.T)
