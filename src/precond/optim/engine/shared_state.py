"""State and statistics of blocks that ranks share, as one process would have them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from precond.algebra import collectives
from precond.optim.blocks import Leaf
from precond.optim.engine.cells import Cell, sites_of
from precond.optim.engine.sharing import Shared
from precond.optim.inputs import Request


def whole_state(cell: Shared) -> Iterator[tuple[Leaf, str, Tensor]]:
    """(leaf, key, tensor) of the state of all cells, from their owners to every rank; every rank must call it."""
    group = cell.exchange.group
    for owner in range(cell.exchange.size):
        entries = [entry for k, of in enumerate(cell.contents) if cell.owners[k] == owner for entry in of]
        for dtype in dict.fromkeys(t.dtype for _, _, t in entries):
            alike = [(leaf, key, t) for leaf, key, t in entries if t.dtype == dtype]
            device = cell.block.leaves[0].param.device
            flat = torch.empty(sum(t.numel() for _, _, t in alike), dtype=dtype, device=device)
            if owner == cell.exchange.rank:
                torch.cat([t.reshape(-1).to(device) for _, _, t in alike], out=flat)
            collectives.broadcast(flat, owner, "the state that it owns", group)
            for (leaf, key, t), found in zip(alike, flat.split([t.numel() for _, _, t in alike]), strict=True):
                yield leaf, key, found.view(t.shape).to(t.device)


def owned_statistics(cells: Iterable[Cell]) -> dict[tuple[str, Request], tuple[dist.ProcessGroup, int]]:
    """By site name and request: the ranks, and which of them alone needs the statistics of a layer's inputs."""
    out: dict[tuple[str, Request], tuple[dist.ProcessGroup, int]] = {}
    others = set()
    for cell in cells:
        for k, each in enumerate(cell.cells):
            for site, request in sites_of(each) if each.handled else ():
                key = site.name, request
                owner = (cell.exchange.group, cell.owners[k]) if isinstance(cell, Shared) else None
                if owner is None or out.setdefault(key, owner) != owner:
                    others.add(key)
    return {key: owner for key, owner in out.items() if key not in others}
