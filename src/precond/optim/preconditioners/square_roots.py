r"""Inverse square roots of small symmetric positive matrices side by side (k, n, n), by products alone: quicker than their eigenvectors.

With A = (S + ελ₁I)/(λ₁(1 + ε)), whose eigenvalues are in [ε/(1+ε), 1], and polynomials x ↦ xq(x²) that take their square roots nearer to 1
step by step: E = ZY, Y ← Y q(E), Z ← q(E) Z from Y = A, Z = I ends at Z = A^(−1/2).

References:
    Higham (2008), Functions of matrices, section 6.7, for the coupled iteration; Amsel et al. (2025), The Polar Express, for the polynomials.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

_LEAST, _TOLERANCE = 1e-4, 1e-4
_SMALL = 32  # rows up to which the eigenvectors of one matrix take no longer
_CALLS = 4e5  # operations, by the clock, that one more set of calls takes: n³ of a matrix take one


def by_products(S: Tensor, damping: float) -> bool:
    """Whether rounding leaves as much of them as of eigenvectors: for float32, and not too small an ε. Others ask for more."""
    return S.dtype == torch.float32 and damping >= _LEAST


def together(sizes: Sequence[int]) -> list[list[int]]:
    """Positions of matrices (n, n) that are best taken side by side, filled up with zeros to the largest of them."""
    sets: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=sizes.__getitem__):
        smaller = sets[-1] if sets else []
        if smaller and sum(sizes[i] ** 3 - sizes[j] ** 3 for j in smaller) < _CALLS:
            smaller.append(i)
        else:
            sets.append([i])
    return sets


def inverse_square_roots(S: Sequence[Tensor], damping: float) -> list[tuple[Tensor, Tensor] | None]:
    """((S + ελ₁I)^(−1/2) to 1e-4, tr S(S + ελ₁I)⁻¹) of each S (n, n).

    None where that is not known: S is zero, not finite, of squares out of range, so small that eigenvectors take no longer, or so far from
    positive that the trace, at least λ₁/(λ₁ + ελ₁), tells.
    """
    out: list[tuple[Tensor, Tensor] | None] = [None] * len(S)
    least = 0.99 / (1 + damping)
    for some in together([len(s) for s in S]):
        n = len(S[some[-1]])
        if len(some) == 1 and n <= _SMALL:
            continue
        joined = S[some[0]].new_zeros(len(some), n, n)
        sizes = [len(S[i]) for i in some]
        torch._foreach_copy_([x[:m, :m] for x, m in zip(joined.unbind(0), sizes, strict=True)], [S[i] for i in some])
        roots, ranks = _iterated(joined, damping)
        for i, m, root, rank, known in zip(some, sizes, roots.unbind(0), ranks.unbind(0), ranks.tolist(), strict=True):
            out[i] = (root[:m, :m], rank) if least <= known < math.inf else None
    return out


def _iterated(S: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    scale = 1 / (_largest(S) * (1 + damping))
    Y = S * scale
    Y.diagonal(dim1=-2, dim2=-1).add_(damping / (1 + damping))
    E, (first, *others) = Y, _polynomials(math.sqrt(damping / (1 + damping)))
    Z = torch.baddbmm(E, E, E, beta=first[1], alpha=first[2])
    Z.diagonal(dim1=-2, dim2=-1).add_(first[0])
    Y = Y @ Z
    for k, (a, b, c) in enumerate(others, 1):
        E = Z @ Y
        q = torch.baddbmm(E, E, E, beta=b, alpha=c)  # q(E) but for aI
        if k < len(others):
            Y = torch.baddbmm(Y, Y, q, beta=a)
        Z = torch.baddbmm(Z, q, Z, beta=a)
    Z.mul_(scale.sqrt_())
    return Z, (S @ Z).mul_(Z).sum((-2, -1))


def _largest(S: Tensor) -> Tensor:
    """λ₁, (k, 1, 1): the mean of eigenvalues with their 512th powers for weights."""
    A = S
    for _ in range(2):  # in float32 none of these is too small
        A = A / torch.linalg.vector_norm(A, dim=(-2, -1), keepdim=True)
        for _ in range(4):
            A = A @ A
    A.div_(torch.linalg.vector_norm(A, dim=(-2, -1), keepdim=True))
    return (A @ S).mul_(A).sum((-2, -1), keepdim=True)


@cache
def _polynomials(least: float) -> list[tuple[float, float, float]]:
    """(a, b, c) of ax + bx³ + cx⁵, one after the other: each as near to 1 as can be where those before have taken [least, 1]."""
    low, high = least, 1.0
    out: list[tuple[float, float, float]] = []
    while not out or max(1 - low, high - 1) > _TOLERANCE:
        a, b, c = _nearest_to_one(low, high)
        x = torch.linspace(low, high, 2001, dtype=torch.float64)
        y = a * x + b * x**3 + c * x**5
        low, high = float(y.amin()), float(y.amax())
        out.append((a, b, c))
    return out


def _nearest_to_one(low: float, high: float) -> tuple[float, float, float]:
    """That of least |1 − ax − bx³ − cx⁵| on an interval, by Remez' exchange: errors ±e at both ends and the two extrema between."""
    middle = [(3 * low + high) / 4, (low + 3 * high) / 4]
    for _ in range(30):
        x = torch.tensor([low, *middle, high], dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        a, b, c, _ = torch.linalg.solve(torch.stack([x, x**3, x**5, signs], 1), torch.ones_like(x)).tolist()
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        middle = sorted(math.sqrt(max(t, low**2)) for t in ((-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)))
    return a, b, c
