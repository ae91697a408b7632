"""States of blocks alike, put side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from precond.optim.blocks.block import Stack
from precond.optim.blocks.state import State


def side_by_side(states: Sequence[State], stack: Stack) -> State:
    """The state of a stack, of those of its blocks: with their own memory where they are slices of one tensor."""
    out = State(stack)
    for key, value in states[0].items():
        if isinstance(value, State):
            out[key] = side_by_side([s[key] for s in states], Stack.of([s[key].block for s in states]))
        elif key == "step":
            out[key] = tuple(t for s in states for t in s[key])
        elif isinstance(value, tuple):
            out[key] = tuple(_stacked([s[key][j] for s in states]) for j in range(len(value)))
        else:
            out[key] = _stacked([s[key] for s in states])
    return out


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """(k, …): the tensor that these are views of, or a new one."""
    base = tensors[0]._base
    if base is not None and base.shape == (len(tensors), *tensors[0].shape):
        rows = zip(base.unbind(0), tensors, strict=True)
        if all(
            t._base is base and t.storage_offset() == row.storage_offset() and t.stride() == row.stride() for row, t in rows
        ):
            return base
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))
