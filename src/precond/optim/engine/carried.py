"""P of what ranks step for each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from precond.algebra.maps import LinearMap
from precond.algebra.maps.base import Piecewise
from precond.algebra.vec import Scalar, Vec

if TYPE_CHECKING:
    from precond.optim.engine.sharing import Shared


class Carried(Piecewise):
    """P of shared cells: vectors go to owners, who have the maps, and come back. Every rank must call it."""

    def __init__(self, cell: Shared, maps: Mapping[int, LinearMap]):
        self.cell, self.maps, self.like = cell, maps, cell.block.tensors
        self.root = cell.preconditioner.states_root
        self.diagonal = cell.preconditioner.diagonal

    def _each(self, method: str, v: Vec) -> Vec:
        whole = self.cell.gather(v)
        return self.cell.scatter({k: getattr(m, method)(whole[k]) for k, m in self.maps.items()}, v)

    def damped(self, delta: float) -> LinearMap:
        return Carried(self.cell, {k: m.damped(delta) for k, m in self.maps.items()})

    def bounded(self, t: Scalar) -> LinearMap:
        return Carried(self.cell, {k: m.bounded(t) for k, m in self.maps.items()})
