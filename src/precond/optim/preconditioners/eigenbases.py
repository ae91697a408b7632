r"""Orthogonal bases of symmetric positive matrices side by side (k, n, n): their eigenvectors.

A basis must not depend on rounding. Where S has no more than r eigenvalues beyond rounding, the other eigenvectors are arbitrary: a
batch in two halves would give others, and Adam another step. So the first r columns of Q are eigenvectors, or what follows them, and
the rest is that of the product of r reflections which takes these columns to unit vectors one by one: a function of their span alone,
whose columns stay near unit vectors. (What rounding leaves in the row of a feature that was always zero is set to zero first: it would
decide the sign of a reflection.) Columns come with the largest qᵀSq first, those of equal ones in the order before. Signs are
those of the reflections when a basis is chosen, and then those for which QᵀQ_before has a positive diagonal, about; no step depends on them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from precond.algebra.precision import rounding
from precond.algebra.vec import all_finite
from precond.optim.blocks.memory import AT_ONCE
from precond.optim.preconditioners.roots import decomposed

WARM_UP = 8
"""Steps in which an accelerator is waited for, to see what was observed for the first time."""


def at_hand(t: Tensor) -> bool:
    """Whether the host reads a tensor without waiting for a device."""
    return t.device.type == "cpu"


def least(n: int, dtype: torch.dtype) -> float:
    """The least eigenvalue whose eigenvector counts, relative to the largest.

    In float64, too, a millionth: rounding turns the eigenvector of an eigenvalue λ by u·λ_max/λ.
    """
    return max(rounding(n, dtype), 1e-6)


def begin(S: Tensor, Q: Tensor) -> Tensor:
    """Q ← the eigenvectors of S, in place, where these are found (k,): see :func:`precond.optim.preconditioners.roots.decomposed`."""
    n, found = S.shape[-1], []
    many = max(1, AT_ONCE // (2 * n * n * S.element_size()))
    for matrices, bases in zip(S.split(many), Q.split(many), strict=True):
        values, V, fine = decomposed_together(matrices)
        rows = V.mT.flip(-2)  # the largest first
        del V
        rows *= (values > least(n, S.dtype) * values[:, -1:]).flip(-1)[:, :, None]
        rows *= (matrices.diagonal(dim1=-2, dim2=-1) > 0)[:, None, :]
        A, tau = rows.mT, torch.empty_like(values)  # their memory holds columns
        torch.geqrf(A, out=(A, tau))
        torch.linalg.householder_product(A, tau, out=A)
        torch.where(fine[:, None, None], A, bases, out=bases)
        found.append(fine)
    return torch.cat(found)


def decomposed_together(S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(eigenvalues, the smallest first; eigenvectors as columns; whether they are found (k,)) of S, of all at once where nothing fails.

    What is not found is 0. The host waits for them.
    """
    if all_finite((S,)):
        try:
            values, V = torch.linalg.eigh(S)
            if all_finite((values, V)):
                return values, V, torch.ones(len(S), dtype=torch.bool, device=S.device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # torch.linalg.LinAlgError is one
            pass
    each = [decomposed(matrix) for matrix in S]
    none = torch.zeros_like(S[0, 0]), torch.zeros_like(S[0])
    values, V = map(torch.stack, zip(*(none if pairs is None else pairs for pairs in each), strict=True))
    return values, V, torch.tensor([pairs is not None for pairs in each]).to(S.device)


def orthonormal(Y: Tensor) -> Tensor:
    """Orthonormal columns (…, n, c) that span those of Y, |Y| ≤ 1 about, and where these are dependent to rounding more than that."""
    Y = hardshrink(Y, rounding(Y.shape[-2], Y.dtype))
    A, tau = torch.geqrf(Y)
    some = independent(A)
    if not (at_hand(Y) and bool(some.all())):
        A, tau = torch.geqrf(Y * some[..., None, :])
    return torch.linalg.householder_product(A, tau)


def independent(A: Tensor) -> Tensor:
    """Which columns do not depend on those before, to rounding; of what ``torch.geqrf`` made of them."""
    sizes = A.diagonal(dim1=-2, dim2=-1).abs()
    return sizes > least(A.shape[-2], A.dtype) * sizes.amax(-1, keepdim=True)


def drift(times: Callable[[Tensor], Tensor], Q: Tensor, first: int, count: int = 32) -> Tensor:
    r"""How far columns of Q are from being eigenvectors of S: √(Σ‖Sq − (qᵀSq)q‖² / Σ‖Sq‖²) over a sample, in [0, 1], of each (k,).

    Args:
        times: Q ↦ S Q.
        first: which columns: those at ``first`` and then evenly spread, ``count`` of them.
    """
    n = Q.shape[-1]
    count = min(count, n)
    q = Q[..., (torch.arange(count, device=Q.device) * n // count + first) % n]
    y = times(q)
    off = y - q * (q * y).sum(-2, keepdim=True)
    total = y.square().sum((-2, -1)).clamp_min(torch.finfo(Q.dtype).tiny)
    return (off.square().sum((-2, -1)) / total).sqrt()
