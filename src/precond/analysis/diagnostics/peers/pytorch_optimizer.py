"""P of pytorch-optimizer's optimizers, versions 3 and 4, whose groups count the steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from precond.algebra.maps import Identity, LinearMap, Scaled
from precond.algebra.maps.eigen import eigh
from precond.algebra.maps.tucker import Tucker
from precond.analysis.diagnostics import momenta
from precond.analysis.diagnostics.peers.reading import Options, inverse_root, only, rotated, wide
from precond.analysis.diagnostics.registry import register
from precond.analysis.diagnostics.torch_optimizers import polar


def _corrected(group: Options, beta: float, less: int = 0) -> float:
    return 1 - beta ** (group["step"] - less)


_NOT_KNOWN = "cautious", "stable_adamw", "adanorm"


def _two_means(state: Options, group: Options) -> float:
    """Of AdEMAMix: a mean, and α times a slow one."""
    if group["t_alpha_beta3"] is not None:
        return math.nan
    fast, _, slow = group["betas"]
    return 1 / (1 / momenta.mean(fast) + group["alpha"] / momenta.mean(slow))


def _mean_of_differences(state: Options, group: Options) -> float:
    """Of Adan: a mean, and β₂ times one of g − g⁻, which is 2g of an alternating one."""
    of_g, of_differences, _ = group["betas"]
    return 1 / (1 / momenta.mean(of_g) + 2 * of_differences / momenta.mean(of_differences))


def _lamb_s(state: Options, group: Options) -> float:
    beta = group["betas"][0]
    return momenta.mean(beta) if group["grad_averaging"] else momenta.heavy_ball(beta)


def _shampoo_s(state: Options, group: Options) -> float:
    return math.nan if group["momentum"] else 1.0  # it folds P into its mean again and again


def _kron_s(state: Options, group: Options) -> float:
    return momenta.mean(group["momentum"])


def _muon_s(state: Options, group: Options) -> float:
    return momenta.mean(group["momentum"], group["nesterov"]) if group["use_muon"] else momenta.first_beta(state, group)


def _schedule_free_s(state: Options, group: Options) -> float:
    """Of the nominal rate, which warm-up makes shorter."""
    beta, step = group["betas"][0] if "betas" in group else group["momentum"], group.get("step", 0)
    if not step or not group["weight_sum"]:
        return 1.0
    share = momenta.newest_share(step, group)
    if group.get("decoupling_c", 0) > 0:
        share = min(1.0, share * (1 - beta) * group["decoupling_c"])
    return momenta.schedule_free(beta, share) * max(1.0, group["warmup_steps"] / step)


@register("pytorch_optimizer.Yogi", stable=momenta.unless(momenta.first_beta, *_NOT_KNOWN))
@register("pytorch_optimizer.AdEMAMix", stable=momenta.unless(_two_means, *_NOT_KNOWN))
@register("pytorch_optimizer.Adan", stable=momenta.unless(_mean_of_differences, *_NOT_KNOWN))
def adam(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = diag(1/(√r̂ + ε)), r̂ = r/(1 − βᵗ) with the last but a slow mean's β, whatever r is a mean of."""
    beta = group["betas"][2] if "exp_avg_diff" in state else group["betas"][1]
    return inverse_root((wide(state["exp_avg_sq"]) / _corrected(group, beta)).sqrt() + group["eps"])


@register("pytorch_optimizer.AdaBelief", stable=momenta.unless(momenta.first_beta, *_NOT_KNOWN))
def adabelief(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = diag(1/(√ŝ + ε)), s the mean of (g − m)²."""
    only(group, rectify=False)
    s = wide(state["max_exp_avg_var"] if group["ams_bound"] else state["exp_avg_var"])
    return inverse_root((s / _corrected(group, group["betas"][1])).sqrt() + group["eps"])


@register("pytorch_optimizer.ADOPT", stable=momenta.unless(momenta.first_beta, *_NOT_KNOWN))
def adopt(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = diag(1/max(√r, ε)) of the next step, which divides by the r before its own gradient."""
    return inverse_root(wide(state["exp_avg_sq"]).sqrt().clamp_min(group["eps"]))


@register("pytorch_optimizer.Lamb", stable=momenta.unless(_lamb_s, *_NOT_KNOWN))
def lamb(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = τ diag(1/(√r + ε)), τ the trust ratio of the tensor's last step."""
    only(group, rectify=False)
    ratio = 1.0 if group["adam"] else float(state["trust_ratio"])
    return Scaled(inverse_root(wide(state["exp_avg_sq"]).sqrt() + group["eps"]), ratio**0.5)


@register("pytorch_optimizer.ScheduleFreeAdamW", stable=_schedule_free_s)
def schedule_free_adamw(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = diag(1/(√r̂ + ε)): the step of z."""
    r = wide(state["exp_avg_sq"]) / _corrected(group, group["betas"][1])
    r = wide(state["max_exp_avg_sq"]) if group.get("ams_bound") else r
    return inverse_root((r + 1e-15).sqrt() + group["eps"])  # as it is added there


@register("pytorch_optimizer.ScheduleFreeSGD", stateless=True, stable=_schedule_free_s)
def schedule_free_sgd(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = I."""
    return Identity((param.detach(),))


@register("pytorch_optimizer.SOAP", stable=momenta.unless(momenta.first_beta, *_NOT_KNOWN))
def soap(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = Q diag(√(1 − β₂ᵗ)/(√r + ε)) Qᵀ, Q the Kronecker product of the eigenbases; I before the first of them is known."""
    only(group, normalize_gradient=False)
    if state["Q"] is None:
        return Identity((param.detach(),))
    bases = [None if len(Q) == 0 else Q for Q in state["Q"]]
    shape = list(param.shape)
    if group["merge_dims"] and param.ndim > 1:
        if any(Q is None for Q in bases):
            only(group, merge_dims=False)
        shape = [len(Q) for Q in state["Q"]]
    h = wide(state["exp_avg_sq"]).sqrt() + group["eps"]
    corrected = _corrected(group, group["betas"][1], 1) ** 0.5 if group["correct_bias"] and group["step"] > 1 else 1.0
    return rotated(bases, h / corrected, param, shape)


@register("pytorch_optimizer.Shampoo", stable=_shampoo_s)
def shampoo(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = L₁^(−1/2k) ⊗ … ⊗ L_k^(−1/2k) of a tensor of k dimensions."""
    roots = []
    for dim in range(param.ndim):
        values, V = eigh(wide(state[f"inv_pre_cond_{dim}"]))
        roots.append((V * values.clamp_min(0).sqrt()) @ V.T)
    return Tucker(roots, (param.detach(),))


@register("pytorch_optimizer.Kron", stable=_kron_s)
def kron(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = Q₁ᵀQ₁ ⊗ Q₂ᵀQ₂ ⊗ …, Q triangular, or a diagonal; a bound of the step's length is no part of it."""
    sides = [Q.conj() if Q.ndim == 1 else Q.mT for Q in map(wide, state["Q"])]
    shape = param.shape if param.ndim else torch.Size([1])
    return Tucker([s.reshape(1) if s.ndim == 0 else s for s in sides], (param.detach(),), shape)


@register("pytorch_optimizer.Muon", stable=momenta.unless(_muon_s, *_NOT_KNOWN))
def muon(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = s·(m mᵀ)^(−1/2) ⊗ I, s the adjustment to the shape; of groups with ``use_muon=False`` Adam's."""
    if not group["use_muon"]:
        return inverse_root((wide(state["exp_avg_sq"]) / _corrected(group, group["betas"][1])).sqrt() + group["eps"])
    rows, columns = param.shape[0], param[0].numel()
    s = 0.2 * max(rows, columns) ** 0.5 if group["use_adjusted_lr"] else max(1.0, rows / columns) ** 0.5
    return polar(param, state["momentum_buffer"], s)
