r"""P of torch.optim's optimizers: what multiplies the (averaged) gradient in their steps, M = P Pᵀ, without the learning rate.

Momentum is an average over gradients and no part of P; Adam's correction of the bias of m belongs to it, that of r to P.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from precond.algebra.maps import Identity, InverseRoot, Kronecker, LinearMap
from precond.analysis.diagnostics import momenta
from precond.analysis.diagnostics.registry import register
from precond.optim.blocks import state_dtype

Options = Mapping[str, Any]


def _wide(t: Tensor) -> Tensor:
    """16-bit state in float32."""
    return t.detach().to(state_dtype(t.dtype))


def _inverse_root(h: Tensor) -> LinearMap:
    """P = diag(h^(−1/2)); entries of h that are 0, without a gradient so far, are not moved."""
    return InverseRoot((torch.where(h == 0, torch.inf, h),))


def _step(state: Options) -> float:
    return float(state["step"])


def _heavy_ball(state: Options, group: Options) -> float:
    return momenta.heavy_ball(float(group["momentum"]), float(group.get("dampening", 0.0)), bool(group.get("nesterov", False)))


def _mean(state: Options, group: Options) -> float:
    return momenta.mean(float(group["momentum"]), bool(group["nesterov"]))


@register(torch.optim.SGD, stateless=True, stable=_heavy_ball)
def sgd(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = I."""
    return Identity((param.detach(),))


@register(torch.optim.Adam, torch.optim.AdamW, stable=momenta.first_beta)
@register(torch.optim.NAdam, stable=momenta.nadam)
def adam(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = diag(1/(√r̂ + ε)), r̂ = r/(1 − β₂ᵗ), or the largest r so far in place of r (amsgrad)."""
    r = _wide(state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"])
    return _inverse_root((r / (1 - group["betas"][1] ** _step(state))).sqrt() + group["eps"])


@register(torch.optim.RAdam, stable=momenta.first_beta)
def radam(param: Tensor, state: Options, group: Options) -> LinearMap:
    """Adam's r̂ (ε added before its bias is corrected) times the rectification; M = I in the first steps (ρ_t ≤ 5)."""
    beta, t = group["betas"][1], _step(state)
    end = 2 / (1 - beta) - 1
    length = end - 2 * t * beta**t / (1 - beta**t)
    if length <= 5:
        return Identity((param.detach(),))
    rectification = ((length - 4) * (length - 2) * end / ((end - 4) * (end - 2) * length)) ** 0.5
    h = _wide(state["exp_avg_sq"]).sqrt() + group["eps"]
    return _inverse_root(h / ((1 - beta**t) ** 0.5 * rectification))


@register(torch.optim.Adamax, stable=momenta.first_beta)
def adamax(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = diag(1/u), u the fading maximum of |g| + ε."""
    return _inverse_root(_wide(state["exp_inf"]))


@register(torch.optim.RMSprop, stable=_heavy_ball)
def rmsprop(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = diag(1/(√r + ε)), r less the square of the mean gradient where it is centered."""
    r = _wide(state["square_avg"])
    if group["centered"]:
        r = (r - _wide(state["grad_avg"]).square()).clamp_min(0)
    return _inverse_root(r.sqrt() + group["eps"])


@register(torch.optim.Adagrad, stable=momenta.gradient)
def adagrad(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = diag(1/(√r + ε))/(1 + (t − 1)η), η the ``lr_decay``."""
    decay = 1 + (_step(state) - 1) * group["lr_decay"]
    return _inverse_root((_wide(state["sum"]).sqrt() + group["eps"]) * decay)


@register(torch.optim.Adadelta, stable=momenta.gradient)
def adadelta(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = diag(√(d + ε)/√(r + ε)), d the running mean of squared steps: the M that the next step begins with."""
    eps = group["eps"]
    return _inverse_root(((_wide(state["square_avg"]) + eps) / (_wide(state["acc_delta"]) + eps)).sqrt())


@register(torch.optim.Muon, stable=_mean)
def muon(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = s·(m mᵀ)^(−1/2) ⊗ I with the momentum m of a matrix; s is the adjustment of the learning rate to the shape."""
    rows, columns = param.shape
    match group.get("adjust_lr_fn"):
        case None | "original":
            s = max(1.0, rows / columns) ** 0.5
        case _:  # match_rms_adamw
            s = 0.2 * max(rows, columns) ** 0.5
    return polar(param, state["momentum_buffer"], s)


def polar(param: Tensor, momentum: Tensor, s: float) -> LinearMap:
    """M = s·(m mᵀ)^(−1/2) ⊗ I: M m is s times the polar factor of m, to which Muon's iteration comes near.

    The factor stands on the shorter side of m, seen as a matrix (out, rest). M is 0 in the null space of m, and so is P⁻¹.
    """
    m = _wide(momentum).flatten(1)
    rows, columns = m.shape
    U, sigma, Vh = torch.linalg.svd(m, full_matrices=False)
    kept = sigma > sigma[:1] * max(m.shape) * torch.finfo(m.dtype).eps
    h, like = torch.where(kept, sigma, torch.inf) / s, (param.detach(),)
    rotation = Kronecker(U, None, like) if rows <= columns else Kronecker(None, Vh.T, like)
    along = (h[:, None] if rows <= columns else h).expand(rows, columns).reshape(param.shape)
    return rotation @ InverseRoot((along,)) @ rotation.T
