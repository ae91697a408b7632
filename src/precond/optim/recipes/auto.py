"""The recipe that chooses for itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from precond.algebra import checks
from precond.algebra.schedules import numbers, replaced
from precond.optim.blocks import Stack
from precond.optim.checking.arguments import checked
from precond.optim.engine.cells import Choice
from precond.optim.momentum import Momentum
from precond.optim.optimizer import PreconditionedGD
from precond.optim.optimizer.parameters import Params
from precond.optim.preconditioners import Auto, Composition, Whitening
from precond.optim.recipes.making import make
from precond.optim.regularizers import L2, Regularizer


@dataclass(frozen=True)
class _Auto:
    choice: Auto

    def __call__(self, group: Mapping[str, Any]) -> Choice:
        choice, beta = replaced(self.choice, group), group["momentum"]
        average = Momentum(beta, "nesterov", dampening=beta)
        if choice.polar.momentum is None:
            choice = replace(choice, polar=replace(choice.polar, momentum=average))
        if choice.muon.momentum is None:
            choice = replace(choice, muon=replace(choice.muon, momentum=choice.polar.momentum))
        if group["measured"] is not None:
            choice = replace(choice, measured=tuple(group["measured"].items()))
        return Choice(choice, Momentum(beta), (L2(group["weight_decay"] / 2, space="z"),))


MEASURED_AFTER = 7
"""Steps after which the inputs of layers are looked at, once: the next is the last that may read from a device."""


def _measured(optimizer: PreconditionedGD) -> dict[str, Any] | None:
    """What the inputs of whitened layers have shown, by the names of their weights, when all of them have made so many steps."""
    if any(group["measured"] is not None or group["capturable"] for group in optimizer.param_groups):
        return None  # a captured step is one program for all steps
    shares: dict[str, float] = {}
    shapes: dict[str, torch.Size] = {}
    for cell in optimizer.cells:
        P = cell.preconditioner
        if isinstance(P, Composition) and isinstance(P.outer, Whitening):
            if min(cell.state.steps) < MEASURED_AFTER:
                return None
            outer = cell.state["outer"]
            shapes |= {leaf.name: leaf.shape for leaf in cell.leaves}
            shares |= P.outer.independent(outer if isinstance(cell.block, Stack) else outer.as_stack())
    # Layers of one shape decide together, by the least: they are stepped side by side.
    least = {shape: min(s for name, s in shares.items() if shapes[name] == shape) for shape in map(shapes.get, shares)}
    return {"measured": {name: round(least[shapes[name]], 3) for name in shares}} if shares else None


@checked
def auto(
    params: Params,
    lr: float | Tensor = 1e-2,
    weight_decay: float = 1e-2,
    momentum: float = 0.9,
    *,
    choice: Auto | None = None,
    maximize: bool = False,
    regularizers: Iterable[Regularizer] = (),
    **options: Any,
) -> PreconditionedGD:
    """A preconditioner for each layer, chosen by what it is: whitened inputs and polar steps for most, Adam for what is no layer.

    After the first steps layers whose inputs turn out to be white are no longer whitened; that is decided once, and the state dict
    keeps it. ``optimizer.explain()`` says what was chosen and why. See :class:`~precond.Auto` for the rules and :class:`~precond.Polar` for the
    length of steps: the learning rate is about the change of a layer's outputs in a step, whatever its width.

    Args:
        params: the model, whose inputs are observed.
        lr: best between 0.003 and 0.03 in most trainings.
        weight_decay: decoupled, as in :func:`adamw`.
        momentum: Nesterov's average for layers, unless ``choice.polar`` has its own, Adam's for the rest.
        choice: other rules, or other settings of what is chosen from; None: ``Auto()``.
        maximize, regularizers, options: as in :func:`sgd`.

    Returns:
        A :class:`~precond.PreconditionedGD`, which is a ``torch.optim.Optimizer``.

    Warns:
        UserWarning: where the model has no layer that it knows, and RMS acts on all of it, or where all of it is frozen.

    Example:
        >>> import torch, precond
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.LayerNorm(4))
        >>> for row in precond.auto(model).explain().rows:
        ...     print(f"{row.name}: {row.preconditioner.split('(')[0]}, {row.why}")
        0.weight: Whitening, 8 inputs
        0.bias: Whitening, 8 inputs
        1.weight: RMS, scales and shifts
        1.bias: RMS, scales and shifts

    References:
        The rules are the project's own; docs/experiments.md has what they were measured on.
    """
    checks.fraction("auto", momentum=momentum)
    checks.non_negative("auto", weight_decay=weight_decay)
    choice = Auto() if choice is None else choice
    defaults = {"weight_decay": weight_decay, "momentum": momentum, "maximize": maximize, "measured": None, **numbers(choice)}
    optimizer = make("auto", params, lr, _Auto(choice), defaults, {}, {}, regularizers, options, settle=_measured)
    acting = {row.preconditioner for row in optimizer.explain().rows} - {"none (frozen)"}
    if not acting:
        warnings.warn(
            "auto: all parameters are frozen (requires_grad=False); nothing is trained until some are thawed", stacklevel=2
        )
    elif all(what.startswith("RMS") for what in acting):
        warnings.warn("auto: the model has no layer that it knows; RMS acts on all of it", stacklevel=2)
    return optimizer
