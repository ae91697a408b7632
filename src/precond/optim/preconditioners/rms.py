"""RMSProp's and Adam's diagonal map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from precond.algebra import checks
from precond.algebra.maps import InverseRoot, LinearMap
from precond.optim.blocks import Block, State
from precond.optim.checking.arguments import settle
from precond.optim.preconditioners.base import Preconditioner
from precond.optim.preconditioners.seen import Seen


@dataclass(frozen=True)
class RMS(Preconditioner):
    r"""Running mean of squared gradients: r ← ρr + (1−ρ)g², M = diag(1/(√r̂ + ε)), P = M^(1/2).

    Args:
        decay: ρ in [0, 1). ``decay=0`` takes the single gradient, M g = sign(g): the paper's cautionary example.
        eps: ε ≥ 0, added to √r̂. With ε = 0, entries that never had a gradient are left where they are.
        start: ``"zero"``, r₀ = 0, or ``"first_gradient"``, r₁ = g₁² (the paper's, eqs. 6–7), which needs no bias correction.
        bias_correction: with ``start="zero"``, r̂ = r/(1−ρᵗ) (Adam); without, r̂ = r (torch's RMSprop).
        centered: r̂ − ḡ², ḡ the running mean of g; only with ``start="zero"`` and no bias correction, since
            otherwise the first variance is zero.
        amsgrad: the running maximum of r in place of r.

    Raises:
        ValueError: for ``centered`` with another start, or with bias correction.

    Example:
        >>> import torch, precond
        >>> p = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> opt = precond.PreconditionedGD([p], lr=0.5, preconditioner=RMS(decay=0.0, eps=0.0))
        >>> p.grad = torch.tensor([4.0, -0.1]); _ = opt.step(); p.tolist()
        [0.5, 1.5]

    References:
        Ye, eqs. (6)–(8); Tieleman & Hinton (2012); Kingma & Ba (2015); Reddi et al. (2018) for amsgrad.
    """

    decay: float = 0.999
    eps: float = 1e-8
    start: Literal["zero", "first_gradient"] = "zero"
    bias_correction: bool = True
    centered: bool = False
    amsgrad: bool = False

    entrywise = True
    timeless = True
    optional = frozenset({"r_max", "scale"})
    second_moments = frozenset({"r"})
    advised_damping = 0.1

    def __post_init__(self) -> None:
        settle(self)
        checks.fraction("RMS", decay=self.decay)
        checks.non_negative("RMS", eps=self.eps)
        if self.centered and (self.start == "first_gradient" or self.bias_correction):
            raise ValueError(
                "RMS: centered=True needs start='zero' and bias_correction=False, as in torch.optim.RMSprop; "
                "otherwise the variance of the first gradient is zero and the first step has length 1/eps"
            )

    def looks(self, step: int) -> bool:
        return False

    def init(self, block: Block) -> dict:
        state = {"r": block.zeros()}
        if self.centered:
            state["mean"] = block.zeros()
        if self.amsgrad:
            state["r_max"] = block.zeros()
        return state

    def observe(self, state: State, seen: Seen) -> None:
        g = seen.gradient
        if self.start == "first_gradient" and "clock" in state:
            for r, gi, t in zip(state["r"], g, state.times, strict=True):
                torch.where(t == 1, gi.square(), r.mul(self.decay).addcmul_(gi, gi, value=1 - self.decay), out=r)
        elif self.start == "first_gradient" and 1 in (steps := state.steps):
            for r, gi, t in zip(state["r"], g, steps, strict=True):
                r.copy_(gi.square()) if t == 1 else r.mul_(self.decay).addcmul_(gi, gi, value=1 - self.decay)
        else:
            torch._foreach_mul_(state["r"], self.decay)
            torch._foreach_addcmul_(state["r"], g, g, value=1 - self.decay)
        if self.centered:
            torch._foreach_lerp_(state["mean"], g, 1 - self.decay)
        if self.amsgrad:
            torch._foreach_maximum_(state["r_max"], state["r"])

    def map(self, state: State) -> LinearMap:
        r = state["r_max"] if self.amsgrad else state["r"]
        if self.centered:
            r = torch._foreach_addcmul(r, state["mean"], state["mean"], value=-1)
            # ḡ² ≤ r holds exactly, not after rounding; torch.optim.RMSprop lets the root of a negative number be NaN.
            torch._foreach_clamp_min_(r, 0.0)
        h = torch._foreach_sqrt(r)
        if self.start == "zero" and self.bias_correction:
            torch._foreach_div_(h, [x**0.5 for x in state.unbiased(self.decay)])
        if self.eps > 0:
            torch._foreach_add_(h, self.eps)
        else:
            h = tuple(torch.where(x == 0, torch.inf, x) for x in h)
        return InverseRoot(tuple(h), holes=self.eps == 0, means=state.block.means)
