"""Symmetric matrices with a few eigenvalues of their own and one for all the rest, on the rows of a layer's weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from precond.algebra.maps.base import LinearMap
from precond.algebra.maps.layers import beside_bias, mean_inverse
from precond.algebra.maps.layout import Layout
from precond.algebra.vec import Vec


class Spiked(LinearMap):
    r"""w ← R w for every row of a layer's weight, R = aI + U·diag(s − a)·Uᵀ symmetric and positive; the bias stays.

    Every function of R is of the same form, f(a)I + U·diag(f(s) − f(a))·Uᵀ. Rows of different groups have their own R.

    Args:
        basis: U (groups, n, r), with orthonormal columns.
        leading: s > 0 (groups, r), the eigenvalues of these.
        rest: a > 0 (groups,), the eigenvalue of all that is orthogonal to them.
        like: example (weight, bias) or (weight,).
        layout: how the weight is seen as (groups, rows, n).

    Example:
        >>> import torch
        >>> U, layer = torch.tensor([[[1.0], [0.0]]]), (torch.tensor([[1.0, 1.0]]),)
        >>> Spiked(U, torch.tensor([[3.0]]), torch.tensor([2.0]), layer, Layout()).mv(layer)  # R = diag(3, 2)
        (tensor([[3., 2.]]),)
    """

    like: Vec

    def __init__(self, basis: Tensor, leading: Tensor, rest: Tensor, like: Vec, layout: Layout):
        self.basis, self.leading, self.rest, self.like, self.layout = basis, leading, rest, like, layout
        self.from_left = layout.transposed and len(like) == 1

    def _of(self, f: Callable[[Tensor], Tensor], v: Vec) -> Vec:
        U, s, a = (self.layout.mine(t) for t in (self.basis, f(self.leading), f(self.rest)))
        W = self.layout.view(v[0])
        turned = (W @ U) * (s - a[:, None])[:, None]
        return (self.layout.back((W * a[:, None, None]).baddbmm_(turned, U.mT), v[0]), *v[1:])

    def mv(self, v: Vec) -> Vec:
        return self._of(lambda s: s, v)

    rmv = mv

    def solve(self, v: Vec) -> Vec:
        return self._of(torch.reciprocal, v)

    rsolve = solve

    def gram(self, v: Vec) -> Vec:
        return self._of(torch.square, v)

    @property
    def T(self) -> LinearMap:
        return self

    def damped(self, delta: float) -> LinearMap:
        if delta == 0:
            return self
        s, a = self.leading.square(), self.rest.square()
        n, r = self.basis.shape[-2:]
        every = torch.cat([s, a[:, None].expand(-1, n - r)], 1)
        absolute = delta * mean_inverse(every, self.layout, len(self.like) > 1)  # per row of each group
        leading, rest = self.leading * (1 + absolute * s).rsqrt(), self.rest * (1 + absolute[:, 0] * a).rsqrt()
        inner = Spiked(self.basis, leading, rest, self.like, self.layout)
        return beside_bias(inner, self.like, (1 + absolute).rsqrt(), self.layout)
