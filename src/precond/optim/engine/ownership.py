"""What a preconditioner takes jointly, and which rank owns it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from precond.optim.blocks import Block, Leaf, WholeLeaf, state_dtype
from precond.optim.engine.cells import Choice
from precond.optim.momentum import Momentum
from precond.optim.preconditioners import Fixed
from precond.optim.preconditioners.base import Preconditioner
from precond.optim.preconditioners.parts import placed
from precond.optim.ranks.exchange import balanced


@dataclass(frozen=True)
class Unit:
    """Leaves, by position, that one preconditioner acts on jointly, and their momentum."""

    index: tuple[int, ...]
    preconditioner: Preconditioner
    momentum: Momentum | None


def units(leaves: Sequence[Leaf], live: Sequence[int], choices: Sequence[Choice], whole: Whole | None = None) -> list[Unit]:
    """The units of the leaves that want gradients; the numbers of each are those of its first leaf's group."""
    chosen = [leaves[i] for i in live]
    whole = Whole(leaves) if whole is None else whole
    out = []
    taken: set[int] = set()
    idle: dict[tuple[int, Momentum | None], list[int]] = {}
    # Numbers of a group may decide what is a block, a limit of length, say: each group takes its own plan's.
    for group, choice in enumerate(choices):
        for part in choice.preconditioner.partition(chosen):
            if chosen[part.index[0]].group == group:
                own = part.preconditioner.momentum
                momentum = choice.momentum if own is None else own
                if part.preconditioner.handles(whole.block(part.preconditioner, [chosen[i] for i in part.index])):
                    out.append(Unit(tuple(live[i] for i in part.index), part.preconditioner, momentum))
                else:
                    idle.setdefault((group, momentum), []).extend(part.index)
                if twice := taken.intersection(part.index):
                    raise _disagree(chosen[min(twice)])
                taken.update(part.index)
    for (_, momentum), index in idle.items():  # what is left as it is goes together
        for part in placed(Fixed(), chosen, sorted(index)):
            out.append(Unit(tuple(live[i] for i in part.index), part.preconditioner, momentum))
    if missed := set(range(len(chosen))) - taken:
        raise _disagree(chosen[min(missed)])
    return out


@dataclass(frozen=True)
class Placement:
    """Where a block is stepped that several ranks hold.

    Attributes:
        exchange: what blocks have in common that are exchanged together: the ranks, the dtype and the device.
        owner: the rank among them that steps it.
        here: whether that is this one.
    """

    exchange: Any
    owner: int
    here: bool


def assign_owners(found: Sequence[Unit], leaves: Sequence[Leaf], owners: dict[Tensor, int]) -> list[Placement | None]:
    """Who steps each unit, None where every rank steps what it holds; ``owners`` learns of new ones.

    Raises:
        ValueError: where parameters that are stepped jointly are held by different ranks.
        RuntimeError: where ranks shared them before and are not known any more.
    """
    exchanges: dict[Any, list[int]] = {}
    keys: list[Any] = []
    for k, unit in enumerate(found):
        own = [leaves[i] for i in unit.index]
        keys.append(_exchange(unit.preconditioner, own))
        if keys[-1] is None and (lost := [leaf for leaf in own if leaf.param in owners and leaf.pieces is None]):
            raise RuntimeError(
                f"the state of {lost[0].name!r} is divided among ranks, and the optimizer was copied or unpickled without its model: call "
                "watch(model) with the wrapped model on every rank first"
            )
        if keys[-1] is not None:
            exchanges.setdefault(keys[-1], []).append(k)
    of: dict[int, Placement] = {}
    for key, numbers in exchanges.items():
        first = leaves[found[numbers[0]].index[0]].pieces
        assert first is not None
        size, me = len(first.boxes), dist.get_rank(first.group)
        costs = {k: found[k].preconditioner.cost(Block(tuple(leaves[i] for i in found[k].index))) for k in numbers}
        known = {k: owners[p] for k in numbers if (p := leaves[found[k].index[0]].param) in owners}
        loads = [sum(costs[k] for k, owner in known.items() if owner == r) for r in range(size)]
        new = [k for k in numbers if k not in known]
        known |= dict(zip(new, balanced([costs[k] for k in new], size, loads), strict=True))
        for k in numbers:
            owners.update({leaves[i].param: known[k] for i in found[k].index})
            of[k] = Placement(key, known[k], known[k] == me)
    return [of.get(k) for k in range(len(found))]


def _exchange(P: Preconditioner, own: Sequence[Leaf]) -> Any:
    """The ranks, the dtype and the device of a unit that one rank steps for all; None where each steps what it holds."""
    if not P.has_owner and (all(leaf.shard is None for leaf in own) or P.divisible(Block(tuple(own)))):
        return None
    pieces = [leaf.pieces for leaf in own]
    if all(p is None for p in pieces):
        return None
    keys = {(p.ranks, state_dtype(leaf.param.dtype), leaf.param.device) for p, leaf in zip(pieces, own, strict=True) if p}
    if len(keys) > 1 or None in pieces:
        raise ValueError(
            f"{type(P).__name__} acts jointly on {', '.join(repr(leaf.name) for leaf in own)}, which different ranks hold, or in different "
            "dtypes: shard them on one mesh, or leave all of them out of sharding (ignored_params)"
        )
    return next(iter(keys))


class Whole:
    """Leaves as who steps them sees them: whole where one rank steps a block for all, else what this process holds."""

    def __init__(self, leaves: Sequence[Leaf]):
        self._leaves = leaves
        self._zeros: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._known: dict[Leaf, Leaf] = {}

    def block(self, P: Preconditioner, own: Sequence[Leaf]) -> Block:
        """The block of some leaves for a preconditioner."""
        gathers = P.has_owner or (any(leaf.shard is not None for leaf in own) and not P.divisible(Block(tuple(own))))
        return Block(tuple(self._whole(leaf) if gathers and leaf.shard is not None else leaf for leaf in own))

    def _whole(self, leaf: Leaf) -> Leaf:
        if leaf not in self._known:
            kind = leaf.param.dtype, leaf.param.device
            if kind not in self._zeros:
                sizes = [
                    x.param.numel() for x in self._leaves if x.shard is not None and (x.param.dtype, x.param.device) == kind
                ]
                self._zeros[kind] = torch.zeros(max(sizes), dtype=kind[0], device=kind[1])
            self._known[leaf] = _at_owner(leaf, self._zeros[kind])
        return self._known[leaf]


def _at_owner(leaf: Leaf, zeros: Tensor) -> Leaf:
    """A leaf as its owner steps it: whole.

    Args:
        zeros: memory of its size, of which nothing is written.
    """
    if leaf.shard is None:
        return leaf
    fields = {name: getattr(leaf, name) for name in leaf.__dataclass_fields__}
    return WholeLeaf(**fields, zeros=zeros[: leaf.param.numel()].view(leaf.shape))


def _disagree(leaf: Leaf) -> ValueError:
    return ValueError(
        f"the groups of {leaf.name!r} and of the rest of its layer differ in a number that decides what is stepped jointly "
        "(max_dim, max_inputs); give both groups one value"
    )
