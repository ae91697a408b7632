"""Tensors that ranks hold in pieces or as copies, brought whole to one of them, and its results brought back: a call each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch.distributed as dist
from torch import Tensor

from precond.algebra import collectives
from precond.optim.ranks.pieces import Pieces


@dataclass(frozen=True)
class _Route:
    """Who sends what of some tensors: made once, since steps have the same ones.

    Attributes:
        owned: of each rank the tensors that it owns.
        gives: to each rank, the tensors of which this one has pieces for it.
        takes: of each rank, (tensor, numbers) of its pieces for this one.
        received: of each rank, (tensor, numbers) of this one's pieces of what it owns.
    """

    owned: list[list[int]]
    gives: list[list[int]]
    takes: list[list[tuple[int, int]]]
    received: list[list[tuple[int, int]]]

    @classmethod
    def of(cls, which: Sequence[int], exchange: Exchange) -> _Route:
        me, pieces = exchange.rank, exchange.pieces
        ranks = range(exchange.size)
        owned = [[i for i in which if exchange.owners[i] == r] for r in ranks]
        size = lambda i, r: math.prod(pieces[i].shape(r))  # noqa: E731
        return cls(
            owned,
            [[i for i in of if r != me and pieces[i].sends(me, r)] for r, of in enumerate(owned)],
            [[(i, size(i, r)) for i in owned[me] if r != me and pieces[i].sends(r, me)] for r in ranks],
            [[(i, size(i, me)) for i in of if r != me] for r, of in enumerate(owned)],
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
        found = self._swap([[parts[i] for i in of] for of in route.gives], route.takes, parts)
        every: dict[int, list[Tensor | None]] = {i: [None] * self.size for i in route.owned[self.rank]}
        for r, i, t in found:
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
        gives = [[split[i][r] for i in own] if r != self.rank else [] for r in range(self.size)]
        found = self._swap(gives, route.received, like)
        out = {i: split[i][self.rank].reshape(self._shape(i)) for i in own}
        return out | {i: t.view(self._shape(i)) for _, i, t in found}

    def _shape(self, i: int) -> tuple[int, ...]:
        """Of this rank's piece."""
        return self.pieces[i].shape(self.rank)

    def _swap(
        self,
        gives: Sequence[Sequence[Tensor]],
        takes: Sequence[Sequence[tuple[int, int]]],
        like: Mapping[int, Tensor],
    ) -> Iterator[tuple[int, int, Tensor]]:
        """(rank, tensor, its flat piece) of what others give for what this rank gives.

        Args:
            gives: to each rank.
            takes: of each rank (tensor, numbers).
        """
        example = next(iter(like.values()))
        numbers = [[n for _, n in of] for of in takes]
        every = collectives.all_to_all(gives, list(map(sum, numbers)), example, "gradients and steps", self.group)
        for r, (of, sizes, flat) in enumerate(zip(takes, numbers, every, strict=True)):
            for (i, _), t in zip(of, flat.split(sizes) if sizes else (), strict=True):
                yield r, i, t

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
