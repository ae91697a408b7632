"""The positive map nearest to another that takes one vector where it should go."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from precond.algebra.maps.base import LinearMap
from precond.algebra.vec import Vec, add


class Secant(LinearMap):
    r"""P = (I + d wᵀ)P₁ with w = (τM₁⁻¹d − m)/⟨m, d⟩ and τ² = ⟨m, d⟩/⟨d, M₁⁻¹d⟩, so that M m = P Pᵀm = d.

    For ⟨m, d⟩ > 0 it is the update of Broyden, Fletcher, Goldfarb and Shanno of M₁, in product form: of all symmetric positive M with
    M m = d the nearest to M₁ in the norm that the inverse of M itself weighs. M is M₁ on what M₁⁻¹d and m are orthogonal to. Where m is
    0, P = P₁.

    Args:
        map: P₁, which has an inverse.
        m, d: a cotangent and a tangent.
        stacked: whether these are several side by side, (k, …), each by itself.

    Example:
        >>> import torch
        >>> from precond import Identity
        >>> m, d = (torch.tensor([1.0, 2.0]),), (torch.tensor([3.0, -1.0]),)
        >>> torch.testing.assert_close(Secant(Identity(m), m, d).gram(m), d)

    References:
        Goldfarb (1970) for the nearest; Brodlie, Gourlay & Greenstadt (1973) for the product form.
    """

    like: Vec

    def __init__(self, map: LinearMap, m: Vec, d: Vec, stacked: bool = False):
        self.map, self.like, self.root, self.stacked = map, m, map.root, stacked
        back = map.rsolve(map.solve(d))
        along, size = self._dot(m, d), self._dot(d, back)
        some = (along > 0) & (size > 0)
        self._tau = torch.where(some, along / size, 1.0).sqrt()
        over = torch.where(some, 1 / along, 0.0)
        self.d, self.w = d, self._times(add(self._times(back, self._tau), m, alpha=-1.0), over)

    def _dot(self, a: Vec, b: Vec) -> Tensor:
        """⟨a, b⟩, of each of several (k,)."""
        if not self.stacked:
            return reduce(torch.add, [(x * y).sum() for x, y in zip(a, b, strict=True)])
        return reduce(torch.add, [(x * y).flatten(1).sum(1) for x, y in zip(a, b, strict=True)])

    @staticmethod
    def _times(v: Vec, s: Tensor) -> Vec:
        return tuple(t * s.view(-1, *[1] * (t.ndim - 1)) if s.ndim else t * s for t in v)

    def _moved(self, v: Vec, along: Vec, by: Vec, inverse: bool = False) -> Vec:
        """(I + along byᵀ)v, or the inverse, by Sherman and Morrison's formula: 1 + ⟨w, d⟩ = 1/τ."""
        size = self._dot(by, v)
        return add(v, self._times(along, -self._tau * size if inverse else size))

    def mv(self, v: Vec) -> Vec:
        return self._moved(self.map.mv(v), self.d, self.w)

    def rmv(self, v: Vec) -> Vec:
        return self.map.rmv(self._moved(v, self.w, self.d))

    def solve(self, v: Vec) -> Vec:
        return self.map.solve(self._moved(v, self.d, self.w, inverse=True))

    def rsolve(self, v: Vec) -> Vec:
        return self._moved(self.map.rsolve(v), self.w, self.d, inverse=True)
