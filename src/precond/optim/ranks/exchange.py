"""Tensors that ranks hold in pieces or as copies, brought whole to one of them, and its results brought back: a call each."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from precond.algebra import collectives
from precond.algebra.memory import FRESH, Memory, joined
from precond.optim.ranks.pieces import Pieces


@dataclass(frozen=True)
class _Route:
    """Who sends what of some tensors: made once, since steps have the same ones.

    Attributes:
        owned: of each rank the tensors that it owns.
        numbers: of each rank how many numbers these have.
        gives: to each rank, the tensors of which this one has pieces for it.
        takes: of each rank, by tensors, how many numbers its pieces for this one have.
        received: of each rank, by tensors, how many this one's pieces have of what it owns.
    """

    owned: list[list[int]]
    numbers: list[int]
    gives: list[list[int]]
    takes: list[dict[int, int]]
    received: list[dict[int, int]]

    @classmethod
    def of(cls, which: Sequence[int], exchange: Exchange) -> _Route:
        me, pieces = exchange.rank, exchange.pieces
        ranks = range(exchange.size)
        owned = [[i for i in which if exchange.owners[i] == r] for r in ranks]
        size = lambda i, r: math.prod(pieces[i].shape(r))  # noqa: E731
        return cls(
            owned,
            [sum(math.prod(exchange.shapes[i]) for i in of) for of in owned],
            [[i for i in of if r != me and pieces[i].sends(me, r)] for r, of in enumerate(owned)],
            [{i: size(i, r) for i in owned[me] if r != me and pieces[i].sends(r, me)} for r in ranks],
            [{i: size(i, me) for i in of if r != me} for r, of in enumerate(owned)],
        )


class Note(NamedTuple):
    """What each rank tells all together with what it delivers.

    Attributes:
        mine: flat, of the dtype and device of what is delivered.
        sizes: how many numbers each rank tells.
    """

    mine: Tensor
    sizes: Sequence[int]


_NOTE = -1
"""A note's place among tensors, which are numbered from 0."""


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
    _routes: dict[tuple[int, ...] | None, _Route] = field(default_factory=dict, repr=False)

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

    def _route(self, which: Collection[int]) -> _Route:
        """Who sends what of some tensors."""
        key = None if len(which) == len(self.shapes) else tuple(sorted(which))
        if key not in self._routes:
            self._routes[key] = _Route.of(sorted(which), self)
        return self._routes[key]

    def collect(self, parts: Mapping[int, Tensor], memory: Memory = FRESH) -> dict[int, Tensor]:
        """The whole tensors that this rank owns, from the pieces that each holds (of the same tensors everywhere)."""
        route = self._route(parts)
        if self.copied:
            return {i: parts[i] for i in route.owned[self.rank]}
        first = next(iter(parts.values()))
        found = self._swap([[parts[i] for i in of] for of in route.gives], route.takes, first, memory)
        own = route.owned[self.rank]
        found[self.rank] = {i: parts[i].reshape(-1) for i in own}
        in_order = [i for i in own if self.pieces[i].in_order]
        out = {
            i: self.pieces[i].joined([of.get(i) for of in found], self.shapes[i]) for i in own if not self.pieces[i].in_order
        }
        if in_order:  # of all of them at once
            flat = joined([t for i in in_order for of in found if (t := of.get(i)) is not None], memory, "whole", first)
            shapes = [tuple(self.shapes[i]) for i in in_order]
            each = zip(in_order, flat.split_with_sizes(list(map(math.prod, shapes))), shapes, strict=True)
            out |= {i: t.view(shape) for i, t, shape in each}
        return out

    def deliver(
        self, wholes: Mapping[int, Tensor], like: Mapping[int, Tensor], note: Note | None = None, memory: Memory = FRESH
    ) -> tuple[dict[int, Tensor], list[Tensor]]:
        """This rank's pieces, shaped ``like`` others, of the whole tensors that each rank has of those it owns; and each rank's note."""
        route, me = self._route(like), self.rank
        own = route.owned[me]
        first = next(iter(like.values()))
        mine, sizes = ([note.mine], note.sizes) if note is not None else ([], [0] * self.size)
        takes = [
            of | {_NOTE: n} if mine and r != me else of for r, (of, n) in enumerate(zip(route.received, sizes, strict=True))
        ]
        if self.copied:
            all_of_mine = [wholes[i] for i in own] + mine or [first.new_empty(0)]
            numbers = [n + more for n, more in zip(route.numbers, sizes, strict=True)]
            found = _apart(collectives.share(all_of_mine, numbers, "steps", self.group, memory), takes)
            out = {i: wholes[i] for i in own}
        else:
            split = {i: self.pieces[i].parted(wholes[i]) for i in own}
            gives = [[split[i][r] for i in own] + mine if r != me else [] for r in range(self.size)]
            found = self._swap(gives, takes, first, memory)
            out = {i: split[i][me].reshape(self._shapes[i]) for i in own}
        # Of memory of their own: who keeps a note is not to keep all that was delivered.
        notes = [of.pop(_NOTE).clone() if r != me else first.new_empty(0) for r, of in enumerate(found)] if mine else []
        return out | {i: t.view(self._shapes[i]) for of in found for i, t in of.items()}, notes

    @cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        """Of this rank's pieces."""
        return [p.shape(self.rank) for p in self.pieces]

    def _swap(
        self, gives: Sequence[Sequence[Tensor]], takes: Sequence[Mapping[int, int]], like: Tensor, memory: Memory
    ) -> list[dict[int, Tensor]]:
        """What others give for what this rank gives, flat, of each rank by tensors.

        Args:
            gives: to each rank.
            takes: of each rank, of each tensor so many numbers.
        """
        numbers = [sum(of.values()) for of in takes]
        every = collectives.all_to_all(gives, numbers, like, "gradients and steps", self.group, memory)
        return _apart(every, takes)


def _apart(every: Sequence[Tensor], takes: Sequence[Mapping[int, int]]) -> list[dict[int, Tensor]]:
    """What each rank gave, flat, by tensors, of each so many numbers."""
    return [
        dict(zip(of, flat.split_with_sizes(list(of.values())), strict=True)) if of else {}
        for flat, of in zip(every, takes, strict=True)
    ]


def balanced(costs: Sequence[float], size: int, loads: Sequence[float] = ()) -> list[int]:
    """The owner of each piece of work: the largest first, to who has the least; ties go to the lowest rank."""
    held = list(loads) or [0.0] * size
    owners = [0] * len(costs)
    for k in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        owners[k] = min(range(size), key=lambda r: (held[r], r))
        held[owners[k]] += costs[k]
    return owners
