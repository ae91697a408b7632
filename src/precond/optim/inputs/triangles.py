"""Symmetric matrices as one of their triangles, as they are sent."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_size(n: int) -> int:
    """How many numbers of a symmetric matrix of n rows :func:`pack` keeps: n(n + 1)/2, or (n + 1)(n + 2)/2 for odd n."""
    n += n % 2
    return (n + 1) * n // 2


def pack(S: Tensor) -> Tensor:
    """Symmetric matrices (…, n, n) as (…, packed_size(n)): one triangle, folded into a rectangle.

    With n = 2k, S₁ its first k columns and S₂₂ its last block it is the (n + 1, k) matrix of tril(S₁) below and triu(S₂₂) above the
    line between them (LAPACK's rectangular full packed format).
    """
    if S.shape[-1] % 2:
        S = torch.nn.functional.pad(S, (0, 1, 0, 1))
    n, k = S.shape[-1], S.shape[-1] // 2
    R = S.new_zeros(*S.shape[:-2], n + 1, k)
    R[..., 1:, :] = S[..., :k].tril()
    R[..., :k, :] += S[..., k:, k:].triu()
    return R.flatten(-2)


def unpack(flat: Tensor, n: int) -> Tensor:
    """The inverse of :func:`pack`."""
    even = n + n % 2
    k = even // 2
    R = flat.unflatten(-1, (even + 1, k))
    S = flat.new_zeros(*flat.shape[:-1], even, even)
    S[..., :k] = R[..., 1:, :].tril()
    S[..., k:, k:] = R[..., :k, :].triu().mT
    S += S.tril(-1).mT
    return S[..., :n, :n].contiguous()
