"""Eigenbases and inverse roots of symmetric positive matrices that may be singular, huge or not finite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from precond.algebra.maps.eigen import eigh, eigh_of_finite, in_general_position, leading_pairs
from precond.algebra.precision import rounding
from precond.algebra.vec import all_finite
from precond.algebra.warning import warn


def decomposed(S: Tensor, by: Callable[[Tensor], tuple[Tensor, Tensor]] = eigh) -> tuple[Tensor, Tensor] | None:
    """(eigenvalues, the smallest first; eigenvectors as columns) of S (n, n), all of them or those that ``by`` finds.

    None where they do not converge (see :func:`precond.algebra.maps.eigen.eigh`) or S is not finite: the caller keeps what it had, and a
    warning says so.
    """
    try:
        values, V = by(S)
    except torch.linalg.LinAlgError:
        kept(S)
        return None
    if not all_finite((values,)):
        kept(S)
        return None
    return values, V


def inverse_root(S: Tensor, power: float, damping: float, method: str = "eigh", basis: Tensor | None = None) -> Tensor | None:
    r"""(S + ε λ_max I)^(−power) of a symmetric positive S (n, n); None where that fails. S = 0 gives the identity.

    Args:
        damping: ε, relative to the largest eigenvalue; what is smaller than rounding in S counts as that.
        method: ``"eigh"``; ``"newton"``, the coupled iteration, for a whole 1/power; or ``"basis"``, with Sq·q for eigenvalues.
        basis: of ``"basis"``: columns near the eigenvectors of S.

    References:
        Guo & Higham (2006), A Schur–Newton method for the matrix pth root; Anil et al. (2020), Scalable second order optimization.
    """
    least = rounding(len(S), S.dtype)
    largest = float(S.diagonal().amax())
    if largest == 0:
        return torch.eye(len(S), dtype=S.dtype, device=S.device)
    S = S / largest  # else what is added to tiny eigenvalues would vanish
    if method == "newton" and (found := _newton(S, round(1 / power), max(damping, least))) is not None:
        return found * largest**-power
    if method == "basis" and basis is not None:
        values, V = (basis * (S @ basis)).sum(0), basis
        if not all_finite((values,)):
            kept(S)
            return None
        return (V * (damped(values, float(values.amax()), damping, least) ** -power * largest**-power)) @ V.T
    if not all_finite((S,)):
        kept(S)
        return None
    if (known := damped_pairs(S, damping)) is None:
        return None
    _, values, V = known
    return (V * (values**-power * largest**-power)) @ V.T


def damped_pairs(S: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """(λ, λ + ε λ_max, V) of a finite symmetric positive S (n, n), with what is smaller than rounding as that; None where that fails.

    The second is 1 where S = 0.
    """
    try:
        values, V = eigh_of_finite(S)
    except torch.linalg.LinAlgError:
        kept(S)
        return None
    top = values[-1].item()
    return values, damped(values, top, damping, rounding(S.shape[0], S.dtype)) if top > 0 else torch.ones_like(values), V


def damped(values: Tensor, top: float, damping: float, least: float) -> Tensor:
    """Eigenvalues + ε·top, at least what rounding leaves of them."""
    return (values + damping * top).clamp_min(least * top) if damping < least else values.clamp_min(0).add_(damping * top)


def leading_inverse_root(
    S: Tensor, power: float, damping: float, Q: Tensor | None, rank: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    r"""(U (n, r), s (r,), a ()) of (S̄ + ε λ_max I)^(−power) = aI + U·diag(s − a)·Uᵀ; None where that fails.

    S̄ has the r leading eigenvalues of S and for all others their mean. S = 0 gives s = a = 1.

    Args:
        Q: columns near the eigenvectors, or None.
        rank: r < n.
    """
    n, largest = len(S), float(S.diagonal().amax())
    start, steps = (in_general_position(n, rank, S), 3) if Q is None else (Q, 1)
    if largest == 0:
        return torch.linalg.qr(start).Q, S.new_ones(rank), S.new_ones(())
    S = S / largest
    if (known := decomposed(S, lambda S: leading_pairs(lambda Q: S @ Q, start, steps))) is None:
        return None
    values, U = known
    rest = (S.trace() - values.sum()) / (n - rank)
    both = damped(torch.cat([values, rest[None]]), float(values[-1]), damping, rounding(n, S.dtype))
    both = both**-power * largest**-power
    return U, both[:rank], both[rank]


def _newton(S: Tensor, p: int, damping: float) -> Tensor | None:
    """S^(−1/p) by the coupled iteration X ← X T, N ← Tᵖ N with T = ((p+1)I − N)/p; None where it does not converge."""
    top, eye = largest_eigenvalue(S), torch.eye(len(S), dtype=S.dtype, device=S.device)
    if not bool(top.isfinite()):
        return None
    A = S + damping * top * eye
    z = (1 + p) / (2 * 1.1 * top)
    X, N = eye * z ** (1 / p), A * z
    best = torch.inf
    for _ in range(60):
        T = ((p + 1) * eye - N) / p
        X, N = X @ T, torch.linalg.matrix_power(T, p) @ N
        error = float((N - eye).abs().amax())
        if not error < best:  # also NaN
            break
        best = error
        if error < 10 * rounding(len(S), S.dtype):
            break
    return (X + X.T) / 2 if best < 1e-2 else None


def largest_eigenvalue(S: Tensor, steps: int = 32) -> Tensor:
    """λ_max of a symmetric positive S (n, n) by Lanczos steps from a fixed vector: exact for n ≤ ``steps``, else from below."""
    n, k = len(S), min(len(S), steps)
    Q = S.new_zeros(n, k)
    w = in_general_position(n, 1, S)[:, 0]
    least = S.new_zeros(())
    for j in range(k):
        for _ in range(2):
            w = w - Q @ (Q.T @ w)
        size = w.norm()
        Q[:, j] = torch.where(size > least, w / size, 0.0)  # zero once the vectors span an invariant space
        w = S @ Q[:, j]
        least = 10 * rounding(n, S.dtype) * S.diagonal().amax()
    T = Q.T @ S @ Q
    return torch.linalg.eigvalsh(T)[-1] if bool(T.isfinite().all()) else T.amax()


def kept(S: Tensor) -> None:
    """Say that a decomposition failed (Python shows a warning of one place once)."""
    what = "holds inf or NaN" if not bool(S.isfinite().all()) else "has no eigenvalues that converge"
    warn(
        f"a statistic of gradients {what}: the basis or root before is kept, and training goes on; look for bad data, or lower the rate"
    )
