"""Maps that act entry by entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from precond.algebra import vec
from precond.algebra.maps.base import LinearMap
from precond.algebra.vec import Vec


class Diagonal(LinearMap):
    """P = diag(d), d a tuple of tensors of the parameters' shapes.

    Args:
        d: one tensor for each of the parameters, of its shape.

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
        if self.means is not None:
            damped = [t.add(mean.to(t), alpha=delta) for t, mean in zip(h, self.means(h), strict=True)]
        else:
            damped = list(h)
            for index in vec.by_shape(h):
                own = len(index) > 1  # what is put side by side is the result's memory
                rows = torch.stack([h[i] for i in index]).view(len(index), -1) if own else h[index[0]].reshape(1, -1)
                mean = _mean(rows, rows.isfinite(), (1,)) if self.holes else rows.mean(1, keepdim=True)
                rows = rows.add_(mean, alpha=delta) if own else rows.add(mean, alpha=delta)
                for i, row in zip(index, rows, strict=True):
                    damped[i] = row.view(h[i].shape)
        return InverseRoot(tuple(damped), self.holes, self.means)

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

    Example:
        >>> import torch, precond
        >>> P = precond.InverseRoot((torch.tensor([4.0, 0.25]),))
        >>> P.mv((torch.ones(2),)), P.gram((torch.ones(2),))
        ((tensor([0.5000, 2.0000]),), (tensor([0.2500, 4.0000]),))

    References:
        Ye, eqs. (6)–(8), for h = √r.
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


def mean_of(x: Tensor, holes: bool) -> Tensor:
    """The mean over the entries of each of k tensors side by side (k, …), or over its finite ones."""
    over = tuple(range(1, x.ndim))
    return _mean(x, x.isfinite(), over) if holes else x.mean(over, keepdim=True)


def _mean(x: Tensor, where: Tensor, over: tuple[int, ...] | None = None) -> Tensor:
    """The mean of the entries of x for which a condition holds; 0 where it holds for none. Of all, or along dimensions that stay."""
    if over is None:
        return torch.where(where, x, 0).sum() / where.sum().clamp_min(1)
    return torch.where(where, x, 0).sum(over, keepdim=True) / where.sum(over, keepdim=True).clamp_min(1)
