"""What preconditioners with a factor per side of a matrix share: which sides, and their statistics Σ GGᵀ and Σ GᵀG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from precond.optim.blocks import Leaf
from precond.optim.preconditioners.base import Preconditioner
from precond.optim.preconditioners.parts import Part, placed

Sides = Literal["both", "smaller", "left", "right"]
BLOCK = 128
"""Rows of a block of a factor on a processor, at least: of thinner ones the calls cost more than the symmetry saves."""

SIDES = ("left", "right")
"""What state calls the factors of rows and of columns."""


def as_matrix(t: Tensor) -> Tensor:
    """(out, rest)."""
    return t.reshape(t.shape[0], -1)


def as_matrices(t: Tensor) -> Tensor:
    """(k, out, rest), of k tensors side by side."""
    return t.flatten(2) if t.ndim > 3 else t


def sides_of(shape: Sequence[int], sides: Sides, limit: int) -> tuple[bool, bool]:
    """Whether the left and the right side of a tensor, seen as a matrix (out, rest), have a factor: 2 ≤ their length ≤ limit."""
    if len(shape) < 2:
        return False, False
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    if rows * columns == 0:
        return False, False
    wanted = {"both": (True, True), "left": (True, False), "right": (False, True), "smaller": (rows <= columns, rows > columns)}
    left, right = wanted[sides]
    return left and 2 <= rows <= limit, right and 2 <= columns <= limit


def norms(t: Tensor) -> Tensor:
    """‖·‖ of each of k tensors (k, …) with entries, whose squares may leave the range of their dtype; 0 or NaN of zeros."""
    rows = t.flatten(1)
    if rows.dtype != torch.float64 and rows.device.type != "mps":  # which has no float64
        return torch.linalg.vector_norm(rows, 2, 1, dtype=torch.float64).to(rows.dtype)
    largest = torch.linalg.vector_norm(rows, torch.inf, 1, keepdim=True)
    size = torch.linalg.vector_norm(rows / largest, 2, 1)
    return size.mul_(largest[:, 0])


def split(leaves: Sequence[Leaf], matrices: Preconditioner, chosen: Sequence[bool], others: Preconditioner) -> list[Part]:
    """Each chosen leaf by itself with one preconditioner, the rest with another."""
    index = [i for i, c in enumerate(chosen) if c]
    rest = [i for i, c in enumerate(chosen) if not c]
    return [Part((i,), matrices) for i in index] + placed(others, leaves, rest)


def fold(S: Tensor, G: Tensor, right: bool, keep: float, add: float) -> None:
    """S ← keep·S + add·GGᵀ (or GᵀG) in place, of one matrix or of several side by side.

    On a processor blocks below the diagonal are copied, not computed.
    """
    if S.ndim > 2:
        if len(S) > 1 or S.device.type != "cpu" or S.shape[-1] < 2 * BLOCK:
            S.baddbmm_(*((G.mT, G) if right else (G, G.mT)), beta=keep, alpha=add)
            return
        S, G = S[0], G[0]
    A, B = (G.T, G) if right else (G, G.T)
    n = len(S)
    step = -(-n // max(1, min(4, n // BLOCK)))
    for i in range(0, n, step):
        S[i : i + step, i:].addmm_(A[i : i + step], B[:, i:], beta=keep, alpha=add)
        S[i + step :, i : i + step].copy_(S[i : i + step, i + step :].T)
