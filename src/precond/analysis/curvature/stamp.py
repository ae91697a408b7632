"""Whether what a loss is made of still is what it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from precond.algebra.vec import Vec
from precond.analysis.curvature.objective import Objective


class Stamp:
    """Parameters, buffers and modes of an objective as they are now, to be asked later whether they stayed, bit for bit.

    The versions of tensors tell most changes, and those after which autograd refuses a graph. Writes through ``.data`` are counted by
    another version, which no one sees: the values tell them, by a copy.

    Args:
        objective: what a graph is made of.
    """

    def __init__(self, objective: Objective):
        tensors = objective.tensors
        self._objective, self._marks = objective, _marks(objective, tensors)
        self._values = [t.detach().clone() for t in tensors]

    @property
    def stands(self) -> bool:
        """Whether nothing has changed."""
        tensors = self._objective.tensors
        return self._marks == _marks(self._objective, tensors) and all(map(_equal, self._values, tensors))


def _marks(objective: Objective, tensors: Vec) -> tuple[Any, ...]:
    modes = tuple(module.training for module in objective.model.modules()) if objective.mode == "unchanged" else ()
    return tuple((t.data_ptr(), None if t.is_inference() else t._version) for t in tensors), modes


_LARGE = 2**14  # entries from which on two views cost less than they spare


def _equal(a: Tensor, b: Tensor) -> bool:
    """Of large tensors eight bytes at a time, which takes half the time or less."""
    if a.numel() >= _LARGE and all(t.is_contiguous() and t.nbytes % 8 == 0 and t.data_ptr() % 8 == 0 for t in (a, b)):
        a, b = (t.detach().view(-1).view(torch.int64) for t in (a, b))
    return torch.equal(a, b)
