"""Tensors that ranks hold in pieces or as copies, brought whole to one of them, and its results brought back: a call each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from precond.algebra import collectives
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

    def shape(self, rank: int) -> tuple[int, ...]:
        """The shape of a rank's piece."""
        return tuple(s.stop - s.start for s in self.boxes[rank])

    def sends(self, rank: int, to: int) -> bool:
        """Whether a rank's piece is one of those that another rank makes the tensor of: those of its own copy."""
        return self.copies[rank] == self.copies[to]

    @cached_property
    def copied(self) -> bool:
        """Whether each rank holds all of it."""
        return len(set(self.copies)) == len(self.copies)


def group_of(mesh: Any) -> dist.ProcessGroup:
    """All ranks of a mesh."""
    if mesh.ndim == 1:
        return mesh.get_group()
    world = dist.group.WORLD
    return world if world is not None and mesh.size() == dist.get_world_size() else mesh._flatten().get_group()


def held_by(param: Tensor, replicas: dist.ProcessGroup | None) -> Pieces | None:
    """Who holds which part of a parameter; None where this process alone is known to hold it.

    Args:
        replicas: processes that hold copies of it, as under DDP.
    """
    if divided(param):
        pieces = Pieces.of(param)
    elif replicas is not None:
        pieces = Pieces.whole(param.shape, replicas)
    else:
        return None
    return pieces if len(pieces.boxes) > 1 else None


def _chunk(s: slice, parts: int, k: int) -> slice:
    """The k-th part of a range, as torch.chunk divides it."""
    size = -(-(s.stop - s.start) // parts)
    start = min(s.start + k * size, s.stop)
    return slice(start, min(start + size, s.stop))


@dataclass
class Exchange:
    """Brings vectors to the owners of their tensors, and back.

    Args:
        shapes: of the whole tensors.
        pieces: who holds what of each; the groups are one.
        owners: the owner of each, its rank in the group.
    """

    shapes: Sequence[Sequence[int]]
    pieces: Sequence[Pieces]
    owners: Sequence[int]
    _mine: dict[tuple[int, ...], list[list[int]]] = field(default_factory=dict, repr=False)

    @cached_property
    def group(self) -> dist.ProcessGroup:
        return self.pieces[0].group

    @cached_property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @cached_property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @cached_property
    def copied(self) -> bool:
        """Whether each rank holds all of every tensor, so that owners need nothing from others."""
        return all(p.copied for p in self.pieces)

    def _owned(self, which: Sequence[int]) -> list[list[int]]:
        """Of each rank what it owns of some tensors."""
        key = tuple(which)
        if key not in self._mine:
            self._mine[key] = [[i for i in which if self.owners[i] == r] for r in range(self.size)]
        return self._mine[key]

    def collect(self, parts: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The whole tensors that this rank owns, from the pieces that each holds (of the same tensors everywhere)."""
        owned = self._owned(sorted(parts))
        mine = owned[self.rank]
        if self.copied:
            return {i: parts[i] for i in mine}
        gives = [[i for i in of if self.pieces[i].sends(self.rank, r)] for r, of in enumerate(owned)]
        takes = [[i for i in mine if self.pieces[i].sends(r, self.rank)] for r in range(self.size)]
        found = self._swap(
            parts,
            [[parts[i] for i in of] for of in gives],
            [[self.pieces[i].shape(r) for i in of] for r, of in enumerate(takes)],
        )
        out = {i: parts[i].new_empty(self.shapes[i]) for i in mine}
        for r, (of, tensors) in enumerate(zip(takes, found, strict=True)):
            for i, t in zip(of, tensors, strict=True):
                out[i][self.pieces[i].boxes[r]] = t
        return out

    def deliver(self, wholes: Mapping[int, Tensor], like: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """This rank's pieces, shaped ``like`` others, of the whole tensors that each rank has of those it owns."""
        owned = self._owned(sorted(like))
        if self.copied:
            return self._spread(wholes, like, owned)
        gives = [[wholes[i][self.pieces[i].boxes[r]] for i in owned[self.rank]] for r in range(self.size)]
        found = self._swap(like, gives, [[self.pieces[i].shape(self.rank) for i in of] for of in owned])
        return {i: t for of, tensors in zip(owned, found, strict=True) for i, t in zip(of, tensors, strict=True)}

    def _swap(
        self, like: Mapping[int, Tensor], gives: list[list[Tensor]], shapes: list[list[tuple[int, ...]]]
    ) -> list[list[Tensor]]:
        """Tensors for each rank, exchanged for those of the shapes named that each has for this one."""
        example = next(iter(like.values()))
        sizes = [[math.prod(shape) for shape in of] for of in shapes]
        flat = [t.reshape(-1) for of in gives for t in of]
        sent = torch.cat(flat) if flat else example.new_empty(0)
        taken = example.new_empty(sum(map(sum, sizes)))
        collectives.all_to_all(
            taken,
            sent,
            [sum(n) for n in sizes],
            [sum(t.numel() for t in of) for of in gives],
            "gradients and steps",
            self.group,
        )
        pieces = iter(taken.split([n for of in sizes for n in of]))
        return [[next(pieces).view(shape) for shape in of] for of in shapes]

    def _spread(self, wholes: Mapping[int, Tensor], like: Mapping[int, Tensor], owned: list[list[int]]) -> dict[int, Tensor]:
        """Whole tensors of every owner, to all."""
        sizes = [[math.prod(self.shapes[i]) for i in of] for of in owned]
        mine = [wholes[i] for i in owned[self.rank]] or [next(iter(like.values())).new_empty(0)]
        every = collectives.share(mine, [sum(n) for n in sizes], "steps", self.group)
        out = {i: wholes[i] for i in owned[self.rank]}
        for r, (of, n, flat) in enumerate(zip(owned, sizes, every, strict=True)):
            if r != self.rank:
                out |= {i: t.view(tuple(self.shapes[i])) for i, t in zip(of, flat.split(n), strict=True)}
        return out


def dealt(costs: Sequence[float], size: int, loads: Sequence[float] = ()) -> list[int]:
    """The owner of each piece of work: the largest first, to who has the least; ties go to the lowest rank."""
    held = list(loads) or [0.0] * size
    owners = [0] * len(costs)
    for k in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        owners[k] = min(range(size), key=lambda r: (held[r], r))
        held[owners[k]] += costs[k]
    return owners
