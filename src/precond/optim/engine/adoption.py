"""What fresh state takes over of the state that exists, and which parameters begin anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from itertools import compress
from typing import Any

from torch import Tensor

from precond.algebra.sharding import local
from precond.algebra.vec import Vec
from precond.optim.blocks import COUNTS, Leaf, State, within
from precond.optim.preconditioners.base import Preconditioner

Existing = Mapping[Tensor, dict[str, Any]]
"""The optimizer's state: tensors by parameter and their names outside."""


def named(P: Preconditioner, names: str) -> frozenset[str]:
    """What it names, or what it is made of: its ``optional`` or ``second_moments``."""
    return frozenset(getattr(P, names)).union(*(named(part, names) for part in P.constituents))


def lacking(
    state: State, existing: Existing, outside: Callable[[str], str], second_moments: Set[str], prefix: str = ""
) -> list[Leaf]:
    """The leaves that have made steps without a second moment that is to scale them now, as a bias in those of its layer: they begin anew.

    Else their momentum would be divided by the root of what knows one gradient, and counts many.
    """
    found: list[Leaf] = []
    for key, value in state.items():
        if isinstance(value, State):
            found += lacking(value, existing, outside, second_moments, prefix + within(key))
        elif key in second_moments:
            known = [existing.get(leaf.param, {}) for leaf in state.block.leaves]
            gone = [outside(prefix + key) not in k and bool(k.get("step", 0)) for k in known]
            found += compress(state.block.leaves, gone)
    return found


def adopt(
    state: State, existing: Existing, steps: Vec, outside: Callable[[str], str], optional: Set[str], prefix: str = ""
) -> None:
    """Put known tensors in place of fresh ones, and the step counts of the leaves into every part.

    A part of which something is not known that is not ``optional``, as BNP's variances where a layer was whitened, begins anew as a whole:
    its count, means and variances are of the same samples.
    """
    by_leaf = dict(zip(state.block.leaves, steps, strict=True)) if steps else {}
    known = {leaf: existing.get(leaf.param, {}) for leaf in state.block.leaves}
    if prefix:
        first = state.block.leaves[0]
        needed = (key for key, value in state.items() if isinstance(value, Tensor) and key.partition(".")[0] not in optional)
        if not known[first].keys() >= {outside(prefix + key) for key in needed if key not in COUNTS}:
            known[first] = {}
    for key, value in list(state.items()):
        if isinstance(value, State):
            own = tuple(by_leaf[leaf] for leaf in value.block.leaves)
            adopt(value, existing, own, outside, optional, prefix + within(key))
        else:
            fresh = value if isinstance(value, tuple) else (value,)
            kept = []
            for leaf, tensor in zip(state.block.leaves, fresh, strict=False):
                mine = known[leaf].get(outside(prefix + key))
                # The parameter may have been converted since, or moved.
                kept.append(
                    _whole(local(mine).to(tensor)) if isinstance(mine, Tensor) and local(mine).shape == tensor.shape else tensor
                )
            state[key] = tuple(kept) if isinstance(value, tuple) else kept[0]
    state["step"] = steps


def _whole(t: Tensor) -> Tensor:
    """A slice of a former stack in memory of its own: it holds all of that, and is not aligned as what is loaded, by which products round."""
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()
