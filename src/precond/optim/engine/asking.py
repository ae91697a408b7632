"""What owners want to be observed of layer inputs, told to all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from precond.algebra import collectives
from precond.optim.blocks import state_dtype
from precond.optim.engine.cells import Cell
from precond.optim.inputs import Request
from precond.optim.inputs.bundles import Layer
from precond.optim.inputs.observer import Key
from precond.optim.inputs.sites import Site
from precond.optim.ranks.exchange import Note
from precond.optim.ranks.pieces import Pieces

Delivered = TypeVar("Delivered")

Wish = tuple[str, Request, Tensor | None]
"""A site's name, what is to be observed there, and the mean known before."""


@dataclass
class Asking:
    """What the cells of a group of ranks ask for, each known to its owner.

    Args:
        cells: all, in the same order on every rank.
        owners: the rank in the group that owns each.
    """

    cells: Sequence[Cell]
    owners: Sequence[int]
    _made: dict[tuple[int, ...], Asked] = field(default_factory=dict, repr=False)
    _heard: tuple[list[int], list[Wish]] = field(default=([], []), repr=False)

    def __call__(self) -> list[Wish]:
        """What any owner asks for, on every rank: as it was told with the step just taken, or else told now."""
        steps, (known, wishes), self._heard = self._steps, self._heard, ([], [])
        if known == steps:
            return wishes
        if (asked := self._next(steps)) is None:
            return []
        every = collectives.all_gather_v(self._message(asked), asked.numbers, "what is to be observed", self._pieces.group)
        return asked.read(every)

    def along(self, deliver: Callable[[Note | None], tuple[Delivered, list[Tensor]]]) -> Delivered:
        """Deliver what a step has made, which is counted and has seen what it had to see, and with it what is asked for next."""
        steps = self._steps
        if (asked := self._next(steps)) is None:
            self._heard = steps, []
            return deliver(None)[0]
        note, rank = Note(self._message(asked), asked.numbers), self._pieces.rank
        found, every = deliver(note)
        self._heard = steps, asked.read([*every[:rank], note.mine, *every[rank + 1 :]])
        return found

    @property
    def _steps(self) -> list[int]:
        """How many each cell has made: a layer, or its bias alone, that was frozen for a while fewer than others."""
        return [min(cell.state.steps) for cell in self.cells]

    def _next(self, steps: Sequence[int]) -> Asked | None:
        """What may be asked for after so many steps of each cell, as all ranks know it; None: nothing."""
        kinds, turns = self._kinds
        busy = {
            (kind, t)
            for kind, t in set(zip(kinds, steps, strict=True))
            if not self.cells[kind].preconditioner.idle(t + 1, turns)
        }
        if not busy:
            return None
        asking = tuple(k for k, cell in enumerate(self.cells) if (kinds[k], steps[k]) in busy and cell.handled)
        asked = self._asked(asking)
        return asked if asked.keys else None

    def _message(self, asked: Asked) -> Tensor:
        """What this rank asks for, flat."""
        mine = (cell for k, cell in enumerate(self.cells) if self.owners[k] == self._pieces.rank)
        own = {(name, request): c for cell in mine for name, request, c in cell.wanted()}
        return asked.told(own, self.cells[0].leaves[0].tensor, self._pieces.rank)

    @cached_property
    def _kinds(self) -> tuple[list[int], set[int]]:
        """Of each cell the first one with its preconditioner; and the turns of all leaves."""
        first: dict[int, int] = {}
        kinds = [first.setdefault(id(cell.preconditioner), k) for k, cell in enumerate(self.cells)]
        return kinds, {leaf.turn for cell in self.cells for leaf in cell.leaves}

    @cached_property
    def statistics(self) -> list[tuple[Key, Layer]]:
        """The sites and requests of all cells, with what the statistics of each are like and which rank needs them."""
        return [
            ((site.name, request), Layer(*site.shape(request), request.kind == "covariance", owner))
            for cell, owner in zip(self.cells, self.owners, strict=True)
            if cell.handled
            for site, request in sites_of(cell)
        ]

    @cached_property
    def _pieces(self) -> Pieces:
        pieces = self.cells[0].leaves[0].pieces
        assert pieces is not None
        return pieces

    def _asked(self, asking: tuple[int, ...]) -> Asked:
        """What cells may ask for: made once, since steps ask for the same."""
        if asking not in self._made:
            sites: list[dict[Key, tuple[int, int]]] = [{} for _ in self._pieces.boxes]
            for k in asking:
                sites[self.owners[k]] |= {(s.name, request): s.shape(request) for s, request in sites_of(self.cells[k])}
            self._made[asking] = Asked.of(sites)
        return self._made[asking]


@dataclass(frozen=True)
class Asked:
    """What may be asked for, owner after owner, as all ranks know it.

    Attributes:
        keys: with the shapes of the statistics.
        first: the number of each owner's first one, and how many there are.
        sizes: of each owner the numbers of its flags, and of each mean.
    """

    keys: list[tuple[Key, tuple[int, int]]]
    first: list[int]
    sizes: list[list[int]]

    @classmethod
    def of(cls, sites: Sequence[Mapping[Key, tuple[int, int]]]) -> Asked:
        """From what each owner may ask for."""
        keys = [entry for of in sites for entry in of.items()]
        sizes = [[len(of), *(groups * n for groups, n in of.values())] for of in sites]
        return cls(keys, [0, *accumulate(map(len, sites))], sizes)

    @cached_property
    def numbers(self) -> list[int]:
        """How many each owner tells."""
        return list(map(sum, self.sizes))

    def told(self, own: Mapping[Key, Tensor | None], like: Tensor, rank: int) -> Tensor:
        """What an owner tells all: a flag of each, and the means known before; flat.

        Args:
            own: what it asks for.
        """
        mine, sizes = self.keys[self.first[rank] : self.first[rank + 1]], self.sizes[rank]
        zeros = like.new_zeros(max(sizes), dtype=state_dtype(like.dtype))
        flags = zeros.new_tensor([0 if key not in own else 1 if own[key] is None else 2 for key, _ in mine])
        means = [
            zeros[:n] if (c := own.get(key)) is None else c.to(zeros).reshape(-1)
            for (key, _), n in zip(mine, sizes[1:], strict=True)
        ]
        return torch.cat([flags, *means])

    def read(self, every: Sequence[Tensor]) -> list[Wish]:
        """What is asked for by any owner, with the mean known before, from what each has told."""
        told = [flat.split(n) for flat, n in zip(every, self.sizes, strict=True)]
        wants = torch.cat([flags for flags, *_ in told]).tolist()  # the host decides by them what hooks do
        each = zip(self.keys, wants, (c for _, *of in told for c in of), strict=True)
        return [(*key, mean.view(shape) if flag == 2 else None) for (key, shape), flag, mean in each if flag]


def sites_of(cell: Cell) -> Iterator[tuple[Site, Request]]:
    """The sites of a cell's layers and the requests that they answer."""
    for request in sorted(cell.preconditioner.requests, key=repr):
        yield from ((site, request) for leaf in cell.leaves for site in leaf.sites if site.answers(request))
