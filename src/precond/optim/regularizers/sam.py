"""Sharpness-aware minimization, in p or in z."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from precond.algebra import checks, vec
from precond.algebra.schedules import Schedule
from precond.algebra.spaces import Instead, Tangent, Term
from precond.optim.blocks import Rule
from precond.optim.checking.arguments import settle
from precond.optim.preconditioners.base import Preconditioner
from precond.optim.regularizers.base import At, Regularizer, needs_inverse, needs_root
from precond.optim.regularizers.gradient_norm import inverse


@dataclass(frozen=True)
class SAM(Regularizer):
    r"""The gradient at the worst point nearby: p ← p − αM g(p + δ).

    In p: δ = ρ g/‖g‖ (Foret et al., 2021). In z, the ball is one of the preconditioned coordinates:
    δ = ρ M_r g/√(gᵀM_r g), M_r the damped M. Adaptive, with T = diag(|z| + η): δ = ρ P T²Pᵀg/‖T Pᵀg‖ (in p, P = I: ASAM).
    The optimizer's ``max_norm`` bounds the gradient that is descended, g(p + δ).

    Args:
        rho: ρ ≥ 0, the radius in the chosen space, a number or a schedule; a group with ρ = 0 takes no part.
        space: ``"z"`` or ``"p"``. A radius in z is another number than one in p: |M g|/|g| may be thousands.
        adaptive: scale the ball by the coordinates' own magnitudes; z then needs a stated, invertible root.
        eta: η ≥ 0, the floor of T.
        damping: δ of M inside the ball, as in :class:`~precond.GradientNorm`.
        where: which parameters are perturbed; None: all.

    Raises:
        ValueError: (with an optimizer) adaptive in z where P has no stated root or no inverse.

    Example:
        >>> import torch, precond
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> w = torch.nn.init.ones_(model.weight)
        >>> P = precond.Fixed(precond.Diagonal((torch.tensor([[2.0]]),)))
        >>> optimizer = precond.PreconditionedGD(model, lr=0.01, preconditioner=P, regularizers=[precond.SAM(0.5, damping=0.0)])
        >>> _ = optimizer.step(precond.LossClosure(lambda: 1.5 * model(torch.ones(1, 1)).square().sum()))  # g = 3w, M = 4
        >>> round(w.item(), 4)  # δ = ρMg/√(gMg) = 0.5·12/6 = 1: 1 − 0.01·4·3(1 + 1)
        0.76

    References:
        Foret et al. (2021); Kwon et al. (2021) for adaptive; Möllenhoff & Khan (2023), whose bSAM uses the same M in the ascent
        and in the update; Ye, "Gradient Regularization".
    """

    rho: float | Schedule
    space: Literal["z", "p"] = "z"
    adaptive: bool = False
    eta: float = 0.01
    damping: float | None = None
    where: Rule | None = None

    takes_damping = True
    scalars = ("rho",)
    probes = True
    replaces_gradient = True

    def __post_init__(self) -> None:
        settle(self)
        checks.non_negative("SAM", eta=self.eta)
        if not isinstance(self.rho, Schedule):
            checks.non_negative("SAM", rho=self.rho)
        if self.damping is not None:
            checks.non_negative("SAM", damping=self.damping)

    def validate(self, preconditioner: Preconditioner) -> None:
        if self.adaptive and self.space == "z":
            needs_root("SAM(adaptive=True, space='z')", "T = diag(|P⁻¹p| + η)", preconditioner)
            needs_inverse("SAM(adaptive=True, space='z')", "T = diag(|P⁻¹p| + η)", preconditioner)

    @property
    def circular(self) -> bool:
        return self.space == "z"

    def probe(self, at: At) -> tuple[Tangent, ...]:
        rho = at["rho"]
        if self.adaptive:
            y = at.space.pull(at.g)
            T = vec.map_(lambda z: z.abs() + self.eta, at.space.solve(at.p))
            Ty = vec.mul(T, y)
            return (Tangent(at.space.push(vec.scale(vec.mul(T, Ty), rho)), inverse(at.sums.norm(Ty))),)
        sharp = at.space.sharp(at.g)
        shrink = inverse(at.space.dual_norm(at.g, sharp))
        if vec.uniform(rho):
            return (Tangent(sharp, rho[0] * shrink),)
        if at.space.map.diagonal:
            return (Tangent(sharp, [x * shrink for x in rho]),)
        return (Tangent(at.space.push(vec.scale(at.space.pull(at.g), rho)), shrink),)

    def term(self, at: At) -> Term:
        return Instead(at.found[0])

    def value(self, at: At) -> Tensor | float:
        """ρ‖y‖, the rise of the loss to first order."""
        return max(at["rho"]) * at.space.dual_norm(at.g)
