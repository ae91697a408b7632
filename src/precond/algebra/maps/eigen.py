"""Eigendecompositions of symmetric positive matrices that may be singular, badly scaled or not finite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from precond.algebra.vec import all_finite


def eigh(S: Tensor) -> tuple[Tensor, Tensor]:
    """(eigenvalues, the smallest first; eigenvectors as columns) of a symmetric positive S (n, n).

    Where the iteration does not converge, S is taken in float64 with a little of the identity added. Where S holds inf or NaN, both
    are NaN.

    Raises:
        torch.linalg.LinAlgError: where that does not converge either.
    """
    if not all_finite((S,)):
        return torch.full_like(S[:, 0], torch.nan), torch.full_like(S, torch.nan)
    return eigh_of_finite(S)


def eigh_of_finite(S: Tensor) -> tuple[Tensor, Tensor]:
    """The same of an S that is known to hold neither inf nor NaN."""
    for dtype, damping in ((S.dtype, 0.0), (torch.float64, 1e-9), (torch.float64, 1e-4)):
        try:
            values, V = torch.linalg.eigh(S if not damping else _damped(S.to(dtype), damping))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # torch.linalg.LinAlgError is one
            continue
        if all_finite((values, V)):
            return (values.to(S.dtype), V.to(S.dtype)) if damping else (values, V)
    raise torch.linalg.LinAlgError(f"the eigenvalues of a matrix of {len(S)} rows do not converge, in float64 neither")


def _damped(S: Tensor, damping: float) -> Tensor:
    return S + damping * S.diagonal().mean() * torch.eye(len(S), dtype=S.dtype, device=S.device)


def eigenpairs(S: Tensor) -> tuple[Tensor, Tensor]:
    """The same of symmetric positive S (…, n, n)."""
    if S.ndim == 2:
        return eigh(S)
    values, V = map(torch.stack, zip(*map(eigh, S.flatten(0, -3)), strict=True))
    return values.view(S.shape[:-1]), V.view(S.shape)


def leading_pairs(product: Callable[[Tensor], Tensor], Q: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    r"""(r leading eigenvalues, the smallest first; eigenvectors as columns) of a symmetric positive S, about.

    They are those of S on the span of Sᵏ Q, by orthogonal iteration and Rayleigh–Ritz; the more exact the larger the gap below them.

    Args:
        product: Q ↦ S Q.
        Q: (…, n, r), near the eigenvectors, or in general position.
        steps: k.

    References:
        Golub & Van Loan (2013), Matrix computations, section 8.2.
    """
    for _ in range(steps):
        Q = torch.linalg.qr(product(Q)).Q
    values, V = eigenpairs(Q.mT @ product(Q))
    return values, Q @ V


def followed(product: Callable[[Tensor], Tensor], Q: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """(qᵀSq, q) of columns that follow the leading eigenvectors of a symmetric positive S by orthogonal iteration.

    Columns whose eigenvalues are near each other turn among themselves for long; for a function of S that is smooth it does not matter.

    Args:
        product: Q ↦ S Q.
        Q: (…, n, r), near the eigenvectors, or in general position.
        steps: k.
    """
    for _ in range(steps):
        Q = torch.linalg.qr(product(Q)).Q
    return (Q * product(Q)).sum(-2), Q


def in_general_position(n: int, columns: int, like: Tensor) -> Tensor:
    """Fixed columns (n, columns): those of the identity may be features that are always zero, a constant one is what centering removes."""
    i = torch.arange(1, n * columns + 1, dtype=like.dtype, device=like.device)
    return torch.sin(i * i).view(n, columns)
