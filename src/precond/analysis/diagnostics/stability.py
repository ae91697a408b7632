"""How momentum moves the limit of stability of the learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from precond.optim.optimizer import PreconditionedGD


def stable_factor(optimizer: torch.optim.Optimizer) -> float:
    r"""c in the limit α·λ_max(PᵀHP) < 2c, on a quadratic with P standing still: 1 without momentum.

    With momentum β of heavy-ball kind c = 1 + β, Nesterov's (1 + β)/(1 + 2β), both over 1 − τ with dampening τ; an average of gradients
    (Adam) is heavy ball with τ = β: (1 + β)/(1 − β). Of several groups, the smallest.

    Args:
        optimizer: :class:`~precond.PreconditionedGD`, or one of those that :func:`preconditioner_of` knows.

    Returns:
        c > 0.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(1))
        >>> [round(stable_factor(o), 2) for o in (torch.optim.SGD([p]), torch.optim.SGD([p], momentum=0.9), torch.optim.Adam([p]))]
        [1.0, 1.9, 19.0]

    References:
        Cohen et al. (2021, 2022), on the edge of stability and its adaptive form.
    """
    of_group = _ours(optimizer) if isinstance(optimizer, PreconditionedGD) else _theirs
    return min(_factor(*of_group(group)) for group in optimizer.param_groups)


def _factor(beta: float, dampening: float, nesterov: bool) -> float:
    return (1 + beta) / (1 + 2 * beta if nesterov else 1) / (1 - dampening)


def _ours(optimizer: PreconditionedGD) -> Any:
    def of_group(group: Mapping[str, Any]) -> tuple[float, float, bool]:
        momentum = optimizer.naming.build(group).momentum
        if momentum is None:
            return 0.0, 0.0, False
        return momentum.beta, momentum.beta if momentum.kind == "ema" else momentum.dampening, momentum.kind == "nesterov"

    return of_group


def _theirs(group: Mapping[str, Any]) -> tuple[float, float, bool]:
    """By torch's names of options; NAdam's momentum is Nesterov's average."""
    if "betas" in group:
        beta = float(group["betas"][0])
        return beta, beta, "momentum_decay" in group
    beta = float(group.get("momentum", 0.0) or 0.0)
    return beta, float(group.get("dampening", 0.0)) if beta else 0.0, bool(group.get("nesterov", False))
