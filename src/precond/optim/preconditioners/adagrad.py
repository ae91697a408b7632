"""AdaGrad's diagonal map."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from precond.algebra import checks
from precond.algebra.maps import InverseRoot, LinearMap
from precond.optim.blocks import Block, State
from precond.optim.checking.arguments import settle
from precond.optim.preconditioners.base import Preconditioner
from precond.optim.preconditioners.seen import Seen


@dataclass(frozen=True)
class AdaGrad(Preconditioner):
    r"""Sum of squared gradients: r ← r + g², M = diag(1/(√r + ε)), P = M^(1/2).

    √r = √t·ḡ with ḡ the root mean square of all gradients so far: the √t does not change the preconditioning,
    it is a decay of the learning rate.

    Args:
        eps: ε ≥ 0.
        initial: r₀ ≥ 0.
        lr_decay: η ≥ 0; M is divided by 1 + (t−1)η.

    Example:
        >>> import torch, precond
        >>> p = torch.nn.Parameter(torch.tensor([0.0]))
        >>> optimizer = precond.PreconditionedGD([p], lr=1.0, preconditioner=precond.AdaGrad(eps=0.0))
        >>> for g in (3.0, 4.0):  # 3/√9 + 4/√25
        ...     p.grad = torch.tensor([g]); _ = optimizer.step()
        >>> round(p.item(), 4)
        -1.8

    References:
        Ye, "Understanding Adaptive Learning Rate"; Duchi, Hazan & Singer (2011).
    """

    eps: float = 1e-10
    initial: float = 0.0
    lr_decay: float = 0.0

    entrywise = True
    timeless = True
    second_moments = frozenset({"r"})
    advised_damping = 0.1

    def __post_init__(self) -> None:
        settle(self)
        checks.non_negative("AdaGrad", eps=self.eps, initial=self.initial, lr_decay=self.lr_decay)

    def looks(self, step: int) -> bool:
        return False

    def init(self, block: Block) -> dict:
        return {"r": block.zeros(self.initial)}

    def observe(self, state: State, seen: Seen) -> None:
        torch._foreach_addcmul_(state["r"], seen.gradient, seen.gradient, value=1)

    def map(self, state: State) -> LinearMap:
        h = torch._foreach_sqrt(state["r"])
        if self.eps > 0:
            torch._foreach_add_(h, self.eps)
        else:
            h = tuple(torch.where(x == 0, torch.inf, x) for x in h)
        if self.lr_decay:
            torch._foreach_mul_(h, [1 + (t - 1) * self.lr_decay for t in state.times])
        return InverseRoot(tuple(h), holes=self.eps == 0, means=state.block.means)
