"""P of heavyball's optimizers, version 3, whose state is that of a chain of transforms, each with a number behind its names."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from precond.algebra.maps import Identity, LinearMap
from precond.algebra.maps.tucker import Tucker
from precond.analysis.diagnostics import momenta
from precond.analysis.diagnostics.peers.reading import Options, inverse_root, only, rotated, wide
from precond.analysis.diagnostics.registry import register
from precond.analysis.diagnostics.torch_optimizers import polar


def _of(state: Options, *names: str) -> Any:
    """What the chain keeps under one of some names, of a parameter that it does not split.

    Raises:
        KeyError: where it keeps none, or several.
    """
    views = [view for view in state.values() if isinstance(view, dict)]
    found = [view[key] for view in views for key in view if re.fullmatch(rf"\w*_({'|'.join(names)})_\d+", str(key))]
    if len(found) != 1:
        raise KeyError(" or ".join(names))
    return found[0]


_NOT_KNOWN = "caution", "mars", "warmup_steps"


def _nadam_s(state: Options, group: Options) -> float:
    view = next((view for view in state.values() if isinstance(view, dict)), {})
    return momenta.nadam(view, group)


@register("heavyball.AdamW", stable=momenta.unless(momenta.first_beta, *_NOT_KNOWN))
@register("heavyball.NAdam", stable=momenta.unless(_nadam_s, *_NOT_KNOWN))
@register("heavyball.RMSprop", stable=momenta.unless(momenta.gradient, *_NOT_KNOWN))
@register("heavyball.SFAdamW")
def adam(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = diag(1/max(√r, ε)), r the mean of g² whose weights add up to 1; of the schedule-free one the step of z."""
    return inverse_root(wide(_of(state, "exp_avg_sq")).sqrt().clamp_min(group["eps"]).reshape(param.shape))


@register("heavyball.SOAP", stable=momenta.unless(momenta.first_beta, *_NOT_KNOWN))
def soap(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = Q diag(1/max(√r, ε)) Qᵀ, Q the Kronecker product of the eigenbases."""
    only(group, split=False)
    r, bases = wide(_of(state, "exp_avg_sq")), _of(state, "Q")
    shape = r.shape[1:] if r.numel() == param.numel() and r.ndim == len(bases) + 1 else r.shape
    sides = [None if Q is None else Q.reshape(Q.shape[-2:]) for Q in bases]
    return rotated(sides, r.sqrt().clamp_min(group["eps"]), param, shape)


@register("heavyball.PSGDKron")
def kron(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = Q₁ᵀQ₁ ⊗ Q₂ᵀQ₂ ⊗ …, Q triangular, or a diagonal."""
    only(group, split=False, merge_dims=False)
    return Tucker([_side(Q) for Q in _of(state, "Q")], (param.detach(),))


def _side(Q: Tensor | tuple[Any, Tensor]) -> Tensor:
    """Qᵀ, or the diagonal of one, of a bucket of one parameter; the triangle may be written as a line."""
    if isinstance(Q, Tensor):
        q = wide(Q)[0]
        return q if q.ndim == 1 else q.mT
    (*_, n), line = Q
    q = wide(line).new_zeros(n, n)
    q[tuple(torch.triu_indices(n, n))] = wide(line).flatten()
    return q.mT


@register("heavyball.Muon")
def muon(param: Tensor, state: Options, group: Options) -> LinearMap:
    """M = s·(m mᵀ)^(−1/2) ⊗ I of matrices, s the adjustment to the shape; of vectors, which are not orthogonalized, I."""
    if param.ndim < 2:
        return Identity((param.detach(),))
    rows, columns = param.shape[0], param[0].numel()
    return polar(param, _of(state, "momentum", "exp_avg"), max(1.0, rows / columns) ** 0.5)
