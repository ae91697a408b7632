"""Eigenbases and inverse roots of symmetric positive matrices that may be singular, huge or not finite."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def eigenbasis(S: Tensor) -> tuple[Tensor, Tensor] | None:
    """(eigenvalues, eigenvectors as columns) of S (n, n), the largest first.

    Where the iteration does not converge, S is taken in float64 with a little of the identity added; where that fails too, or S is
    not finite, None: the caller keeps what it had, and a warning says so.
    """
    for dtype, damping in ((S.dtype, 0.0), (torch.float64, 1e-9), (torch.float64, 1e-4)):
        wide = S.to(dtype)
        scale = wide.diagonal().sum() / max(len(S), 1)
        if not bool(scale.isfinite()):
            break
        if damping:
            wide = wide + damping * scale * torch.eye(len(S), dtype=dtype, device=S.device)
        try:
            values, V = torch.linalg.eigh(wide)
        except RuntimeError:  # torch.linalg.LinAlgError is one
            continue
        if bool(values.isfinite().all()) and bool(V.isfinite().all()):
            return values.flip(0).to(S.dtype), V.flip(1).to(S.dtype)
    kept(S)
    return None


def power_step(S: Tensor, Q: Tensor) -> tuple[Tensor, Tensor] | None:
    r"""(new basis, order): a step of orthogonal iteration, the columns of Q sorted by qᵀSq first; None where S is not finite.

    The new basis is that of the QR decomposition of SQ, its signs such that R has a positive diagonal wherever that is not zero.
    """
    Y = S @ Q
    estimates = (Q * Y).sum(0)
    if not bool(estimates.isfinite().all()):
        kept(S)
        return None
    order = estimates.argsort(descending=True, stable=True)
    basis, R = torch.linalg.qr(Y.index_select(1, order))
    basis.mul_(torch.where(R.diagonal() < 0, -1.0, 1.0).to(basis))
    return basis, order


def drift(S: Tensor, Q: Tensor, first: int, count: int = 32) -> float:
    r"""How far columns of Q are from being eigenvectors of S: √(Σ‖Sq − (qᵀSq)q‖² / Σ‖Sq‖²) over a sample, in [0, 1].

    Args:
        first: which columns: those at ``first`` and then evenly spread, ``count`` of them.
    """
    n = len(S)
    count = min(count, n)
    q = Q[:, (torch.arange(count, device=S.device) * n // count + first) % n]
    y = S @ q
    off = y - q * (q * y).sum(0)
    return float((off.square().sum() / y.square().sum().clamp_min(torch.finfo(S.dtype).tiny)).sqrt())


def kept(S: Tensor) -> None:
    """Say that a decomposition failed (Python shows a warning of one place once)."""
    what = "holds inf or NaN" if not bool(S.isfinite().all()) else "has no eigenvalues that converge"
    warnings.warn(f"a statistic of gradients {what}: the basis or root before is kept, and training goes on", stacklevel=4)
