"""The 1-norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from precond.algebra import checks, vec
from precond.algebra.schedules import Schedule
from precond.algebra.spaces import Prox, Term
from precond.algebra.vec import Vec
from precond.optim.blocks import Rule
from precond.optim.checking.arguments import settle
from precond.optim.preconditioners.base import Preconditioner
from precond.optim.regularizers.base import At, Regularizer, needs_inverse, needs_root


@dataclass(frozen=True)
class L1(Regularizer):
    r"""λ‖z‖₁ or λ‖p‖₁, by subgradient or by a proximal step.

    Subgradient: the tangent λP sign(P⁻¹p) in z, the cotangent λ sign(p) in p.
    Proximal, after the gradient step: p ← P·soft_{αλ}(P⁻¹p) in z; for diagonal P this is the threshold αλP on p, in p and for
    diagonal M the threshold αλM. Exact zeros of p appear where P is diagonal.

    Args:
        lam: λ ≥ 0.
        space: ``"z"`` or ``"p"``.
        proximal: proximal step in place of the subgradient.
        where: which parameters are penalized; None: all.

    Raises:
        ValueError: (with an optimizer) in z where P has no stated root or no inverse; proximal in p where M is not diagonal.

    Example:
        >>> import torch, precond
        >>> p = torch.nn.Parameter(torch.tensor([1.0, 0.01]))
        >>> P = precond.Fixed(precond.Diagonal((torch.tensor([1.0, 1.0]),)))
        >>> optimizer = precond.PreconditionedGD([p], lr=0.1, preconditioner=P, regularizers=[precond.L1(0.5, proximal=True)])
        >>> p.grad = torch.tensor([1.0, 0.0]); _ = optimizer.step()
        >>> [round(x, 4) for x in p.tolist()]  # soft threshold at 0.05: the second is 0 exactly
        [0.85, 0.0]

    References:
        Tibshirani (1996); Daubechies, Defrise & De Mol (2004).
    """

    lam: float | Schedule
    space: Literal["z", "p"] = "z"
    proximal: bool = False
    where: Rule | None = None

    def __post_init__(self) -> None:
        settle(self)
        if not isinstance(self.lam, Schedule):
            checks.non_negative("L1", lam=self.lam)

    def validate(self, preconditioner: Preconditioner) -> None:
        if self.space == "z":
            needs_root("L1(space='z')", "the 1-norm of z", preconditioner)
            needs_inverse("L1(space='z')", "the 1-norm of z", preconditioner)
        elif self.proximal and not preconditioner.diagonal:
            raise ValueError(
                f"L1(space='p', proximal=True) needs a diagonal M, and that of {type(preconditioner).__name__} is not; "
                "use proximal=False or space='z'"
            )

    @property
    def needs_map(self) -> bool:
        return self.space == "z" or self.proximal

    @property
    def joins_gradient(self) -> bool:
        return self.space == "p" and not self.proximal

    def term(self, at: At) -> Term:
        if self.proximal:
            return Prox(lambda p: self._prox(p, at))
        sign = vec.map_(torch.sign, at.space.solve(at.p))
        return at.space.raised(at.space.push(vec.scale(sign, at["lam"])))

    def _prox(self, p: Vec, at: At) -> Vec:
        threshold = [lr * lam for lr, lam in zip(at.lr, at["lam"], strict=True)]
        ones = vec.map_(torch.ones_like, p)
        if self.space == "z" and not at.map.diagonal:
            z = vec.scale(ones, threshold)
            return at.map.mv(_soft(at.map.solve(p), z))
        weights = at.map.mv(ones) if self.space == "z" else at.map.gram(ones)
        return _soft(p, vec.scale(vec.map_(torch.abs, weights), threshold))

    def value(self, at: At) -> Tensor | float:
        return at.sums.norm(vec.scale(at.space.solve(at.p), at["lam"]), 1)


def _soft(x: Vec, threshold: Vec) -> Vec:
    """sign(x)·max(|x| − t, 0)."""
    return tuple(u.sign() * (u.abs() - t).clamp_min(0) for u, t in zip(x, threshold, strict=True))
