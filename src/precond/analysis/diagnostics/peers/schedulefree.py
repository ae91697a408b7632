"""P of schedule-free optimizers (Defazio et al., 2024): the step of z, of which x and y are averages."""

from __future__ import annotations

from torch import Tensor

from precond.algebra.maps import Identity, LinearMap
from precond.analysis.diagnostics.peers.reading import Options, inverse_root, wide
from precond.analysis.diagnostics.registry import register


@register("schedulefree.AdamWScheduleFree", "schedulefree.AdamWScheduleFreeClosure")
def adamw(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = diag(1/(√r̂ + ε)), r̂ = r/(1 − β₂ᵏ)."""
    return inverse_root((wide(state["exp_avg_sq"]) / (1 - group["betas"][1] ** group["k"])).sqrt() + group["eps"])


@register("schedulefree.RAdamScheduleFree", "schedulefree.RAdamScheduleFreeClosure")
def radam(param: Tensor, state: Options, group: Options) -> LinearMap:
    """The same, without the rectification, which multiplies the learning rate; M = I in the first steps (ρ_t ≤ 4)."""
    beta, k = group["betas"][1], group["k"]
    end = 2 / (1 - beta) - 1
    if end - 2 * k * beta**k / (1 - beta**k) <= 4:
        return Identity((param.detach(),))
    return adamw(param, state, group)


@register("schedulefree.SGDScheduleFree", "schedulefree.SGDScheduleFreeClosure", stateless=True)
def sgd(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = I."""
    return Identity((param.detach(),))
