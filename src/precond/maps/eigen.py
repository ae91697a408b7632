"""Eigendecompositions of symmetric positive matrices that may be singular, badly scaled or not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from precond.vec import all_finite


def eigh(S: Tensor) -> tuple[Tensor, Tensor]:
    """(eigenvalues, the smallest first; eigenvectors as columns) of a symmetric positive S (n, n).

    Where the iteration does not converge, S is taken in float64 with a little of the identity added. Where S holds inf or NaN, both
    are NaN.

    Raises:
        torch.linalg.LinAlgError: where that does not converge either.
    """
    if not all_finite((S,)):
        return torch.full_like(S[:, 0], torch.nan), torch.full_like(S, torch.nan)
    for dtype, damping in ((S.dtype, 0.0), (torch.float64, 1e-9), (torch.float64, 1e-4)):
        wide = S.to(dtype)
        if damping:
            wide = wide + damping * wide.diagonal().mean() * torch.eye(len(S), dtype=dtype, device=S.device)
        try:
            values, V = torch.linalg.eigh(wide)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # torch.linalg.LinAlgError is one
            continue
        if all_finite((values, V)):
            return values.to(S.dtype), V.to(S.dtype)
    raise torch.linalg.LinAlgError(f"the eigenvalues of a matrix of {len(S)} rows do not converge, in float64 neither")
