"""Which entries of a tensor each rank holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from typing import Any

import torch.distributed as dist
from torch import Tensor

from precond.algebra.sharding import divided


@dataclass(frozen=True)
class Pieces:
    """Which entries of a tensor each rank of a group holds.

    Attributes:
        group: the ranks.
        boxes: of each rank, in the group's order, a slice of each dimension.
        copies: of each rank a name of the copy that its piece belongs to: the pieces of one copy make the tensor once.
    """

    group: dist.ProcessGroup
    boxes: tuple[tuple[slice, ...], ...]
    copies: tuple[tuple[int, ...], ...]

    @classmethod
    def whole(cls, shape: Sequence[int], group: dist.ProcessGroup) -> Pieces:
        """Of a tensor that each rank holds all of."""
        ranks = range(dist.get_world_size(group))
        return cls(group, tuple(tuple(slice(0, n) for n in shape) for _ in ranks), tuple((r,) for r in ranks))

    @classmethod
    def of(cls, param: Any) -> Pieces:
        """Of a DTensor.

        Raises:
            ValueError: where it is divided otherwise than along its dimensions.
        """
        mesh, placements, shape = param.device_mesh, param.placements, tuple(param.shape)
        group = group_of(mesh)
        along = [None if p.is_replicate() else getattr(p, "dim", None) for p in placements]
        if any(dim is None and not p.is_replicate() for dim, p in zip(along, placements, strict=True)):
            raise ValueError(f"a parameter of shape {shape} is placed as {placements}: only Shard and Replicate are understood")
        # FSDP divides what tensor parallelism has divided already: the mesh's last dimension comes first then.
        strided = any(type(p).__name__ == "_StridedShard" for p in placements)
        order = range(mesh.ndim - 1, -1, -1) if strided else range(mesh.ndim)
        boxes: dict[int, tuple[slice, ...]] = {}
        copies: dict[int, tuple[int, ...]] = {}
        for place in product(*(range(n) for n in mesh.shape)):
            rank = dist.get_group_rank(group, int(mesh.mesh[place]))
            box = [slice(0, n) for n in shape]
            for i in order:
                if (dim := along[i]) is not None:
                    box[dim] = _chunk(box[dim], mesh.shape[i], place[i])
            boxes[rank] = tuple(box)
            copies[rank] = tuple(c for c, dim in zip(place, along, strict=True) if dim is None)
        ranks = range(len(boxes))
        pieces = cls(group, tuple(boxes[r] for r in ranks), tuple(copies[r] for r in ranks))
        if pieces.shape(dist.get_rank(group)) != tuple(param.to_local().shape):
            raise ValueError(
                f"a parameter of shape {shape} is placed as {placements} on {mesh}, in pieces of other shapes than expected"
            )
        return pieces

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The processes of the group, by their ranks among all: groups of the same ones are one."""
        return tuple(dist.get_process_group_ranks(self.group))

    @cached_property
    def rank(self) -> int:
        """This process's rank in the group."""
        return dist.get_rank(self.group)

    @cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        return [tuple(s.stop - s.start for s in box) for box in self.boxes]

    def shape(self, rank: int) -> tuple[int, ...]:
        """The shape of a rank's piece."""
        return self._shapes[rank]

    @cached_property
    def _numbers(self) -> list[int]:
        """Of each rank's piece."""
        return list(map(math.prod, self._shapes))

    def sends(self, rank: int, to: int) -> bool:
        """Whether a rank's piece is one of those that another rank makes the tensor of: those of its own copy."""
        return self.copies[rank] == self.copies[to]

    @cached_property
    def copied(self) -> bool:
        """Whether each rank holds all of it."""
        return len(set(self.copies)) == len(self.copies)

    @cached_property
    def in_order(self) -> bool:
        """Whether the ranks' pieces one after the other are the tensor, as where each holds some of its rows."""
        if len(set(self.copies)) > 1 or not self.boxes[0]:
            return False
        rows = [box[0] for box in self.boxes]
        return len({box[1:] for box in map(_hashable, self.boxes)}) == 1 and all(a.stop == b.start for a, b in pairwise(rows))

    def joined(self, parts: Sequence[Tensor | None], shape: Sequence[int]) -> Tensor:
        """The whole from the flat pieces of ranks; None of those of another copy."""
        known = [(box, t) for box, t in zip(self.boxes, parts, strict=True) if t is not None]
        out = known[0][1].new_empty(tuple(shape))
        for box, t in known:
            piece = out[box]
            piece.copy_(t.view(piece.shape))
        return out

    def parted(self, whole: Tensor) -> Sequence[Tensor]:
        """The pieces of each rank; flat, where they are one after the other in memory."""
        if self.in_order and whole.is_contiguous():
            return whole.view(-1).split_with_sizes(self._numbers)
        return [whole[box] for box in self.boxes]


def group_of(mesh: Any) -> dist.ProcessGroup:
    """All ranks of a mesh."""
    if mesh.ndim == 1:
        return mesh.get_group()
    world = dist.group.WORLD
    return world if world is not None and mesh.size() == dist.get_world_size() else mesh._flatten().get_group()


def held_by(param: Tensor, replicas: dist.ProcessGroup | None) -> Pieces | None:
    """Who holds which part of a parameter; None where this process alone is known to hold it, and not as a DTensor.

    Args:
        replicas: processes that hold copies of it, as under DDP.
    """
    if divided(param):
        pieces = Pieces.of(param)
    elif replicas is not None:
        pieces = Pieces.whole(param.shape, replicas)
    else:
        return None
    return pieces if divided(param) or len(pieces.boxes) > 1 else None


def _hashable(box: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((s.start, s.stop) for s in box)


def _chunk(s: slice, parts: int, k: int) -> slice:
    """The k-th part of a range, as torch.chunk divides it."""
    size = -(-(s.stop - s.start) // parts)
    start = min(s.start + k * size, s.stop)
    return slice(start, min(start + size, s.stop))
