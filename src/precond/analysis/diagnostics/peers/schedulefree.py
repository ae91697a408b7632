"""P of schedule-free optimizers (Defazio et al., 2024): the step of z, of which x and y are averages."""

from __future__ import annotations

import math

from torch import Tensor

from precond.algebra.maps import Identity, LinearMap
from precond.analysis.diagnostics import momenta
from precond.analysis.diagnostics.peers.reading import Options, inverse_root, wide
from precond.analysis.diagnostics.registry import register


def _stable(state: Options, group: Options) -> float:
    """Of the nominal rate, which warm-up and rectification make shorter."""
    beta = float(group["betas"][0] if "betas" in group else group["momentum"])
    if not group["k"]:
        return 1.0
    if not group["scheduled_lr"]:
        return math.inf  # it does not move
    return momenta.schedule_free(beta, momenta.newest_share(group["k"], group)) * group["lr"] / group["scheduled_lr"]


@register("schedulefree.AdamWScheduleFree", stable=_stable)
@register("schedulefree.AdamWScheduleFreeClosure")
def adamw(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = diag(1/(√r̂ + ε)), r̂ = r/(1 − β₂ᵏ)."""
    return inverse_root((wide(state["exp_avg_sq"]) / (1 - group["betas"][1] ** group["k"])).sqrt() + group["eps"])


@register("schedulefree.RAdamScheduleFree", stable=_stable)
@register("schedulefree.RAdamScheduleFreeClosure")
def radam(param: Tensor, state: Options, group: Options) -> LinearMap:
    """The same, without the rectification, which multiplies the learning rate; M = I in the first steps (ρ_t ≤ 4)."""
    beta, k = group["betas"][1], group["k"]
    end = 2 / (1 - beta) - 1
    if end - 2 * k * beta**k / (1 - beta**k) <= 4:
        return Identity((param.detach(),))
    return adamw(param, state, group)


@register("schedulefree.SGDScheduleFree", stateless=True, stable=_stable)
@register("schedulefree.SGDScheduleFreeClosure", stateless=True)
def sgd(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = I."""
    return Identity((param.detach(),))
