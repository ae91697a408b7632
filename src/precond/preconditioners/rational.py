r"""Inverse roots of symmetric positive matrices side by side (k, n, n), which wait for no device: sums of inverses of shifted matrices.

x^(−e) ≈ Σ_j w_j/(x + t_j) to 1e-4 on an interval, with about ten poles −t_j < 0 for five or six orders of magnitude between the largest
eigenvalue and the damping. Every S + t_j I is positive, and its inverse is taken by a Cholesky decomposition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from precond.preconditioners.eigenbases import at_hand, rounding
from precond.preconditioners.roots import inverse_root

SCRATCH = 8 * 2**20
"""Bytes of the shifted matrices that are inverted at once, unless one stack of them alone has more."""


def renew(
    roots: Sequence[Tensor],
    factors: Sequence[Tensor],
    power: float,
    damping: float,
    method: str = "eigh",
    bases: Sequence[Tensor] = (),
    scale: float = 1.0,
) -> None:
    """root ← (S/s + ε λ_max I)^(−power) of several stacks S (k, n, n), s the ``scale``; a root that fails stays.

    On a processor each by :func:`precond.preconditioners.roots.inverse_root`. An accelerator is not waited for: there they are made of
    the ``bases``, columns near eigenvectors, or by :func:`inverse_roots`.
    """
    if not at_hand(roots[0]):
        joined = torch.cat([*factors]).div_(scale)
        new = _in_bases(joined, torch.cat([*bases]), power, damping) if bases else inverse_roots(joined, power, damping)
        fine = (new.diagonal(dim1=-2, dim2=-1).sum(-1) < torch.inf)[:, None, None]  # not where it is NaN, either
        for root, mine, ok in zip(roots, new.split(len(roots[0])), fine.split(len(roots[0])), strict=True):
            torch.where(ok, mine, root, out=root)
        return
    for j, (root, S) in enumerate(zip(roots, factors, strict=True)):
        for k, matrix in enumerate(S):
            basis = bases[j][k] if bases else None
            how = "basis" if bases else method
            if (found := inverse_root(matrix / scale, power, damping, how, basis)) is not None:
                root[k].copy_(found)


def _in_bases(S: Tensor, Q: Tensor, power: float, damping: float) -> Tensor:
    """The roots with qᵀSq for eigenvalues."""
    values = (Q * (S @ Q)).sum(-2)
    least = max(damping, rounding(S.shape[-1], S.dtype))
    values = values.clamp_min(0).add_(values.amax(-1, keepdim=True), alpha=least)
    return (Q * (values**-power)[:, None]) @ Q.mT


def inverse_roots(S: Tensor, power: float, damping: float) -> Tensor:
    """(S + ε λ_max I)^(−power) of each, ε = ``damping`` or what is rounding in S; NaN where S is zero or not finite.

    Changes S. λ_max is known from above, exactly where one eigenvalue stands out, and no worse than by a factor of n^(1/8).
    """
    n, whole = S.shape[-1], int(power)
    least = max(damping, rounding(n, S.dtype))
    trace = S.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    S /= trace
    top = _fourth(S)
    S /= top
    root, eye = torch.zeros_like(S), torch.eye(n, dtype=S.dtype, device=S.device)
    if power > whole:
        poles, weights = partial_fractions(power - whole, least)
        many = max(1, SCRATCH // (S.numel() * S.element_size()))
        if many == 1:
            for pole, weight in zip(poles, weights, strict=True):
                _add_inverse(root, S, eye, least + pole, weight)
        else:
            shifts, scales = _on_device(power - whole, least, S.dtype, S.device)
            for j in range(0, len(poles), many):
                _add_inverses(root, S, eye, shifts[j : j + many], scales[j : j + many])
    if whole:
        inverse = torch.zeros_like(S)
        _add_inverse(inverse, S, eye, least, 1.0)
        inverse = torch.linalg.matrix_power(inverse, whole)
        root = inverse @ root if power > whole else inverse
    return root.mul_((trace * top) ** -power)


def _fourth(A: Tensor) -> Tensor:
    """The Frobenius norm of A⁴, to the power of 1/4, (k, 1, 1): near the largest eigenvalue of a matrix whose trace is 1."""
    A = A @ A
    return torch.linalg.vector_norm(A @ A, dim=(-2, -1), keepdim=True) ** 0.25


def _add_inverse(out: Tensor, A: Tensor, eye: Tensor, shift: float, weight: float) -> None:
    """out ← out + w(A + s I)⁻¹."""
    L = torch.add(A, eye, alpha=shift)
    torch.linalg.cholesky_ex(L, out=(L, L.new_empty(len(L), dtype=torch.int32)))
    X = torch.linalg.solve_triangular(L, eye, upper=False)
    out.baddbmm_(X.mT, X, alpha=weight)


def _add_inverses(out: Tensor, A: Tensor, eye: Tensor, shifts: Tensor, weights: Tensor) -> None:
    """out ← out + Σ w (A + s I)⁻¹, of a few at once."""
    n = A.shape[-1]
    X = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(A[:, None] + shifts * eye).L, eye, upper=False)
    X = X.contiguous()
    rows = X.view(len(A), -1, n)
    out.baddbmm_(rows.mT, (X * weights).view(rows.shape))


@cache
def _on_device(power: float, least: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The shifts and weights of partial fractions, (J, 1, 1): sent once."""
    poles, weights = partial_fractions(power, least)
    shifts = [least + t for t in poles]
    return tuple(torch.tensor(x, dtype=dtype).view(-1, 1, 1).to(device) for x in (shifts, weights))  # type: ignore[return-value]


@cache
def partial_fractions(power: float, least: float, tolerance: float = 1e-4) -> tuple[list[float], list[float]]:
    """(t, w) such that Σ w/(x + t) is x^(−power) on [least, 1 + least] up to a relative error, 0 < power < 1; as few as serve."""
    x = torch.logspace(math.log10(least), math.log10(1 + least), 300, dtype=torch.float64)
    best = math.inf, [0.0], [0.0]
    for count in range(4, 40):
        for wider in (10, 30, 100):
            t = torch.logspace(math.log10(least / wider), math.log10(wider), count, dtype=torch.float64)
            terms = x[:, None] ** power / (x[:, None] + t)
            w = torch.linalg.lstsq(terms, torch.ones_like(x)[:, None], driver="gelsd").solution[:, 0]
            error = float((terms @ w - 1).abs().amax())
            if error < best[0]:
                best = error, t.tolist(), w.tolist()
        if best[0] < tolerance:
            break
    return best[1], best[2]
