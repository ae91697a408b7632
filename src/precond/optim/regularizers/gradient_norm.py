"""Gradient regularization: the norm of the gradient, in p or in z."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from precond.algebra import checks, vec
from precond.algebra.schedules import Schedule
from precond.algebra.sharding import Sums
from precond.algebra.spaces import Cotangent, Tangent, Term
from precond.algebra.vec import Scalar, Vec
from precond.optim.blocks import Rule
from precond.optim.checking.arguments import settle
from precond.optim.preconditioners.base import Preconditioner
from precond.optim.regularizers.base import At, Regularizer, needs_root

# ‖εd‖/‖p‖, one-sided and central: where truncation and cancellation balance.
_STEPS = {torch.float64: (1e-7, 1e-5), torch.float32: (1e-4, 1e-3), torch.bfloat16: (1e-2, 3e-2), torch.float16: (3e-3, 1e-2)}
METHODS = ("forward", "backward", "central", "exact")


@dataclass(frozen=True)
class GradientNorm(Regularizer):
    r"""λ‖y‖_q^s with y = Pᵀ∇L (in z, the paper's proposal) or y = ∇L (in p).

    Its gradient is the cotangent λH d, d = P w, w = s‖y‖^(s−1)u_q, u_q = sign(y)|y|^(q−1)/‖y‖_q^(q−1), so that for
    q = 2, s = 2 the step is p ← p − αM g − 2αλM H M g (Ye, eq. 12). H d by finite differences of gradients,

    | method | λH d ≈ | gradients in all |
    |---|---|---|
    | ``"forward"`` | λ[g(p+εd) − g]/ε | 2 |
    | ``"backward"`` | λ[g − g(p−εd)]/ε | 2 |
    | ``"central"`` | λ[g(p+εd) − g(p−εd)]/2ε | 3 |

    or by double backprop (``"exact"``, which takes a :class:`~precond.LossClosure`).

    Args:
        lam: λ ≥ 0, a number or a schedule; ``TimesLr(k / 4)`` is k times the penalty that plain preconditioned descent
            implies. Where groups differ in λ, each scales its part of w; a group with λ = 0 takes no part.
        space: ``"z"`` or ``"p"``.
        power: s, 1 or 2.
        q: q ≥ 1, also ``math.inf``. For q ≠ 2 the penalty depends on the root P, not on M alone.
        step: ‖εd‖/‖p‖ of the finite difference; None: 1e-4 in float32 (central 1e-3), 1e-7 (1e-5) in float64, 1e-2
            (3e-2) for bfloat16 parameters with Kahan compensation.
        damping: δ of M inside the penalty, M_r = (M⁻¹ + δd̄I)⁻¹ with d̄ the mean of M⁻¹'s eigenvalues, block by block;
            None: what the preconditioner advises.
        where: which parameters take part in the norm; None: all.
        method: how H d is taken, see above.

    Raises:
        ValueError: for q < 1; (with an optimizer) in z with q ≠ 2 where P has no stated root.

    Example:
        >>> import torch, precond
        >>> p = torch.nn.Parameter(torch.tensor([1.0]))
        >>> P = precond.Fixed(precond.Diagonal((torch.tensor([2.0]),)))
        >>> penalty = precond.GradientNorm(0.5, method="exact", damping=0.0)
        >>> optimizer = precond.PreconditionedGD([p], lr=0.01, preconditioner=P, regularizers=[penalty])
        >>> _ = optimizer.step(precond.LossClosure(lambda: 1.5 * (p**2).sum()))  # g = 3p, H = 3, M = 4
        >>> round(p.item(), 4)  # 1 − αMg − 2αλMHMg = 1 − 0.12 − 0.01·4·3·4·3
        -0.56

    References:
        Ye, eqs. (11), (12); Barrett & Dherin (2021); Zhao, Zhang & Hu (2022) for s = 1; Karakida et al. (2023) for finite
        differences.
    """

    lam: float | Schedule
    space: Literal["z", "p"] = "z"
    power: Literal[1, 2] = 2
    q: float = 2
    method: Literal["forward", "backward", "central", "exact"] = "forward"
    step: float | None = None
    damping: float | None = None
    where: Rule | None = None

    takes_damping = True

    def __post_init__(self) -> None:
        settle(self)
        if not isinstance(self.lam, Schedule):
            checks.non_negative("GradientNorm", lam=self.lam)
        if not self.q >= 1:
            raise ValueError(f"GradientNorm: q must be >= 1 (1, 2 or math.inf), got {self.q!r}")
        if self.step is not None:
            checks.positive("GradientNorm", step=self.step)
        if self.damping is not None:
            checks.non_negative("GradientNorm", damping=self.damping)

    def validate(self, preconditioner: Preconditioner) -> None:
        if self.space == "z" and self.q != 2:
            needs_root(f"GradientNorm(q={self.q})", f"the {self.q}-norm of Pᵀg", preconditioner)

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return self.method == "exact"

    @property
    def probes(self) -> bool:  # type: ignore[override]
        return not self.exact

    @property
    def circular(self) -> bool:
        return self.space == "z"

    def direction(self, at: At) -> Tangent:
        """λd, λ of each tensor: the tangent along which the curvature is taken."""
        lam = at["lam"]
        if self.q == 2 and (vec.uniform(lam) or at.space.map.diagonal):
            # λ P Π Pᵀg: needs M alone.
            sharp = at.space.sharp(at.g)
            factor: Scalar = 2.0 if self.power == 2 else inverse(at.space.dual_norm(at.g, sharp))
            return Tangent(sharp, lam[0] * factor if vec.uniform(lam) else [x * factor for x in lam])
        y = at.space.pull(at.g)
        length = at.sums.norm(y, self.q)
        factor = 2 * length if self.power == 2 else 1.0
        return Tangent(at.space.push(vec.scale(_dual(y, self.q, length, at.sums), lam)), factor)

    def _epsilon(self, at: At, d: Tangent) -> Tensor:
        step = self.step
        if step is None:
            step = _STEPS[at.dtype][self.method == "central"]
        size = at.size
        length = at.sums.norm(d.formed()) if isinstance(d.scale, Sequence) else at.sums.norm(d.vec).mul(d.scale).abs()
        return torch.where(length > 0, step * torch.where(size > 0, size, 1) / length, 1)

    def probe(self, at: At) -> tuple[Tangent, ...]:
        if self.exact:
            return ()
        d = self.direction(at)
        eps = at.memo["eps"] = self._epsilon(at, d)

        def displaced(by: Tensor) -> Tangent:
            return Tangent(d.vec, d.scale * by if isinstance(d.scale, float | Tensor) else [x * by for x in d.scale])

        if self.method == "forward":
            return (displaced(eps),)
        return (displaced(-eps),) if self.method == "backward" else (displaced(eps), displaced(-eps))

    def term(self, at: At) -> Term:
        if self.exact:
            assert at.hessian is not None
            return Cotangent(at.hessian(self.direction(at).formed()))
        eps = at.memo["eps"]
        if self.method == "central":
            return Cotangent(vec.scale(vec.sub(*at.found), 1 / (2 * eps)))
        sign = 1 if self.method == "forward" else -1
        return Cotangent(vec.scale(vec.sub(at.found[0], at.g), sign / eps))

    def value(self, at: At) -> Tensor | float:
        length = at.space.dual_norm(at.g) if self.q == 2 else at.sums.norm(at.space.pull(at.g), self.q)
        return max(at["lam"]) * length**self.power


def inverse(length: Tensor) -> Tensor:
    """1/length, 0 for 0."""
    return torch.where(length > 0, 1 / length, 0)


def _dual(y: Vec, q: float, length: Tensor, sums: Sums) -> Vec:
    """u_q with ⟨u_q, y⟩ = ‖y‖_q: the gradient of the q-norm (a subgradient for q = 1, ∞); 0 at 0."""
    if q == 1:
        return vec.map_(torch.sign, y)
    if math.isinf(q):
        peaks = vec.map_(lambda t: t.sign() * (t.abs() == length), y)
        return vec.scale(peaks, 1 / sums.norm(peaks, 1).clamp_min(1))
    scale = inverse(length)
    return vec.map_(lambda t: t.sign() * (t.abs() * scale) ** (q - 1), y)
