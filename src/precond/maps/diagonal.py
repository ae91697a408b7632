"""Maps that act entry by entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from precond import vec
from precond.maps.base import LinearMap
from precond.vec import Vec


class Diagonal(LinearMap):
    """P = diag(d), d a tuple of tensors of the parameters' shapes.

    Example:
        >>> Diagonal((torch.tensor([2.0, 4.0]),)).gram((torch.tensor([1.0, 1.0]),))
        (tensor([ 4., 16.]),)
    """

    diagonal = True
    holes = True  # some entries may be 0
    means: Callable[[Vec], Sequence[Tensor]] | None = None  # over all entries, where other processes hold some

    def __init__(self, d: Vec):
        self.d = self.like = d

    @cached_property
    def denominator(self) -> Vec:
        """The diagonal of M⁻¹ = diag(d)⁻²."""
        return vec.map_(lambda d: d**-2, self.d)

    def mv(self, v: Vec) -> Vec:
        return vec.mul(self.d, v)

    rmv = mv

    def solve(self, v: Vec) -> Vec:
        return vec.div(v, self.d)

    rsolve = solve

    def gram(self, v: Vec) -> Vec:
        return vec.mul(self.d, vec.mul(self.d, v))

    def damped(self, delta: float) -> LinearMap:
        if delta == 0:
            return self
        h = self.denominator
        damped = tuple(t.add(mean.to(t), alpha=delta) for t, mean in zip(h, self._means(h), strict=True))
        return InverseRoot(damped, self.holes, self.means)

    def _means(self, h: Vec) -> Sequence[Tensor]:
        """The mean of the finite entries of each tensor."""
        if self.means is not None:
            return self.means(h)
        return vec.map_(lambda t: _mean(t, t.isfinite()) if self.holes else t.mean(), h)

    @property
    def T(self) -> LinearMap:
        return self


class InverseRoot(Diagonal):
    """P = diag(h^(−1/2)), given by the denominator h of M = diag(1/h). Where h = ∞, P is 0, and so is P⁻¹ by convention.

    M v is one division, so that g/(√r + ε) comes out as torch.optim rounds it; the root is taken only when asked for.

    Args:
        denominator: h, tensors of the parameters' shapes.
        holes: whether some h may be ∞.
        means: the mean over the finite entries of each tensor of a vector, where other processes hold some of them.
    """

    denominator: Vec = ()  # given, not computed and cached as a diagonal's

    def __init__(self, denominator: Vec, holes: bool = True, means: Callable[[Vec], Sequence[Tensor]] | None = None):
        self.denominator = self.like = denominator
        self.holes, self.means = holes, means

    @cached_property
    def d(self) -> Vec:  # type: ignore[override]
        return tuple(torch._foreach_rsqrt(self.denominator)) if self.denominator else ()

    def solve(self, v: Vec) -> Vec:
        return tuple(torch.where(h.isinf(), 0, x * h.sqrt()) for x, h in zip(v, self.denominator, strict=True))

    rsolve = solve

    def gram(self, v: Vec) -> Vec:
        return vec.div(v, self.denominator)


def _mean(x: Tensor, where: Tensor) -> Tensor:
    """The mean of the entries of x for which a condition holds; 0 where it holds for none."""
    return torch.where(where, x, 0).sum() / where.sum().clamp_min(1)
