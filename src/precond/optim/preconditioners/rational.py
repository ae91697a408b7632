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

from precond.algebra.precision import rounding
from precond.algebra.vec import Scalar
from precond.optim.blocks.memory import JOINED
from precond.optim.preconditioners.eigenbases import at_hand
from precond.optim.preconditioners.roots import inverse_root


def renew(
    roots: Sequence[Tensor],
    factors: Sequence[Tensor],
    power: float,
    damping: float,
    method: str = "eigh",
    bases: Sequence[Tensor] = (),
    scale: Scalar = 1.0,
    scratch: int = JOINED,
) -> None:
    """root ← (S/s + ε λ_max I)^(−power) of several stacks S (k, n, n), s the ``scale``; a root that fails stays.

    ``scratch``: bytes that it may take, unless one stack alone takes more.

    On a processor each by :func:`precond.optim.preconditioners.roots.inverse_root`. An accelerator is not waited for: there they are made of
    the ``bases``, columns near eigenvectors, or by :func:`inverse_roots_`.
    """
    if not at_hand(roots[0]):
        for some in _together(factors, scratch):
            S = torch.cat([*factors[some]])
            if bases:
                new = _in_bases(S, torch.cat([*bases[some]]), power, damping, scale)
            else:
                new = inverse_roots_(S, power, damping, scale, scratch)
            del S
            fine = new[:, :1, :1] < torch.inf  # what is not finite somewhere is NaN throughout
            for root, mine, ok in zip(roots[some], new.split(len(roots[0])), fine.split(len(roots[0])), strict=True):
                torch.where(ok, mine, root, out=root)
        return
    for j, (root, S) in enumerate(zip(roots, factors, strict=True)):
        for k, matrix in enumerate(S):
            basis = bases[j][k] if bases else None
            how = "basis" if bases else method
            if (found := inverse_root(matrix / scale, power, damping, how, basis)) is not None:
                root[k].copy_(found)


def _together(stacks: Sequence[Tensor], scratch: int) -> list[slice]:
    """Runs of stacks alike that scratch memory is for, each of one at least."""
    many = max(1, scratch // (stacks[0].numel() * stacks[0].element_size()))
    return [slice(i, i + many) for i in range(0, len(stacks), many)]


def _in_bases(S: Tensor, Q: Tensor, power: float, damping: float, scale: Scalar) -> Tensor:
    """The roots with qᵀSq for eigenvalues."""
    values = (Q * (S @ Q)).sum(-2) / scale
    least = max(damping, rounding(S.shape[-1], S.dtype))
    values = values.clamp_min(0).add_(values.amax(-1, keepdim=True), alpha=least)
    return (Q * (values**-power)[:, None]) @ Q.mT


def inverse_roots_(A: Tensor, power: float, damping: float, scale: Scalar = 1.0, scratch: int = JOINED) -> Tensor:
    """(A/s + ε λ_max I)^(−power) of each, s the ``scale``, ε = ``damping`` or what is rounding in A; NaN where A is zero or not finite.

    λ_max is known from above, exactly where one eigenvalue stands out, and no worse than by a factor of n^(1/8). A is written over; with
    it a root takes four times its memory.
    """
    if isinstance(scale, Tensor):  # which products do not take for a number without reading it
        return inverse_roots_(A, power, damping, 1.0, scratch).mul_(scale**power)
    n, whole = A.shape[-1], int(power)
    least = max(damping, rounding(n, A.dtype))
    size = A.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    eye = (_kept_eye if n <= 512 else torch.eye)(n, dtype=A.dtype, device=A.device)
    A /= size
    top = _fourth(A)
    A /= top
    size = (size * top) ** -power
    root = _fractional(A, eye, power - whole, least, scale**power, scratch) if power > whole else None
    if whole:
        inverse = torch.linalg.matrix_power(_inverse(A, eye, least, scale if root is None else 1.0), whole)
        root = inverse if root is None else inverse @ root
    assert root is not None
    return root.mul_(size)


def _fourth(A: Tensor) -> Tensor:
    """The Frobenius norm of A⁴, to the power of 1/4, (k, 1, 1): near the largest eigenvalue of a matrix whose trace is 1."""
    A = A @ A
    return torch.linalg.vector_norm(A @ A, dim=(-2, -1), keepdim=True) ** 0.25


def _fractional(A: Tensor, eye: Tensor, power: float, least: float, gain: float, scratch: int) -> Tensor:
    """gain·(A + least I)^(−power), 0 < power < 1: as many inverses at once as scratch memory is for."""
    poles, weights = partial_fractions(power, least)
    many = max(1, scratch // (2 * A.numel() * A.element_size()))
    root = None
    if many == 1:
        for pole, weight in zip(poles, weights, strict=True):
            root = _inverse(A, eye, least + pole, gain * weight, root)
    else:
        shifts, sent = _on_device(power, least, A.dtype, A.device)
        for j in range(0, len(poles), many):
            root = _inverses(A, eye, shifts[j : j + many], sent[j : j + many], gain, root)
    assert root is not None
    return root


def _inverse(A: Tensor, eye: Tensor, shift: float, weight: float, to: Tensor | None = None) -> Tensor:
    """weight·(A + shift I)⁻¹, added to a tensor in place where one is given."""
    L = torch.add(A, eye, alpha=shift)
    torch.linalg.cholesky_ex(L, out=(L, L.new_empty(len(L), dtype=torch.int32)))
    X = torch.linalg.solve_triangular(L, eye, upper=False)
    return torch.baddbmm(X, X.mT, X, beta=0, alpha=weight) if to is None else to.baddbmm_(X.mT, X, alpha=weight)


def _inverses(A: Tensor, eye: Tensor, shifts: Tensor, weights: Tensor, gain: float, to: Tensor | None) -> Tensor:
    """The same of gain·Σ weight·(A + shift I)⁻¹, all of them at once."""
    L = torch.addcmul(A[:, None], shifts, eye)
    torch.linalg.cholesky_ex(L, out=(L, L.new_empty(L.shape[:2], dtype=torch.int32)))
    X = torch.linalg.solve_triangular(L.mT, eye, upper=True).mT  # L⁻¹, its rows one after the other in memory
    del L
    rows, weighted = (x.view(len(A), -1, A.shape[-1]) for x in (X, X * weights))
    return torch.baddbmm(A, rows.mT, weighted, beta=0, alpha=gain) if to is None else to.baddbmm_(rows.mT, weighted, alpha=gain)


_kept_eye = cache(torch.eye)  # of small matrices, where calls are what it costs


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
