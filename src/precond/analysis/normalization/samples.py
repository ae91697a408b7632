r"""Normalization of each sample by its own mean and size: H̃ = C H D, C from the left, as a preconditioner acts, and D from the right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_KINDS = nn.LayerNorm | nn.RMSNorm | nn.GroupNorm


@dataclass(frozen=True, eq=False)
class SampleScaling:
    r"""What layer, RMS or group normalization without γ and β does to features, h̃_j = C h_j / s_j, with an s_j for each group of features.

    C subtracts each group's mean (RMS normalization: C = I), s_j² is the group's mean square (and ε) of C h_j. On the extended inputs
    H_e = [e, Hᵀ]ᵀ of a neuron behind it, H̃_e = [e, (C H D)ᵀ]ᵀ with D = diag(1/s_j). C acts on rows, as Pᵀ does in G_e = PᵀH_e; D acts on
    columns, which no P does. A P with PᵀH_e = H̃_e exists only where the sizes s_j are alike: then it is ``nearest()``.

    Attributes:
        center: C, (n, n), float64.
        sizes: s_j, (groups, N), float64.
        squares: the mean of (C h_j)² over a group, s_j² less ε, (groups, N).

    References:
        Ba, Kiros & Hinton (2016); Wu & He (2018); Zhang & Sennrich (2019). Ye, eqs. 25–26, has what P is for batch normalization.
    """

    center: Tensor
    sizes: Tensor
    squares: Tensor

    @classmethod
    def of(cls, norm: nn.Module, h: Tensor) -> SampleScaling:
        """From a module and what it is called with.

        Args:
            norm: ``nn.LayerNorm`` or ``nn.RMSNorm`` over one dimension, or ``nn.GroupNorm``; γ and β are passed by (:func:`collapse_affine`).
            h: one row a sample, (N, n).

        Raises:
            TypeError: for another module.
            ValueError: for another shape.
        """
        if not isinstance(norm, _KINDS):
            raise TypeError(
                f"SampleScaling.of: norm must be an nn.LayerNorm, nn.RMSNorm or nn.GroupNorm, got {type(norm).__name__}"
            )
        n = norm.num_channels if isinstance(norm, nn.GroupNorm) else torch.Size(norm.normalized_shape).numel()
        if h.ndim != 2 or h.shape[1] != n:
            raise ValueError(
                f"SampleScaling.of: h must have shape (N, {n}), one row a sample, got {tuple(h.shape)}; flatten other dimensions"
            )
        groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else 1
        eps = torch.finfo(h.dtype).eps if norm.eps is None else norm.eps
        h = h.detach().double()
        size = n // groups
        mean = torch.ones(size, size, dtype=h.dtype, device=h.device) / size
        block = torch.eye(size, dtype=h.dtype, device=h.device) - (0 if isinstance(norm, nn.RMSNorm) else mean)
        center = torch.block_diag(*[block] * groups)
        squares = (h @ center).reshape(len(h), groups, size).square().mean(2).T
        return cls(center, (squares + eps).sqrt(), squares)

    @property
    def weights(self) -> Tensor:
        """1/s_j², (groups, N): without bias the Hessian behind RMS normalization is H (D S D) Hᵀ, that of samples with these weights."""
        return 1 / self.sizes.square()

    def nearest(self) -> Tensor:
        r"""The P of the form diag(1, c_g C) for which PᵀH_e comes nearest to H̃_e in the Frobenius norm, (n + 1, n + 1), rows [b; w].

        c = Σ(s_j² − ε)/s_j / Σ(s_j² − ε) of each group. It is singular along the means of groups, as the Hessian behind the normalization is.
        """
        c = (self.squares / self.sizes).sum(1) / self.squares.sum(1)
        P = torch.zeros(len(self.center) + 1, len(self.center) + 1, dtype=self.center.dtype, device=self.center.device)
        P[0, 0] = 1
        P[1:, 1:] = c.repeat_interleave(len(self.center) // len(c))[:, None] * self.center
        return P

    @property
    def miss(self) -> float:
        r"""How far ``nearest()`` is off, ‖C_g H(cI − D)‖/‖C_g H D‖ of all groups together: for ε = 0 and one group σ_s/√(mean of s²)."""
        ratio = self.squares / self.sizes.square()
        c = (self.squares / self.sizes).sum(1, keepdim=True) / self.squares.sum(1, keepdim=True)
        return float((self.squares * (c - 1 / self.sizes).square()).sum().div(ratio.sum()).sqrt())
