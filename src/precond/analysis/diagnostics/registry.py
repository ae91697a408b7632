"""What an optimizer's state says of P: one function per class of optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from precond.algebra.maps import LinearMap
from precond.analysis.diagnostics.momenta import Stable

MapOf = Callable[[Tensor, Mapping[str, Any], Mapping[str, Any]], LinearMap]
"""(parameter, its state, its group) ↦ P on (parameter,)."""
F = TypeVar("F", bound=MapOf)


@dataclass(frozen=True)
class Known:
    """What is known of a class.

    Attributes:
        map_of: its P.
        stateless: whether P is known before the first step.
        stable: its c; None: not known.
    """

    map_of: MapOf
    stateless: bool
    stable: Stable | None


_MAPS: dict[type[torch.optim.Optimizer] | str, Known] = {}


def register(
    *classes: type[torch.optim.Optimizer] | str, stateless: bool = False, stable: Stable | None = None
) -> Callable[[F], F]:
    r"""Teach :func:`preconditioner_of` classes of optimizers whose step is p ← p − α M·(an average of gradients).

    The function that is decorated gets one parameter, its state and its group, and returns P on (parameter,), M = P Pᵀ; the
    learning rate is not part of it. It holds for subclasses that have none of their own.

    Args:
        classes: of optimizers, or their names after that of the package that has them, ``"package.Class"``, which then need not be imported.
        stateless: whether P is known before the first step.
        stable: (state of a parameter, its group) ↦ c ≥ 1, by which its average of gradients raises the limit of the learning rate
            (:func:`stable_factor`); ``lambda state, group: 1.0`` where it averages none, and None where that is not known.

    Returns:
        A decorator, which returns the function as it is.

    Example:
        >>> import torch, precond
        >>> class SignSGD(torch.optim.SGD): ...
        >>> @precond.analysis.diagnostics.register(SignSGD, stateless=True)
        ... def _(param, state, group):  # M = diag(1/|g|)
        ...     return precond.InverseRoot((param.grad.abs(),))
        >>> p = torch.nn.Parameter(torch.ones(2)); p.grad = torch.tensor([4.0, 0.25])
        >>> precond.preconditioner_of(SignSGD([p], lr=1.0)).to_dense()
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])
    """

    def remember(function: F) -> F:
        for cls in classes:
            _MAPS[cls] = Known(function, stateless, stable)
        return function

    return remember


def registered(optimizer: torch.optim.Optimizer) -> Known:
    """What is known of an optimizer's class or of its nearest base.

    Raises:
        TypeError: where there is none.
    """
    for cls in type(optimizer).__mro__:
        for key in (cls, f"{cls.__module__.partition('.')[0]}.{cls.__name__}"):
            if key in _MAPS:
                return _MAPS[key]
    known = ", ".join(sorted(c if isinstance(c, str) else c.__name__ for c in _MAPS))
    wrapped = ""
    if isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        wrapped = ", or give the optimizer inside it, optimizer.optimizer"
    raise TypeError(
        f"preconditioner_of: P of {type(optimizer).__name__} is not known (known are PreconditionedGD, {known}); state it with "
        f"@precond.analysis.diagnostics.register({type(optimizer).__name__}), a function (param, state, group) -> LinearMap{wrapped}"
    )
