"""Normalizations by what of them can be told from the module: where their features lie, γ and β, and how to do without these."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Norm = _NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm
"""Batch, instance, group, layer and RMS normalization."""
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

_CALLED = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Features:
    """The features that a normalization has γ and β for.

    Attributes:
        count: how many.
        last: whether they are the last dimension; else they are channels, dimension 1.
        whole: whether γ has an entry for each position, too, as layer normalization over several dimensions has.
        flat: whether a linear layer may follow without a flattening.
    """

    count: int
    last: bool
    whole: bool
    flat: bool

    @classmethod
    def of(cls, norm: nn.Module) -> Features:
        """Of a normalization; one of one dimension, or of groups, is taken to see (N, features) in front of a linear layer."""
        if isinstance(norm, nn.LayerNorm | nn.RMSNorm):
            shape = torch.Size(norm.normalized_shape)
            return cls(shape.numel(), True, len(shape) > 1, len(shape) == 1)
        if isinstance(norm, nn.GroupNorm):
            return cls(norm.num_channels, False, False, True)
        assert isinstance(norm, _NormBase)
        return cls(norm.num_features, False, False, isinstance(norm, nn.BatchNorm1d | nn.SyncBatchNorm))


def gamma_beta(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """γ and β, of one entry a feature, in float64; None where it has neither."""
    gamma: Tensor | None = getattr(norm, "weight", None)
    beta: Tensor | None = getattr(norm, "bias", None)
    like = beta if gamma is None else gamma
    if like is None:
        return None
    ones = torch.ones(like.numel(), dtype=torch.float64, device=like.device)
    return (
        ones if gamma is None else gamma.detach().double().flatten(),
        torch.zeros_like(ones) if beta is None else beta.detach().double().flatten(),
    )


def own_forward(norm: nn.Module) -> bool:
    """Whether a subclass of a known normalization does something else, such as layer normalization of channels."""
    base = next(kind for kind in (*_CALLED, _NormBase) if isinstance(norm, kind))
    return base in _CALLED and (type(norm).forward is not base.forward or "forward" in vars(norm))


def without_affine(norm: nn.Module) -> nn.Module:
    """The module itself, its γ and β taken away."""
    setattr(norm, "elementwise_affine" if isinstance(norm, nn.LayerNorm | nn.RMSNorm) else "affine", False)
    norm.register_parameter("weight", None)
    if hasattr(norm, "bias"):
        norm.register_parameter("bias", None)
    return norm
