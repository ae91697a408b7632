"""Maps of one tensor that are known by their Gram matrix, a Kronecker product."""

from __future__ import annotations

import torch
from torch import Tensor

from precond.maps.base import LinearMap
from precond.maps.dense import Kronecker, _mean_inverse
from precond.vec import Vec


class KroneckerGram(LinearMap):
    """M = A ⊗ B with symmetric A, B on one tensor W, seen row-major as a matrix (out, rest): M vec(W) = vec(A W B).

    No root of M is stated. None stands for the identity on that side.

    Example:
        >>> M = KroneckerGram(torch.diag(torch.tensor([4.0, 1.0])), None)
        >>> M.gram((torch.ones(2, 2),))
        (tensor([[4., 4.],
                [1., 1.]]),)
    """

    root = False

    def __init__(self, A: Tensor | None, B: Tensor | None, like: Vec | None = None):
        self.A, self.B, self.like = A, B, like

    def _refuse(self, v: Vec) -> Vec:
        raise ValueError("this preconditioner states M = P Pᵀ and no root P; use space='p', or a penalty that M alone serves")

    mv = rmv = solve = rsolve = _refuse

    def gram(self, v: Vec) -> Vec:
        return Kronecker(self.A, self.B).mv(v)

    def damped(self, delta: float) -> LinearMap:
        if delta == 0:
            return self
        if self.like is None:
            raise ValueError("KroneckerGram: give `like` to damp it")
        (W,) = self.like
        sides = []
        for X, n in zip((self.A, self.B), Kronecker._sides(W), strict=True):
            sides.append(torch.linalg.eigh(X) if X is not None else (W.new_ones(n), None))
        (a, U), (b, V) = sides
        m = (a[:, None] * b[None, :]).clamp_min(0)  # a matrix that is singular may have rounded below zero
        d = (m / (1 + delta * _mean_inverse(m) * m)).reshape(W.shape)
        return Turned(Kronecker(U, V, self.like), d)

    @property
    def T(self) -> LinearMap:
        return self


class Turned(LinearMap):
    """M = Q·diag(d)·Qᵀ with an orthogonal Q; no root is stated."""

    root = False

    def __init__(self, Q: Kronecker, d: Tensor):
        self.Q, self.d, self.like = Q, d, Q.like

    mv = rmv = solve = rsolve = KroneckerGram._refuse

    def gram(self, v: Vec) -> Vec:
        (y,) = self.Q.rmv(v)
        return self.Q.mv((self.d * y,))
