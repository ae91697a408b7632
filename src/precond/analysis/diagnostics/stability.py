"""How momentum moves the limit of stability of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from precond.analysis.diagnostics import momenta, peers, torch_optimizers  # noqa: F401 - the last two register them
from precond.analysis.diagnostics.registry import registered
from precond.optim.averages import WeightAverage
from precond.optim.engine.ownership import units
from precond.optim.momentum import Momentum
from precond.optim.optimizer import PreconditionedGD
from precond.optim.optimizer.averaging import COUNT


def stable_factor(optimizer: torch.optim.Optimizer) -> float:
    r"""c in the limit α·λ_max(PᵀHP) < 2c, on a quadratic with P standing still: 1 without momentum.

    With momentum β of heavy-ball kind c = 1 + β, Nesterov's (1 + β)/(1 + 2β), both over 1 − τ with dampening τ; an average of gradients
    (Adam) is heavy ball with τ = β: (1 + β)/(1 − β). Of several parameters with momenta of their own, the smallest. Where momentum changes
    in training (NAdam, schedule-free averages) it is that of the last step; corrections of the first steps' bias are left out.

    Args:
        optimizer: :class:`~precond.PreconditionedGD`, or one of those that :func:`preconditioner_of` knows.

    Returns:
        c > 0; NaN where what is made of the gradients is not known.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(1))
        >>> [round(stable_factor(o), 2) for o in (torch.optim.SGD([p]), torch.optim.SGD([p], momentum=0.9), torch.optim.Adam([p]))]
        [1.0, 1.9, 19.0]

    References:
        Cohen et al. (2021, 2022), on the edge of stability and its adaptive form.
    """
    found = list(_ours(optimizer) if isinstance(optimizer, PreconditionedGD) else _theirs(optimizer))
    return math.nan if any(math.isnan(c) for c in found) else min(found, default=math.nan)


def _ours(optimizer: PreconditionedGD) -> Iterator[float]:
    """Of each parameter that is stepped: a preconditioner may have a momentum of its own."""
    leaves = optimizer.models.leaves(optimizer.param_groups, optimizer.observes)
    live = [i for i, leaf in enumerate(leaves) if leaf.param.requires_grad]
    for unit in units(leaves, live, [optimizer.naming.build(group) for group in optimizer.param_groups]):
        c = _of(unit.momentum)
        for i in unit.index:
            count = optimizer.state.get(leaves[i].param, {}).get(optimizer.naming.outside(COUNT))
            yield c if optimizer.average is None or not count else _led(c, optimizer.average, int(count))


def _of(momentum: Momentum | None) -> float:
    if momentum is None:
        return 1.0
    if momentum.kind == "ema":
        return momenta.mean(momentum.beta)
    return momenta.heavy_ball(momentum.beta, momentum.dampening, momentum.kind == "nesterov")


def _led(c: float, average: WeightAverage, count: int) -> float:
    """Where gradients are taken at y = x + l(x − e), e ← e + s(x − e): at −1, y = Yx with Y = 1 + 2l(1 − s)/(2 − s), and −x = y − αλ·y/c."""
    share = average.share(count)
    Y = 1 + 2 * average.lead * (1 - share) / (2 - share)
    return c * (1 + Y) / (2 * Y)


def _theirs(optimizer: torch.optim.Optimizer) -> Iterator[float]:
    """Of each parameter, by what is known of its class."""
    stable = registered(optimizer).stable
    for group in optimizer.param_groups:
        for p in group["params"]:
            yield math.nan if stable is None else stable(optimizer.state.get(p, {}), group)
