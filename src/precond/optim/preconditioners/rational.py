r"""Inverse roots of symmetric positive matrices side by side (k, n, n), which wait for no device: sums of inverses of shifted matrices.

x^(−e) ≈ Σ_j w_j/(x + t_j) to 1e-4 on an interval, with about ten poles −t_j < 0 for five or six orders of magnitude between the largest
eigenvalue and the damping. Every I + S/t_j is positive, and its inverse is taken by a Cholesky decomposition. S is only read: beside it
there are L, L⁻¹ and the sum.
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
    the ``bases``, columns near eigenvectors, or by :func:`inverse_roots`.
    """
    if not at_hand(roots[0]):
        for some in _together(factors, scratch):
            S = _joined(factors[some])
            if bases:
                new = _in_bases(S, _joined(bases[some]), power, damping, scale)
            else:
                new = inverse_roots(S, power, damping, scale, scratch)
            del S
            fine = new[:, :1, :1] < torch.inf  # what is not finite somewhere is NaN throughout
            for root, mine, ok in zip(roots[some], new.split(len(roots[0])), fine.split(len(roots[0])), strict=True):
                torch.where(ok, mine, root, out=root)
            del new, mine  # memory for the next one's
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


def _joined(stacks: Sequence[Tensor]) -> Tensor:
    return stacks[0] if len(stacks) == 1 else torch.cat([*stacks])


def _in_bases(S: Tensor, Q: Tensor, power: float, damping: float, scale: Scalar) -> Tensor:
    """The roots with qᵀSq for eigenvalues."""
    values = (Q * (S @ Q)).sum(-2) / scale
    least = max(damping, rounding(S.shape[-1], S.dtype))
    values = values.clamp_min(0).add_(values.amax(-1, keepdim=True), alpha=least)
    return (Q * (values**-power)[:, None]) @ Q.mT


def inverse_roots(S: Tensor, power: float, damping: float, scale: Scalar = 1.0, scratch: int = JOINED) -> Tensor:
    """(S/s + ε λ_max I)^(−power) of each, s the ``scale``, ε = ``damping`` or what is rounding in S; NaN where S is zero or not finite.

    λ_max is known from above, exactly where one eigenvalue stands out, and no worse than by a factor of n^(1/8). A root takes three times
    the memory of S.
    """
    if isinstance(scale, Tensor):  # which products do not take for a number without reading it
        return inverse_roots(S, power, damping, 1.0, scratch).mul_(scale**power)
    n, whole = S.shape[-1], int(power)
    least = max(damping, rounding(n, S.dtype))
    eye = (_kept_eye if n <= 512 else torch.eye)(n, dtype=S.dtype, device=S.device)
    size = _largest(S)
    root = _fractional(S, size, eye, power - whole, least, scale**power, scratch) if power > whole else None
    if whole:
        once = _inverse(S, 1 / (size * least), eye, (scale if root is None else 1.0) / least)
        inverse = torch.linalg.matrix_power(once, whole)
        root = inverse if root is None else inverse @ root
    assert root is not None
    return root.mul_(size**-power)


def _largest(S: Tensor) -> Tensor:
    """The Frobenius norm of S⁴, to the power of 1/4, (k, 1, 1): near the largest eigenvalue."""
    trace = S.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    A = S / trace
    A = A @ A
    return torch.linalg.vector_norm(A @ A, dim=(-2, -1), keepdim=True).pow_(0.25).mul_(trace)


def _fractional(S: Tensor, size: Tensor, eye: Tensor, power: float, least: float, gain: float, scratch: int) -> Tensor:
    """gain·(S/size + least I)^(−power), 0 < power < 1: as many inverses at once as scratch memory is for."""
    shifts, weights = partial_fractions(power, least)
    sent, sent_weights = _on_device(power, least, S.dtype, S.device)
    per = sent / size[:, None]  # (k, J, 1, 1)
    many = max(1, scratch // (2 * S.numel() * S.element_size()))
    root = None
    for j in range(0, len(shifts), many):
        if many == 1:
            root = _inverse(S, per[:, j], eye, gain * weights[j] / shifts[j], root)
        else:
            root = _inverses(S, per[:, j : j + many], eye, sent_weights[j : j + many], gain, root)
    assert root is not None
    return root


def _inverse(S: Tensor, per: Tensor, eye: Tensor, weight: float, to: Tensor | None = None) -> Tensor:
    """weight·(I + per·S)⁻¹, added to a tensor in place where one is given; ``per`` (k, 1, 1)."""
    L = torch.addcmul(eye, S, per)
    torch.linalg.cholesky_ex(L, out=(L, L.new_empty(len(L), dtype=torch.int32)))
    X = torch.linalg.solve_triangular(L, eye, upper=False)
    return torch.baddbmm(X, X.mT, X, beta=0, alpha=weight) if to is None else to.baddbmm_(X.mT, X, alpha=weight)


def _inverses(S: Tensor, per: Tensor, eye: Tensor, weights: Tensor, gain: float, to: Tensor | None) -> Tensor:
    """The same of gain·Σ weight·(I + per·S)⁻¹, all of them at once; ``per`` (k, J, 1, 1), ``weights`` (J, 1, 1)."""
    L = torch.addcmul(eye, S[:, None], per)
    torch.linalg.cholesky_ex(L, out=(L, L.new_empty(L.shape[:2], dtype=torch.int32)))
    X = torch.linalg.solve_triangular(L.mT, eye, upper=True).mT  # L⁻¹, its rows one after the other in memory
    del L
    rows, weighted = (x.view(len(S), -1, S.shape[-1]) for x in (X, X * weights))
    return torch.baddbmm(S, rows.mT, weighted, beta=0, alpha=gain) if to is None else to.baddbmm_(rows.mT, weighted, alpha=gain)


_kept_eye = cache(torch.eye)  # of small matrices, where calls are what it costs


@cache
def _on_device(power: float, least: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """1/t and w/t of partial fractions, (J, 1, 1): sent once."""
    shifts, weights = partial_fractions(power, least)
    numbers = [1 / t for t in shifts], [w / t for t, w in zip(shifts, weights, strict=True)]
    return tuple(torch.tensor(x, dtype=dtype).view(-1, 1, 1).to(device) for x in numbers)  # type: ignore[return-value]


@cache
def partial_fractions(power: float, least: float, tolerance: float = 1e-4) -> tuple[list[float], list[float]]:
    """(t, w) such that Σ w/(x + t) is (x + least)^(−power) on [0, 1] up to a relative error, 0 < power < 1; as few as serve."""
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
    return [least + t for t in best[1]], best[2]
