"""Explicit matrices, and Kronecker products of them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from precond.algebra import vec
from precond.algebra.maps.base import LinearMap
from precond.algebra.maps.diagonal import InverseRoot, _mean
from precond.algebra.maps.eigen import eigenpairs, eigh
from precond.algebra.vec import Vec


class Dense(LinearMap):
    """P as an explicit (n, n) matrix on all entries in order, row-major.

    Args:
        matrix: P, (n, n), for n entries in all.
        like: example of the vectors that it acts on; None: whatever has n entries.

    Raises:
        ValueError: for a matrix that is not square, and, when it is applied, vectors of another number of entries.

    Example:
        >>> import torch, precond
        >>> P = precond.Dense(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
        >>> P.solve((torch.tensor([3.0]), torch.tensor([1.0])))  # two parameters of one entry each
        (tensor([2.]), tensor([1.]))
    """

    def __init__(self, matrix: Tensor, like: Vec | None = None):
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"Dense: matrix must be square, got shape {tuple(matrix.shape)}")
        self.matrix, self.like = matrix, like

    @cached_property
    def _lu(self) -> tuple[Tensor, Tensor]:
        return torch.linalg.lu_factor(self.matrix)

    def _apply(self, f, v: Vec) -> Vec:
        flat = vec.flatten(v)
        if flat.numel() != self.matrix.shape[0]:
            raise ValueError(
                f"Dense: the matrix has {self.matrix.shape[0]} rows, the parameters have {flat.numel()} entries; "
                "give a matrix for all entries of all parameters in order"
            )
        return vec.unflatten(f(flat.to(self.matrix.dtype)).to(flat.dtype), v)

    def mv(self, v: Vec) -> Vec:
        return self._apply(lambda x: self.matrix @ x, v)

    def rmv(self, v: Vec) -> Vec:
        return self._apply(lambda x: self.matrix.T @ x, v)

    def solve(self, v: Vec) -> Vec:
        return self._apply(lambda x: torch.linalg.lu_solve(*self._lu, x[:, None])[:, 0], v)

    def rsolve(self, v: Vec) -> Vec:
        return self._apply(lambda x: torch.linalg.lu_solve(*self._lu, x[:, None], adjoint=True)[:, 0], v)

    def damped(self, delta: float) -> LinearMap:
        if delta == 0:
            return self
        s, V = eigh(self.matrix.T @ self.matrix)
        absolute = delta * _mean_inverse(s)
        return Dense(self.matrix @ (V * (1 + absolute * s) ** -0.5) @ V.T, self.like)

    @property
    def T(self) -> LinearMap:
        return Dense(self.matrix.T, self.like)

    def to_dense(self) -> Tensor:
        return self.matrix


class GramOnly(LinearMap):
    """A map known by M = P Pᵀ alone, a symmetric (n, n) matrix: what needs a root of it is refused.

    Args:
        gram: M, (n, n), on all entries in order, row-major.
        like: example of the vectors that it acts on; None: whatever has n entries.

    Raises:
        ValueError: for a matrix that is not square, and where P itself, its transpose or its inverse is asked for.

    Example:
        >>> import torch, precond
        >>> M = precond.GramOnly(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> M.gram((torch.tensor([1.0, 0.0]),)), M.root
        ((tensor([2., 1.]),), False)
    """

    root = False

    def __init__(self, gram: Tensor, like: Vec | None = None):
        self._gram, self.like = Dense(gram, like), like

    def _refuse(self, v: Vec) -> Vec:
        raise ValueError(
            "this preconditioner states M = P Pᵀ and no root P; give the root, Fixed(Dense(P)), where one is needed"
        )

    mv = rmv = solve = rsolve = _refuse

    def gram(self, v: Vec) -> Vec:
        return self._gram.mv(v)

    def gram_solve(self, v: Vec) -> Vec:
        return self._gram.solve(v)

    def damped(self, delta: float) -> LinearMap:
        if delta == 0:
            return self
        m, V = eigh(self._gram.matrix)
        return GramOnly((V * (m / (1 + delta * _mean_inverse(m) * m))) @ V.T, self.like)

    def to_dense(self) -> Tensor:
        raise ValueError("this map states M = P Pᵀ and no root P")


class Kronecker(LinearMap):
    """P = A ⊗ B on one tensor W, seen row-major as a matrix (out, rest): P vec(W) = vec(A W Bᵀ).

    None stands for the identity on that side. Sides (k, n, n) act on k matrices side by side, W (k, out, …).

    Args:
        A: (out, out), or (k, out, out), or None.
        B: (rest, rest), or (k, rest, rest), or None.
        like: example (W,), which :meth:`damped` and :meth:`to_dense` need.

    Example:
        >>> import torch, precond
        >>> A, B, W = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.diag(torch.tensor([1.0, 10.0])), torch.eye(2)
        >>> P = precond.Kronecker(A, B, (W,))
        >>> P.mv((W,))  # A W Bᵀ
        (tensor([[ 0., 10.],
                [ 1.,  0.]]),)
        >>> torch.equal(P.to_dense(), torch.kron(A, B))
        True
    """

    def __init__(self, A: Tensor | None, B: Tensor | None, like: Vec | None = None):
        self.A, self.B, self.like = A, B, like

    @staticmethod
    def matrices(W: Tensor, *sides: Any) -> Tensor:
        """W as (…, out, rest), its leading dimensions those of the sides."""
        stacked = next((X.ndim - 2 for X in sides if X is not None), 0)
        if W.ndim == stacked + 2:
            return W
        return (
            W.flatten(stacked + 1) if W.ndim > stacked + 2 else W.reshape(*W.shape[:stacked], *(W.shape[stacked:] or (1,)), 1)
        )

    @staticmethod
    def _apply(v: Vec, left: Tensor | None, right: Tensor | None, op=torch.matmul) -> Vec:
        (W,) = v
        X = Kronecker.matrices(W, left, right)
        if left is not None:
            X = op(left, X)
        if right is not None:
            X = X @ right.mT if op is torch.matmul else op(right, X.mT).mT
        return (X.reshape(W.shape),)

    def mv(self, v: Vec) -> Vec:
        return self._apply(v, self.A, self.B)

    def rmv(self, v: Vec) -> Vec:
        return self.T.mv(v)

    def solve(self, v: Vec) -> Vec:
        return self._apply(v, self.A, self.B, torch.linalg.solve)

    def rsolve(self, v: Vec) -> Vec:
        return self.T.solve(v)

    @property
    def T(self) -> LinearMap:
        return Kronecker(None if self.A is None else self.A.mT, None if self.B is None else self.B.mT, self.like)

    def damped(self, delta: float) -> LinearMap:
        if delta == 0:
            return self
        if self.like is None:
            raise ValueError("Kronecker: give `like` to damp it")
        pairs = [None if X is None else eigenpairs(X.mT @ X) for X in (self.A, self.B)]
        (a, U), (b, V) = sides_of(self.like[0], *pairs)
        s = a[..., :, None] * b[..., None, :]
        h = (1 + delta * _mean_inverse(s, 2) * s).reshape(self.like[0].shape)
        rotation = Kronecker(U, V, self.like)
        return self @ rotation @ InverseRoot((h,)) @ rotation.T


Pair = tuple[Tensor, Tensor]
"""(eigenvalues, eigenvectors as columns)."""


def sides_of(W: Tensor, *pairs: Pair | None) -> list[tuple[Tensor, Tensor | None]]:
    """Of both sides of matrices W; the identity's, which are not rotated, where there are none."""
    known = [None if pair is None else pair[1] for pair in pairs]
    shape = Kronecker.matrices(W, *known).shape
    return [(W.new_ones(n), None) if pair is None else pair for pair, n in zip(pairs, shape[-2:], strict=True)]


def _mean_inverse(s: Tensor, dims: int | None = None) -> Tensor:
    """The mean of 1/s over the eigenvalues that are not zero to rounding: all of them, or those along each last dimensions."""
    over = tuple(range(-s.ndim if dims is None else -dims, 0))
    zero = s.amax(over, keepdim=True) * max(s.shape) * torch.finfo(s.dtype).eps if s.numel() else 0.0
    found = _mean(1 / s, s > zero, over)
    return found.reshape(()) if dims is None else found
