r"""Inverse roots of symmetric positive matrices side by side (k, n, n) that wait for no device: sums of inverses of shifted matrices.

x^(−e) ≈ Σ_j w_j/(x + t_j) to 5e-6 on an interval, with 10 to 20 poles −t_j < 0 for as many orders of magnitude as there are between
the largest eigenvalue and the damping. Every S + t_j I is positive, and its inverse is taken by a Cholesky decomposition.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from precond.preconditioners.eigenbases import at_hand, rounding
from precond.preconditioners.roots import inverse_root

SCRATCH = 16 * 2**20
"""Bytes of the shifted matrices that are inverted at once, unless one stack of them alone has more."""


def renew(root: Tensor, S: Tensor, power: float, damping: float, method: str = "eigh", basis: Tensor | None = None) -> None:
    """root ← (S + ε λ_max I)^(−power), where that fails it stays.

    On a processor each by :func:`precond.preconditioners.roots.inverse_root`. An accelerator is not waited for: there it is made of the
    ``basis``, or :func:`inverse_roots`.
    """
    if at_hand(S):
        for k, matrix in enumerate(S):
            one = {} if basis is None else {"method": "basis", "basis": basis[k]}
            if (found := inverse_root(matrix, power, damping, **{"method": method, **one})) is not None:
                root[k].copy_(found)
        return
    new = inverse_roots(S, power, damping) if basis is None else _in_basis(S, basis, power, damping)
    torch.where(new.isfinite().flatten(1).all(1)[:, None, None], new, root, out=root)


def _in_basis(S: Tensor, Q: Tensor, power: float, damping: float) -> Tensor:
    """The root with qᵀSq for eigenvalues."""
    values = (Q * (S @ Q)).sum(-2)
    top = values.amax(-1, keepdim=True)
    least = max(damping, rounding(S.shape[-1], S.dtype))
    values = torch.where(top > 0, values.clamp_min(0) + least * top, 1.0)
    return (Q * (values**-power)[:, None]) @ Q.mT


def inverse_roots(S: Tensor, power: float, damping: float) -> Tensor:
    """(S + ε λ_max I)^(−power) of each, ε = ``damping`` or what is rounding in S; inf or NaN where S is not finite. S = 0 gives I.

    λ_max is known to some percent.
    """
    n = S.shape[-1]
    least = max(damping, rounding(n, S.dtype))
    top, eye = largest(S), torch.eye(n, dtype=S.dtype, device=S.device)
    known = (top != 0)[:, None, None]
    A = torch.where(known, S / torch.where(known, top[:, None, None], 1.0), eye)
    whole = int(power)
    root = torch.zeros_like(A)
    if power > whole:
        poles, weights = partial_fractions(power - whole, least)
        many = max(1, SCRATCH // (A.numel() * A.element_size()))
        for j in range(0, len(poles), many):
            _add_inverses(root, A, [least + t for t in poles[j : j + many]], weights[j : j + many])
    if whole:
        inverse = torch.zeros_like(A)
        _add_inverses(inverse, A, [least], [1.0])
        inverse = torch.linalg.matrix_power(inverse, whole)
        root = inverse @ root if power > whole else inverse
    return torch.where(known, root * top[:, None, None] ** -power, eye)


def _add_inverses(out: Tensor, A: Tensor, shifts: list[float], weights: list[float]) -> None:
    """out ← out + Σ w (A + s I)⁻¹."""
    k, n = len(A), A.shape[-1]
    shifted = A.repeat(len(shifts), 1, 1).view(len(shifts), k, n, n)
    for X, shift in zip(shifted, shifts, strict=True):
        X.diagonal(dim1=-2, dim2=-1).add_(shift)
    L = torch.linalg.cholesky_ex(shifted).L
    X = torch.linalg.solve_triangular(L, torch.eye(n, dtype=A.dtype, device=A.device), upper=False)
    for x, weight in zip(X, weights, strict=True):
        out.baddbmm_(x.mT, x, alpha=weight)


def largest(S: Tensor) -> Tensor:
    """λ_max of each, from above and by no more than a factor of n^(1/16): the Frobenius norm of an eighth power."""
    scale = S.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(torch.finfo(S.dtype).tiny)
    A = S / scale[:, None, None]
    size = torch.linalg.matrix_norm(A, keepdim=True)
    A = A / size.clamp_min(1.0)
    for _ in range(3):
        A = A @ A
    return torch.where(size[:, 0, 0] > 0, torch.linalg.matrix_norm(A) ** 0.125 * size[:, 0, 0], 0.0) * scale


@cache
def partial_fractions(power: float, least: float, tolerance: float = 5e-6) -> tuple[list[float], list[float]]:
    """(t, w) such that Σ w/(x + t) is x^(−power) on [least, 1 + least] up to a relative error, 0 < power < 1; as few as serve."""
    x = torch.logspace(math.log10(least), math.log10(1 + least), 300, dtype=torch.float64)
    best = math.inf, [0.0], [0.0]
    for count in range(6, 40):
        for wider in (30, 100):
            t = torch.logspace(math.log10(least / wider), math.log10(wider), count, dtype=torch.float64)
            terms = x[:, None] ** power / (x[:, None] + t)
            w = torch.linalg.lstsq(terms, torch.ones_like(x)[:, None], driver="gelsd").solution[:, 0]
            error = float((terms @ w - 1).abs().amax()) + 1e-16 * float((terms @ w.abs()).amax())
            if error < best[0]:
                best = error, t.tolist(), w.tolist()
        if best[0] < tolerance:
            break
    return best[1], best[2]
