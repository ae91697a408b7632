"""State that others keep, or hold in parts, brought to who steps its parameter after a change; every rank must come.

Blocks are divided otherwise when parameters are frozen or thawed, groups are added or options changed: what one rank stepped with its
layer another one may step now, or each rank the part that it holds. What is sent follows from what all ranks know alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from precond.algebra.sharding import copy_, divided
from precond.optim.blocks import COUNTS, Leaf
from precond.optim.engine.shared_state import Owned, Ownership, from_owners, owned
from precond.optim.optimizer.binding import Binding, is_spare
from precond.optim.optimizer.entries import begun_anew, with_data
from precond.optim.optimizer.naming import Naming


@torch.no_grad()
def receive(
    bound: Binding, before: Ownership, state: Mapping[Tensor, dict[str, Any]], outside: Callable[[str], str]
) -> Ownership:
    """Put into the entries of a new binding what this rank did not hold so far; nothing is written before all is there.

    Args:
        bound: has taken over what fits as it is.
        before: who owned what.
        state: as it was; of what others own, empty tensors.
        outside: our names of state tensors → those in ``state``.

    Returns:
        Who owns what from now on, also of what waits.
    """
    after, anew = owned(bound.shared), begun_anew(state, bound.entries)
    state = {p: of for p, of in with_data(state).items() if p not in anew}
    targets: dict[Tensor, dict[str, Tensor]] = {}
    for leaf, key, target in bound.entries:
        targets.setdefault(leaf.param, {})[key] = target
    sent: list[tuple[Leaf, Owned, Tensor]] = []
    places: list[Tensor | None] = []
    copies: list[tuple[Tensor, Tensor]] = []
    for leaf in bound.leaves:
        for key, target in sorted(targets.get(leaf.param, {}).items()):
            known = state.get(leaf.param, {}).get(outside(key))
            if key in COUNTS or not isinstance(known, Tensor):
                continue
            old, new = (owners.get(leaf.param, {}).get(key) for owners in (before, after))
            here = new is None or (leaf.pieces is not None and leaf.pieces.rank == new.owner)
            if old is not None:
                if new is None or new.owner != old.owner:
                    sent.append((leaf, old, known))
                    places.append(target if here else None)
            elif _held_otherwise(known, None if new is not None else target):
                value = known.full_tensor() if divided(known) else known  # type: ignore[attr-defined]
                copies += [(target, value)] if here else []
    copies += [(place, value) for i, value in from_owners(sent) if (place := places[i]) is not None]
    for target, value in copies:
        if value.shape == target.shape:  # the parameter may have been converted since
            copy_(target, value)
    return {p: waiting for p, waiting in before.items() if p in bound.waiting and p in state} | after


def transfer_state(state: MutableMapping[Tensor, Any], new: Mapping[Tensor, Tensor]) -> None:
    """Parameters that stand in the places of others take over their state, where they are held as those were.

    Raises:
        RuntimeError: where they were sharded after a step.
    """
    alike = {p: p.shape == q.shape and divided(p) == divided(q) for p, q in new.items()}
    if late := [p for p in new if not alike[p] and state.get(p, {}).get("step")]:
        raise RuntimeError(
            f"a parameter of shape {tuple(late[0].shape)} was sharded or replaced after it had been stepped, and its state does not fit what "
            "stands there now: shard the model before the first step, and load a checkpoint after that"
        )
    for p, q in new.items():
        known = state.pop(p, None)
        if known is not None and alike[p]:
            state[q] = known


def rename(owners: MutableMapping[Tensor, Any], new: Mapping[Tensor, Tensor], state: Mapping[Tensor, Any]) -> None:
    """Parameters whose state stands under others now."""
    for p, q in new.items():
        if p in owners and q in state:
            owners[q] = owners.pop(p)


def commit(before: Binding, now: Binding, state: MutableMapping[Tensor, Any], naming: Naming) -> None:
    """State becomes that of a binding.

    What is kept no more goes, and of what has waited also what an earlier plan kept; all of what begins anew; nothing of what waits now.
    """
    anew = begun_anew(state, now.entries)
    known, kept = ({(leaf.param, key) for leaf, key, _ in bound.entries} for bound in (before, now))
    known |= {(p, naming.inside(key)) for p in before.waiting | anew for key in state.get(p, ())}
    waiting = now.waiting
    for p, key in known - kept:
        if p in anew or not (p in waiting or is_spare(key)):
            state.get(p, {}).pop(naming.outside(key), None)
    for leaf, key, tensor in now.entries:
        state[leaf.param][naming.outside(key)] = tensor


def _held_otherwise(known: Tensor, target: Tensor | None) -> bool:
    """Whether what each rank holds, all of a tensor or its part, is not what it is to hold: ``target``; None: its owner all of it."""
    if not divided(known) or target is None or not divided(target):
        return divided(known) or (target is not None and divided(target))
    return (known.device_mesh, known.placements) != (target.device_mesh, target.placements)  # type: ignore[attr-defined]
