"""What fresh state takes over of the state that exists, and which parameters begin anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from precond.algebra.sharding import local
from precond.algebra.vec import Vec
from precond.optim.blocks import COUNTS, Leaf, State, within

Existing = Mapping[Tensor, dict[str, Any]]
"""The optimizer's state: tensors by parameter and their names outside."""


def lacking(state: State, existing: Existing, outside: Callable[[str], str], prefix: str = "") -> list[Leaf]:
    """The leaves that have made steps by other statistics than these, as a bias by those of its layer: they begin anew.

    Else their momentum would be divided by the root of a second moment that knows one gradient and counts many, or by a standard deviation
    of 0 that counts as many samples as a covariance did.
    """
    found: list[Leaf] = []
    for key, value in state.items():
        if isinstance(value, State):
            found += lacking(value, existing, outside, prefix + within(key))
        elif key not in COUNTS and key not in _LATER:
            for leaf, _ in zip(state.block.leaves, value if isinstance(value, tuple) else (value,), strict=False):
                known = existing.get(leaf.param, {})
                if outside(prefix + key) not in known and bool(known.get("step", 0)):
                    found.append(leaf)
    return found


_LATER = frozenset({"r_max", "scale", "form"})
"""Statistics that may begin in the midst: AMSGrad's maximum; lengths of relative steps and the form of a root, not saved earlier."""


def adopt(
    state: State, existing: Mapping[Tensor, dict[str, Any]], steps: Vec, outside: Callable[[str], str], prefix: str = ""
) -> None:
    """Put known tensors in place of fresh ones, and the step counts of the leaves into every part."""
    by_leaf = dict(zip(state.block.leaves, steps, strict=True)) if steps else {}
    for key, value in list(state.items()):
        if isinstance(value, State):
            adopt(value, existing, tuple(by_leaf[leaf] for leaf in value.block.leaves), outside, prefix + within(key))
        else:
            fresh = value if isinstance(value, tuple) else (value,)
            kept = []
            for leaf, tensor in zip(state.block.leaves, fresh, strict=False):
                known = existing.get(leaf.param, {}).get(outside(prefix + key))
                mine = local(known) if isinstance(known, Tensor) else tensor
                # The parameter may have been converted since, or moved.
                kept.append(mine.to(tensor) if mine.shape == tensor.shape else tensor)
            state[key] = tuple(kept) if isinstance(value, tuple) else kept[0]
    state["step"] = steps
