"""Tensors that ranks hold in pieces or as copies, brought whole to one of them, and its results brought back: a call each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from precond.algebra import collectives
from precond.optim.ranks.pieces import Pieces


@dataclass(frozen=True)
class _Route:
    """Who sends what of some tensors: made once, since steps have the same ones.

    Attributes:
        owned: of each rank the tensors that it owns.
        gives: what this rank has pieces of for others, owner after owner; ``given`` are the numbers for each.
        takes: (rank, tensor, numbers) of the pieces of others for this one, rank after rank; ``taken`` are the numbers of each.
        returned, received: numbers of pieces of what it owns for each rank, and of what each owns for it.
        numbers: of this rank's piece of each tensor.
    """

    owned: list[list[int]]
    gives: list[int]
    given: list[int]
    takes: list[tuple[int, int, int]]
    taken: list[int]
    returned: list[int]
    received: list[int]
    numbers: dict[int, int]

    @classmethod
    def of(cls, which: Sequence[int], exchange: Exchange) -> _Route:
        me, pieces = exchange.rank, exchange.pieces
        ranks = range(exchange.size)
        owned = [[i for i in which if exchange.owners[i] == r] for r in ranks]
        size = lambda i, r: math.prod(pieces[i].shape(r))  # noqa: E731
        gives = [[i for i in of if r != me and pieces[i].sends(me, r)] for r, of in enumerate(owned)]
        takes = [[(r, i, size(i, r)) for i in owned[me] if r != me and pieces[i].sends(r, me)] for r in ranks]
        return cls(
            owned,
            [i for of in gives for i in of],
            [sum(size(i, me) for i in of) for of in gives],
            [piece for of in takes for piece in of],
            [sum(n for _, _, n in of) for of in takes],
            [0 if r == me else sum(size(i, r) for i in owned[me]) for r in ranks],
            [0 if r == me else sum(size(i, me) for i in of) for r, of in enumerate(owned)],
            {i: size(i, me) for i in which},
        )


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
    _routes: dict[tuple[int, ...], _Route] = field(default_factory=dict, repr=False)

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

    def _route(self, which: Iterable[int]) -> _Route:
        """Who sends what of some tensors."""
        key = tuple(which)
        if key not in self._routes:
            self._routes[key] = _Route.of(key, self)
        return self._routes[key]

    def collect(self, parts: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The whole tensors that this rank owns, from the pieces that each holds (of the same tensors everywhere)."""
        route = self._route(sorted(parts))
        if self.copied:
            return {i: parts[i] for i in route.owned[self.rank]}
        found = self._swap(parts, [parts[i] for i in route.gives], route.given, [n for _, _, n in route.takes], route.taken)
        every: dict[int, list[Tensor | None]] = {i: [None] * self.size for i in route.owned[self.rank]}
        for (r, i, _), t in zip(route.takes, found, strict=True):
            every[i][r] = t
        out = {}
        for i, of in every.items():
            if self.pieces[i].sends(self.rank, self.rank):
                of[self.rank] = parts[i].reshape(-1)
            out[i] = self.pieces[i].joined(of, self.shapes[i])
        return out

    def deliver(self, wholes: Mapping[int, Tensor], like: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """This rank's pieces, shaped ``like`` others, of the whole tensors that each rank has of those it owns."""
        route = self._route(sorted(like))
        if self.copied:
            return self._spread(wholes, like, route.owned)
        own = route.owned[self.rank]
        split = {i: self.pieces[i].parted(wholes[i]) for i in own}
        gives = [split[i][r] for r in range(self.size) if r != self.rank for i in own]
        others = [i for r, of in enumerate(route.owned) if r != self.rank for i in of]
        found = self._swap(like, gives, route.returned, [route.numbers[i] for i in others], route.received)
        out = {i: split[i][self.rank].reshape(self._shape(i)) for i in own}
        return out | {i: t.view(self._shape(i)) for i, t in zip(others, found, strict=True)}

    def _shape(self, i: int) -> tuple[int, ...]:
        """Of this rank's piece."""
        return self.pieces[i].shape(self.rank)

    def _swap(
        self, like: Mapping[int, Tensor], gives: Sequence[Tensor], given: list[int], numbers: Sequence[int], taken: list[int]
    ) -> Sequence[Tensor]:
        """Flat tensors of so many numbers each, from all others, for what this rank gives.

        Args:
            gives: rank after rank; ``given`` are their numbers for each.
            numbers: of what it takes, rank after rank; ``taken`` are those of each.
        """
        example = next(iter(like.values()))
        sent = torch.cat([t.reshape(-1) for t in gives]) if gives else example.new_empty(0)
        out = example.new_empty(sum(taken))
        collectives.all_to_all(out, sent, taken, given, "gradients and steps", self.group)
        return out.split(list(numbers)) if numbers else ()

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


def balanced(costs: Sequence[float], size: int, loads: Sequence[float] = ()) -> list[int]:
    """The owner of each piece of work: the largest first, to who has the least; ties go to the lowest rank."""
    held = list(loads) or [0.0] * size
    owners = [0] * len(costs)
    for k in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        owners[k] = min(range(size), key=lambda r: (held[r], r))
        held[owners[k]] += costs[k]
    return owners
