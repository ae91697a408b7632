"""What owners want to be observed of layer inputs, told to all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from precond.algebra import collectives
from precond.optim.blocks import Leaf
from precond.optim.engine.cells import Cell
from precond.optim.inputs import Request
from precond.optim.inputs.bundles import Layer
from precond.optim.inputs.observer import Key
from precond.optim.inputs.sites import Site
from precond.optim.ranks.pieces import Pieces


@dataclass
class Asking:
    """What the cells of a group of ranks ask for, each known to its owner.

    Args:
        cells: all, in the same order on every rank.
        owners: the rank in the group that owns each.
        leaves: theirs, as this process holds them.
    """

    cells: Sequence[Cell]
    owners: Sequence[int]
    leaves: Sequence[Leaf]
    _made: dict[tuple[int, ...], Asked] = field(default_factory=dict, repr=False)

    def __call__(self, steps: Sequence[int]) -> list[tuple[str, Request, Tensor | None]]:
        """What any owner asks for, and the mean known before, on every rank.

        Args:
            steps: how many each cell has made.
        """
        kinds, turns = self._kinds
        busy = {
            (kind, t)
            for kind, t in set(zip(kinds, steps, strict=True))
            if not self.cells[kind].preconditioner.idle(t + 1, turns)
        }
        if not busy:
            return []
        asking = tuple(k for k, cell in enumerate(self.cells) if (kinds[k], steps[k]) in busy and cell.handled)
        if not (asked := self._asked(asking)).keys:
            return []
        mine = [self.cells[k] for k in asking if self.owners[k] == self._pieces.rank]
        own = {(name, request): c for cell in mine for name, request, c in cell.wanted()}
        return asked.answered(own, self.leaves[0].tensor, self._pieces.group)

    @cached_property
    def _kinds(self) -> tuple[list[int], set[int]]:
        """Of each cell the first one with its preconditioner; and the turns of all leaves."""
        first: dict[int, int] = {}
        kinds = [first.setdefault(id(cell.preconditioner), k) for k, cell in enumerate(self.cells)]
        return kinds, {leaf.turn for leaf in self.leaves}

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
        pieces = self.leaves[0].pieces
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


class Asked(NamedTuple):
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

    def answered(
        self, own: Mapping[Key, Tensor | None], like: Tensor, group: dist.ProcessGroup
    ) -> list[tuple[str, Request, Tensor | None]]:
        """What is asked for by any owner, with the mean known before: a flag of each, and these means, go to all.

        Args:
            own: what this rank asks for.
        """
        rank = dist.get_rank(group)
        mine, sizes = self.keys[self.first[rank] : self.first[rank + 1]], self.sizes[rank]
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        zeros = like.new_zeros(max(sizes), dtype=dtype)
        flags = zeros.new_tensor([0 if key not in own else 1 if own[key] is None else 2 for key, _ in mine])
        means = [
            zeros[:n] if (c := own.get(key)) is None else c.to(zeros).reshape(-1)
            for (key, _), n in zip(mine, sizes[1:], strict=True)
        ]
        flat = torch.cat([flags, *means])
        every = collectives.all_gather_v(flat, list(map(sum, self.sizes)), "what is to be observed", group)
        told = [flat.split(n) for flat, n in zip(every, self.sizes, strict=True)]
        wants = torch.cat([flags for flags, *_ in told]).tolist()  # the host decides by them what hooks do
        each = zip(self.keys, wants, (c for _, *of in told for c in of), strict=True)
        return [(*key, mean.view(shape) if flag == 2 else None) for (key, shape), flag, mean in each if flag]


def sites_of(cell: Cell) -> Iterator[tuple[Site, Request]]:
    """The sites of a cell's layers and the requests that they answer."""
    for request in sorted(cell.preconditioner.requests, key=repr):
        yield from ((site, request) for leaf in cell.leaves for site in leaf.sites if site.answers(request))
