"""State and statistics of blocks that ranks share, as one process would have them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from precond.algebra import collectives
from precond.optim.blocks import Leaf
from precond.optim.engine.asking import sites_of
from precond.optim.engine.cells import Cell
from precond.optim.engine.sharing import Shared
from precond.optim.inputs.bundles import Layer
from precond.optim.inputs.observer import Key


@dataclass(frozen=True)
class Owned:
    """What all ranks know of a tensor of state that one of them keeps for the others.

    Attributes:
        owner: its rank among those that hold the parameter.
        like: of the tensor's shape and dtype, with memory for one number.
    """

    owner: int
    like: Tensor


Ownership = dict[Tensor, dict[str, Owned]]
"""By parameter and key."""


def owned(cells: Iterable[Shared]) -> Ownership:
    """All state of cells that ranks share, but the counts of steps."""
    out: Ownership = {}
    for cell in cells:
        for owner, contents in zip(cell.owners, cell.contents, strict=True):
            for leaf, key, t in contents:
                out.setdefault(leaf.param, {})[key] = Owned(owner, t.detach().new_zeros(()).expand(t.shape))
    return out


def from_owners(wanted: Sequence[tuple[Leaf, Owned, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """The number of each tensor, and itself, from its owner to every rank, by a call for all of an owner; every rank must call it.

    Args:
        wanted: the leaf, what is known of the tensor, and what this rank has in its place: where it is the owner, the tensor.
    """
    together: dict[Any, list[int]] = {}
    for i, (leaf, it, _) in enumerate(wanted):
        assert leaf.pieces is not None
        together.setdefault((leaf.pieces.ranks, it.owner, it.like.dtype, leaf.param.device), []).append(i)
    for (_, owner, dtype, device), index in together.items():
        pieces, sizes = wanted[index[0]][0].pieces, [wanted[i][1].like.numel() for i in index]
        assert pieces is not None
        flat = torch.empty(sum(sizes), dtype=dtype, device=device)
        if owner == pieces.rank:
            torch.cat([wanted[i][2].reshape(-1).to(device) for i in index], out=flat)
        collectives.broadcast(flat, owner, "the state that it owns", pieces.group)
        for i, found in zip(index, flat.split(sizes), strict=True):
            # Each in memory of its own: products of matrices that begin elsewhere than memory is handed out differ in the last bit.
            yield i, found.view(wanted[i][1].like.shape).to(wanted[i][2].device, copy=True)


def owned_statistics(cells: Iterable[Cell]) -> dict[Key, tuple[dist.ProcessGroup, Layer]]:
    """By site name and request: the ranks, and which of them alone needs the statistics of a layer's inputs."""
    out: dict[Key, tuple[dist.ProcessGroup, Layer]] = {}
    others = set()
    for cell in cells:
        if isinstance(cell, Shared):
            for key, layer in cell.asking.statistics:
                found = cell.exchange.group, layer
                if out.setdefault(key, found) != found:
                    others.add(key)
        elif cell.handled:
            others |= {(site.name, request) for site, request in sites_of(cell)}
    return {key: owner for key, owner in out.items() if key not in others}
