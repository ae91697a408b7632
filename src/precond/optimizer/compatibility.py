"""Which strategies go together, and which parameters they can step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from precond import contracts
from precond.blocks import Leaf
from precond.engine.cells import Choice
from precond.momentum import Momentum
from precond.preconditioners import Preconditioner
from precond.regularizers import Regularizer


def validate(name: str, choice: Choice, statistics_from: str) -> None:
    """Raise where strategies do not go together."""
    contracts.instance(name, "preconditioner", choice.preconditioner, Preconditioner, "one, such as precond.RMS()")
    if choice.momentum is not None:
        contracts.instance(name, "momentum", choice.momentum, Momentum, "None or an average, and Momentum(0.9) is one")
    for strategy in (choice.preconditioner, *choice.regularizers):
        contracts.frozen(name, strategy)
    _check_momenta(name, choice.preconditioner)
    for r in choice.regularizers:
        kind = type(r).__name__
        if missing := [field for field in ("space", *r.scalars) if not hasattr(r, field)]:
            raise TypeError(
                f'{name}: {kind} lacks {missing[0]!r}; give it a field, such as `lam: float` and `space: str = "z"` '
                "(scalars names the numbers that groups may set)"
            )
        r.validate(choice.preconditioner)
        if statistics_from == "total" and r.circular:
            raise ValueError(
                f"{name}: statistics_from='total' builds P from the regularized gradient, and {type(r).__name__} in z needs P "
                "for that gradient; use statistics_from='loss' or 'lagged', or space='p'"
            )
    second = [type(r).__name__ for r in choice.regularizers if r.probes or r.exact]
    if len(second) > 1:
        raise ValueError(f"{name}: {' and '.join(second)} both need a second gradient; at most one regularizer may")


def _check_momenta(name: str, choice: Any) -> None:
    """Raise where a preconditioner within a choice has a momentum of its own that is none."""
    if isinstance(choice, tuple | list):
        for item in choice:
            _check_momenta(name, item)
    elif isinstance(choice, Preconditioner) and is_dataclass(choice):
        if not isinstance(choice.momentum, Momentum | None):
            raise TypeError(f"{name}: momentum of {type(choice).__name__} must be a Momentum or None, got {choice.momentum!r}")
        _check_momenta(name, [getattr(choice, f.name) for f in fields(choice)])


def listed(name: str, regularizers: Any) -> tuple[Regularizer, ...]:
    """Regularizers as a tuple; raise TypeError where they are none."""
    if isinstance(regularizers, Regularizer | Tensor):
        raise TypeError(f"{name}: regularizers must be a list of them, got {regularizers!r}; put it in brackets")
    contracts.instance(name, "regularizers", regularizers, Iterable, "a list, such as [precond.L2(1e-4)]")
    out = tuple(regularizers)
    for r in out:
        contracts.instance(name, "each of regularizers", r, Regularizer, "one, such as precond.L2(1e-4)")
    return out


def check_precision(leaves: Sequence[Leaf], choice: Choice, rounding: str) -> None:
    """Refuse finite differences on 16-bit parameters that would mostly not move."""
    narrow = [leaf.name for leaf in leaves if leaf.param.dtype in (torch.float16, torch.bfloat16)]
    for r in choice.regularizers:
        if r.probes and narrow and rounding != "kahan":
            raise ValueError(
                f"{type(r).__name__} moves parameters by steps that 16-bit parameters ({narrow[0]}) mostly round away: keep "
                "float32 parameters under torch.autocast, or pass rounding='kahan'"
            )
