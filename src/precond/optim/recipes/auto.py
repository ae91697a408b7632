"""The recipe that chooses for itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from precond.algebra import checks
from precond.algebra.schedules import numbers, replaced
from precond.algebra.warning import warn
from precond.optim.engine.cells import Choice
from precond.optim.momentum import Momentum
from precond.optim.optimizer import PreconditionedGD
from precond.optim.optimizer.parameters import Params
from precond.optim.preconditioners import Auto
from precond.optim.recipes.first_steps import FirstSteps
from precond.optim.recipes.making import make, recipe
from precond.optim.regularizers import L2, Regularizer

LENGTHS = 0.95
"""Decay of the mean square of gradients' lengths, by which the coherence of their average is measured."""


@dataclass(frozen=True)
class _Auto:
    choice: Auto

    def __call__(self, group: Mapping[str, Any]) -> Choice:
        choice, beta = replaced(self.choice, group), group["momentum"]
        nesterov = Momentum(beta, "nesterov", dampening=beta)
        changed: dict[str, Any] = {}
        if choice.polar.momentum is None:
            changed["polar"] = replace(choice.polar, momentum=replace(nesterov, lengths=LENGTHS))
        if choice.muon.momentum is None:
            changed["muon"] = replace(choice.muon, momentum=choice.polar.momentum or nesterov)
        if group["measured"] is not None:
            changed["measured"] = tuple(group["measured"].items())
        if group["seen"] is not None:
            changed["seen"] = tuple((name, *numbers) for name, numbers in group["seen"].items())
        choice = replace(choice, **changed)
        return Choice(choice, Momentum(beta), (L2(group["weight_decay"] / 2, space="z"),))


@recipe
def auto(
    params: Params,
    lr: float | Tensor = 2e-2,
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
    keeps it. ``optimizer.explain()`` says what was chosen and why, and what else was seen. See :class:`~precond.Auto` for the rules and
    :class:`~precond.Polar` for the length of steps: where gradients agree a layer's outputs change, for inputs as they were when last
    observed, by about three times the learning rate in a step, at most, whatever its width, and where they are noise by half of that.

    Args:
        params: the model, whose inputs are observed.
        lr: best between 0.01 and 0.04 in most trainings. Where layers put out little at first and what follows makes much of it, such
            steps are long: sine-activated nets and plain ones of 20 layers want 0.001 to 0.006. A single linear layer wants 0.1 to 0.6.
        weight_decay: decoupled, as in :func:`adamw`, of all parameters. Where it differs within a layer, as after
            :func:`~precond.decay_groups`, layers are stepped by the reference loop, which takes 1.5 to 6 times as long on small nets.
        momentum: Nesterov's average for layers, unless ``choice.polar`` has its own, Adam's for the rest.
        choice: other rules, or other settings of what is chosen from; None: ``Auto()``.
        maximize, regularizers, options: as in :func:`sgd`.

    Returns:
        A :class:`~precond.PreconditionedGD`, which is a ``torch.optim.Optimizer``.

    Warns:
        UserWarning: where no layer that it knows trains a weight, and RMS acts on all of it, or where all of it is frozen.

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
    defaults = {"weight_decay": weight_decay, "momentum": momentum, "maximize": maximize, "measured": None, "seen": None}
    defaults |= numbers(choice)
    optimizer = make("auto", params, lr, _Auto(choice), defaults, {}, {}, regularizers, options, settle=FirstSteps())
    acting = {row.preconditioner for row in optimizer.explain().rows} - {"none (frozen)"}
    if not acting:
        warn("auto: all parameters are frozen (requires_grad=False); nothing is trained until some are thawed")
    elif all(what.startswith("RMS") for what in acting):
        warn("auto: no layer that it knows trains a weight; RMS acts on all of it")
    return optimizer
