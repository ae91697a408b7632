"""Roots and leading eigenvectors by products and QR decompositions alone: the host never waits for an accelerator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def waits(S: Tensor) -> bool:
    """Whether an eigendecomposition of S would make the host wait for a device, which reports on it."""
    return S.device.type != "cpu"


def inverse_square_root(S: Tensor, floor: float, steps: int = 40) -> Tensor:
    r"""S^(−1/2) of symmetric positive definite S (…, n, n), by the coupled Newton–Schulz iteration in float64.

    Y₀ = S/s, Z₀ = I; T = (3I − ZY)/2, Y ← YT, Z ← TZ: Y → (S/s)^(1/2), Z → (S/s)^(−1/2), with s = ‖S‖ ≥ λ_max. An eigenvalue λ/s comes
    closer to 1 by a factor of 9/4 in each step until it is near it, and then its distance is squared.

    Args:
        floor: added to S relative to ‖S‖: what is left of smaller eigenvalues is rounding.
        steps: enough for 10⁻¹² < λ/s.

    References:
        Higham (2008), Functions of matrices, eq. (6.35).
    """
    wide = S.double()
    n = S.shape[-1]
    eye = torch.eye(n, dtype=torch.float64, device=S.device)
    size = torch.linalg.vector_norm(wide, 2, (-2, -1), keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    Y = torch.addcdiv(floor * eye, wide, size)
    Z = eye.expand_as(Y)
    for _ in range(steps):
        T = Z @ Y
        T = T.mul_(-0.5)
        T.diagonal(dim1=-2, dim2=-1).add_(1.5)
        Y, Z = Y @ T, T @ Z
    return (Z * size.rsqrt()).to(S.dtype)


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


def largest(S: Tensor) -> Tensor:
    """λ_max of symmetric positive S (…, n, n), about, shape (…, 1, 1): (Σλ⁸)^(1/8), from above by a factor of at most n^(1/8)."""
    square = S @ S
    return torch.linalg.vector_norm(square @ square, 2, (-2, -1), keepdim=True) ** 0.25
