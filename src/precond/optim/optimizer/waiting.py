"""State of frozen parameters, which waits until they are thawed: whole in state dicts, and loaded to where it is wanted then."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from precond.algebra import collectives
from precond.algebra.sharding import copy_, divided
from precond.optim.blocks import COUNTS, Leaf

if TYPE_CHECKING:
    from precond.optim.optimizer.bound import Bound


def owned_leaves(optimizer: Bound) -> dict[tuple[int, ...], list[Leaf]]:
    """The frozen leaves whose state one rank keeps for others, by these ranks."""
    out: dict[tuple[int, ...], list[Leaf]] = {}
    for leaf in optimizer._bound.leaves:
        if leaf.param in optimizer.frozen and leaf.param in optimizer._owners and leaf.pieces is not None:
            out.setdefault(leaf.pieces.ranks, []).append(leaf)
    return out


def whole_waiting(
    leaves: Sequence[Leaf], owners: Mapping[Tensor, int], state: Mapping[Tensor, Mapping[str, Any]]
) -> Iterator[tuple[Leaf, str, Tensor]]:
    """(leaf, key, tensor) of the state that waits with owners, from them to every rank; every rank must call it.

    Only they know of its tensors: what was stepped jointly with a leaf when it was frozen decides which there are.

    Args:
        leaves: of one group of ranks.
        state: by parameter and name; of what others own, empty tensors.
    """
    pieces = leaves[0].pieces
    assert pieces is not None
    mine = [
        (i, key, tuple(t.shape), t.dtype, t.device == leaf.param.device)
        for i, leaf in enumerate(leaves)
        if owners[leaf.param] == pieces.rank
        for key, t in state.get(leaf.param, {}).items()
        if isinstance(t, Tensor) and not divided(t) and key not in COUNTS  # which each rank has
    ]
    everyone: list[Any] = [None] * len(pieces.boxes)
    dist.all_gather_object(everyone, mine, pieces.group)
    for owner, theirs in enumerate(everyone):
        for i, key, shape, dtype, beside in theirs:
            param = leaves[i].param
            if owner == pieces.rank:
                t = state[param][key].detach().to(param.device, copy=True).contiguous()
            else:
                t = torch.empty(shape, dtype=dtype, device=param.device)
            collectives.broadcast(t, owner, "the state that it owns", pieces.group)
            yield leaves[i], key, t if beside else t.cpu()


@torch.no_grad()
def placed(
    optimizer: Bound, groups: Sequence[Mapping[str, Any]], saved: Mapping[Tensor, Mapping[str, Any]]
) -> dict[Tensor, dict[str, Any]]:
    """Loaded state of frozen parameters, held as it will be where they are thawed: in parts like them, whole, or by their owners alone.

    What was stepped jointly with others than it would be if all of these were thawed, and so has other shapes, is whole where it may be wanted.

    Args:
        groups: as they will be.
        saved: by parameter and name outside, in the same order on all ranks, each of which must call this.
    """
    begun = {
        p for p, entries in saved.items() if any(isinstance(t, Tensor) and key not in COUNTS for key, t in entries.items())
    }
    if not begun:
        return {p: deepcopy(dict(entries)) for p, entries in saved.items()}
    thawed = optimizer.bound_to(groups, {}, {p for group in groups for p in group["params"]} - begun)
    outside = optimizer.naming.outside
    targets = {(leaf.param, outside(key)): t for leaf, key, t in thawed.entries if key not in COUNTS}
    elsewhere = {(leaf.param, outside(key)) for shared in thawed.shared for leaf, key, _ in shared.elsewhere}
    out: dict[Tensor, dict[str, Any]] = {p: {} for p in saved}
    for p, entries in saved.items():
        for key, value in sorted(entries.items()):
            target = targets.get((p, key))
            if (p, key) in elsewhere:
                if divided(value):
                    value.full_tensor()  # its owner's, who needs this rank's part
                out[p][key] = target
            elif isinstance(value, Tensor) and target is not None and target.shape == value.shape:
                copy_(target, value)
                out[p][key] = target
            else:
                out[p][key] = value.full_tensor() if divided(value) else deepcopy(value)
    return out
