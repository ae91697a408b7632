"""The squared 2-norm: weight decay in z, Tikhonov's penalty in p."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from precond.algebra import checks, vec
from precond.algebra.schedules import Schedule
from precond.algebra.spaces import Term
from precond.algebra.vec import Scalar
from precond.optim.blocks import Rule
from precond.optim.checking.arguments import settle
from precond.optim.preconditioners.base import Preconditioner
from precond.optim.regularizers.base import At, Regularizer


@dataclass(frozen=True)
class L2(Regularizer):
    r"""λ‖z‖² or λ‖p‖².

    In z the step is p ← p − αM g − 2αλp for every invertible P: decoupled weight decay (Ye, eq. 9).
    The gradient of λ‖z‖² is 2λz: torch's ``weight_decay`` w is the penalty (w/2)‖·‖², so that λ = w/2. In p it is p ← p − αM(g + 2λp) (eq. 10).

    Args:
        lam: λ ≥ 0.
        space: ``"z"`` or ``"p"``.
        where: which parameters are decayed; None: all.

    Example:
        >>> import torch, precond
        >>> p = torch.nn.Parameter(torch.tensor([1.0]))
        >>> P = precond.Fixed(precond.Diagonal((torch.tensor([2.0]),)))
        >>> optimizer = precond.PreconditionedGD([p], lr=0.1, preconditioner=P, regularizers=[precond.L2(0.5)])
        >>> p.grad = torch.tensor([1.0]); _ = optimizer.step()
        >>> round(p.item(), 4)  # 1 − 0.1·(4·1) − 2·0.1·0.5·1: M = 4 is not on the decay
        0.5

    References:
        Ye, eqs. (9), (10); Loshchilov & Hutter (2019).
    """

    lam: float | Schedule
    space: Literal["z", "p"] = "z"
    where: Rule | None = None

    def __post_init__(self) -> None:
        settle(self)
        if not isinstance(self.lam, Schedule):
            checks.non_negative("L2", lam=self.lam)

    def validate(self, preconditioner: Preconditioner) -> None:
        """‖z‖² needs no inverse where all of z is penalized: its term is 2λp."""

    def waits(self, at: At) -> bool:
        return self.space == "z" and not self._uniform(at)

    def _uniform(self, at: At) -> bool:
        """Whether λ is one number on what P takes jointly: P(2λP⁻¹p) = 2λp then, whatever P is."""
        lam = at["lam"]
        return all(vec.uniform(lam[span]) for span in at.joint)

    def term(self, at: At) -> Term:
        two_lam = vec.combined(lambda x: 2 * x, at["lam"])
        if self._uniform(at) or at.space.map.diagonal:
            return at.space.raised(at.p, two_lam)  # P(2λP⁻¹p), without the detour
        return at.space.raised(at.space.scaled(at.p, two_lam))

    def stiffness(self, at: At) -> Sequence[Scalar]:
        return [2 * x if self.joins_gradient else 0.0 for x in at["lam"]]

    def value(self, at: At) -> Tensor | float:
        """λ‖z‖² = λ pᵀM⁻¹p, which asks for no root; where M is singular, over what it reaches."""
        if self._uniform(at):
            return at.sums.dot(vec.scale(at.p, at["lam"]), at.space.map.gram_solve(at.p))
        return at.sums.dot(at.p, at.space.map.gram_solve(at.space.scaled(at.p, at["lam"])))  # P⁻ᵀΛP⁻¹ = M⁻¹(PΛP⁻¹)
