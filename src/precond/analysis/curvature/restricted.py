"""Parts of a map: what some of its tensors do to some of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from precond.algebra.maps import LinearMap
from precond.algebra.vec import Vec
from precond.analysis.curvature.graph_cache import GraphCache
from precond.analysis.curvature.operators import as_map
from precond.analysis.curvature.symmetric import Block, BlockMap, SymmetricMap, apply_block, example_of

Which = str | int | Iterable[str | int]


def restricted(map: Any, columns: Which, rows: Which | None = None) -> LinearMap:
    r"""The sub-matrix E_rᵀ A E_c of a map: A applied to vectors that are zero outside some tensors, of which some are looked at.

    Args:
        map: a map on tuples of tensors, such as ``hessian(objective)``.
        columns: which tensors are not zero: positions, or names of the objective's parameters and patterns of them (``"0.*"``).
        rows: which tensors are looked at; None: the same, and then the sub-matrix of a symmetric map is symmetric.

    Returns:
        A map on the chosen tensors, in the order of the map's. A principal sub-matrix of a curvature is that of the objective as a
        function of these parameters alone, whose graph is smaller.

    Raises:
        ValueError: for what the map does not act on.

    Example:
        >>> import torch
        >>> from precond.analysis.curvature import Objective, hessian
        >>> model = torch.nn.Linear(2, 1)
        >>> objective = Objective(model, torch.nn.MSELoss(), [(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 1))])
        >>> restricted(hessian(objective), "bias", "weight").to_dense()
        tensor([[2.],
                [6.]])
    """
    map = as_map(map, "restricted")
    like = example_of(map, "restricted")
    names = map.objective.names if isinstance(map, GraphCache) else ()
    at = _positions(columns, len(like), names, "columns")
    if rows is None and isinstance(map, SymmetricMap):
        if isinstance(map, GraphCache):
            return map.on(map.objective.only([names[i] for i in at]))
        return _Principal(map, at, at)
    return _Part(map, at, at if rows is None else _positions(rows, len(like), names, "rows"))


class _Part(BlockMap):
    def __init__(self, map: LinearMap, columns: Sequence[int], rows: Sequence[int]):
        self.map, self.columns, self.rows = map, tuple(columns), tuple(rows)
        self._whole = example_of(map, "restricted")
        self.like = tuple(self._whole[i] for i in columns)

    def mv(self, v: Vec) -> Vec:
        return self._taken(self.map.mv(self._filled(v, self.columns, ())), self.rows)

    def rmv(self, v: Vec) -> Vec:
        return self._taken(self.map.rmv(self._filled(v, self.rows, ())), self.columns)

    def mm(self, block: Block) -> Block:
        lead = block[0].shape[:1]
        return self._taken(apply_block(self.map, self._filled(block, self.columns, lead)), self.rows)

    @property
    def T(self) -> LinearMap:
        return _Part(self.map.T, self.rows, self.columns)

    def _filled(self, v: Vec, at: Sequence[int], lead: tuple[int, ...]) -> Vec:
        given = dict(zip(at, v, strict=True))
        return tuple(given[i] if i in given else t.new_zeros(*lead, *t.shape) for i, t in enumerate(self._whole))

    @staticmethod
    def _taken(v: Vec, at: Sequence[int]) -> tuple[Tensor, ...]:
        return tuple(v[i] for i in at)


class _Principal(_Part, SymmetricMap):
    rmv = _Part.mv

    @property
    def T(self) -> LinearMap:
        return self


def _positions(which: Which, count: int, names: Sequence[str], argument: str) -> list[int]:
    found: set[int] = set()
    for wanted in [which] if isinstance(which, str | int) else which:
        if isinstance(wanted, str):
            some = {i for i, name in enumerate(names) if fnmatchcase(name, wanted)}
            if not some:
                known = f"it has {', '.join(names)}" if names else "its tensors have no names; give positions"
                raise ValueError(f"restricted: {argument} names {wanted!r}, which the map does not act on; {known}")
        elif isinstance(wanted, int) and not isinstance(wanted, bool) and 0 <= wanted < count:
            some = {wanted}
        else:
            raise ValueError(f"restricted: {argument} must be names or positions in [0, {count}), got {wanted!r}")
        found |= some
    if not found:
        raise ValueError(f"restricted: {argument} is empty; give names or positions in [0, {count})")
    return sorted(found)
