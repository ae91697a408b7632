"""Cautious steps and cautious decay: what does not agree in sign with the gradient, or with the step, is left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from precond.algebra import checks, vec
from precond.algebra.schedules import Schedule
from precond.algebra.spaces import ProposedStep, Stage
from precond.algebra.vec import Vec
from precond.optim.blocks import Rule
from precond.optim.checking.arguments import settle
from precond.optim.regularizers.base import At
from precond.optim.regularizers.bends import Bending

_LEAST = 1e-3  # the least share of entries that a mask is divided by, as its authors have it


@dataclass(frozen=True)
class Cautious(Bending):
    r"""Steps only where they descend: w ← w∘φ/mean(φ), φ = 1[w∘y > 0] and 1 − s elsewhere, w = P⁻¹u and y = Pᵀa, or u and a,
    a the gradient with what penalties add to it.

    A momentum that points uphill in a coordinate waits there; the others are lengthened so that a tensor's step keeps its mean size.

    Args:
        strength: s in [0, 1]; 0 changes nothing.
        space: ``"p"``, or ``"z"`` for signs of the preconditioned coordinates: for diagonal P they are the same.
        where: which parameters; None: all.

    Raises:
        ValueError: (with an optimizer) in z where P has no stated root or no inverse.

    Example:
        >>> import torch, precond
        >>> p = torch.nn.Parameter(torch.tensor([0.0, 0.0]))
        >>> optimizer = precond.sgd([p], lr=1.0, momentum=0.5, regularizers=[precond.Cautious()])
        >>> p.grad = torch.tensor([4.0, 4.0]); _ = optimizer.step()
        >>> p.grad = torch.tensor([1.0, -1.0]); _ = optimizer.step()
        >>> p.tolist()  # m = (3, 1): the second ascends and waits, the first is doubled
        [-10.0, -4.0]

    References:
        Liang, Chen, Liu & Liu (2024), Cautious optimizers, Algorithm 1.
    """

    strength: float | Schedule = 1.0
    space: Literal["p", "z"] = "p"
    where: Rule | None = None

    scalars = ("strength",)
    stage = Stage.ENTRIES
    rooted = True

    def __post_init__(self) -> None:
        settle(self)
        if not isinstance(self.strength, Schedule) and not 0 <= self.strength <= 1:
            raise ValueError(f"Cautious: strength must be in [0, 1], got {self.strength!r}; 1 leaves out all that ascends")

    def bent(self, at: At, w: Vec, made: ProposedStep) -> Vec:
        y = at.space.pull(made.a)
        mask = tuple(1 - s * (x * d <= 0).to(x.dtype) for x, d, s in zip(w, y, at["strength"], strict=True))
        shares = [x / max(leaf.param.numel(), 1) for x, leaf in zip(at.sums.each(mask), at.leaves, strict=True)]
        return tuple(x * m / s.to(x.device).clamp_min(_LEAST) for x, m, s in zip(w, mask, shares, strict=True))


@dataclass(frozen=True)
class CautiousL2(Bending):
    r"""Weight decay only where the step shrinks the weight too: w ← w + 2λ z∘1[w∘z > 0], w = P⁻¹u and z = P⁻¹p, or u and p;
    the sign is that of the step as M made it.

    The step never holds against the decay, so that a minimum of L is one of the method: no bias towards 0, but a slide along it.

    Args:
        lam: λ ≥ 0; torch's ``weight_decay`` is 2λ.
        space: ``"p"``, or ``"z"`` for signs of the preconditioned coordinates: for diagonal P they are the same.
        where: which parameters; None: all.

    Raises:
        ValueError: (with an optimizer) in z where P has no stated root or no inverse.

    Example:
        >>> import torch, precond
        >>> p = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> P = precond.Fixed(precond.Diagonal((torch.tensor([1.0, 1.0]),)))
        >>> optimizer = precond.PreconditionedGD([p], lr=0.1, preconditioner=P, regularizers=[precond.CautiousL2(0.5)])
        >>> p.grad = torch.tensor([1.0, 1.0]); _ = optimizer.step()
        >>> [round(x, 4) for x in p.tolist()]  # the step shrinks the first weight alone, and so does the decay
        [0.8, -1.1]

    References:
        Chen et al. (2025), Cautious weight decay, eq. (3).
    """

    lam: float | Schedule
    space: Literal["p", "z"] = "p"
    where: Rule | None = None

    stage = Stage.DECAY
    rooted = True

    def __post_init__(self) -> None:
        settle(self)
        if not isinstance(self.lam, Schedule):
            checks.non_negative("CautiousL2", lam=self.lam)

    def bent(self, at: At, w: Vec, made: ProposedStep) -> Vec:
        z, before = at.space.solve(at.p), at.space.solve(made.u)
        return tuple(x + 2 * lam * c * (m * c > 0) for x, m, c, lam in zip(w, before, z, at["lam"], strict=True))

    def value(self, at: At) -> Tensor | float:
        z = at.space.solve(at.p)
        return at.sums.dot(vec.scale(z, at["lam"]), z)
