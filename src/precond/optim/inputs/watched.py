"""What an observer knows of a weight besides its inputs: which module holds it, and which gradient it had."""

from __future__ import annotations

import weakref
from typing import NamedTuple

from torch import Tensor, nn

from precond.optim.inputs.moments import Request
from precond.optim.inputs.sites import Site
from precond.optim.inputs.taps import Weight

Key = tuple[str, Request]
"""A site's name, and a request."""


class Mark(NamedTuple):
    """Which gradient a parameter had, to tell whether a backward has been since; keeps none alive."""

    gradient: weakref.ref[Tensor] | None
    version: int

    def holds(self, param: Tensor) -> bool:
        """Whether it still has that gradient."""
        g = param.grad
        if g is None or self.gradient is None:
            return g is None and self.gradient is None
        return self.gradient() is g and g._version == self.version


def mark(param: Tensor) -> Mark:
    """The gradient that a parameter has now."""
    return Mark(None, 0) if param.grad is None else Mark(weakref.ref(param.grad), param.grad._version)


class Watched(NamedTuple):
    """A weight of a site, as one of its taps has it.

    Attributes:
        site: whose.
        weight: the weight.
        keys: what may be asked of it.
        holder, attribute: which module holds it, and what that calls it.
    """

    site: Site
    weight: Weight
    keys: list[Key]
    holder: nn.Module
    attribute: str

    @property
    def lent(self) -> bool:
        """Whether the module has another's weight for this call, from which no gradient comes to its own: ``torch.func.functional_call`` with
        those of a teacher, or of an inner loop. What is computed of its own counts, and so do parameters that have taken its place."""
        there = self.holder._parameters.get(self.attribute)
        if there is self.weight.param or there is None or not there.is_leaf:
            return False
        return not (isinstance(there, nn.Parameter) and there.requires_grad)


def holder(module: nn.Module, weight: Weight) -> tuple[nn.Module, str]:
    """Which module holds a weight of a layer, itself or below it, and what that calls it."""
    places = ((m, name) for m in module.modules() for name, p in m._parameters.items() if p is weight.param)
    return next(places, (module, ""))
