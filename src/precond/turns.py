"""On which steps periodic work falls: matrices of different shapes take turns, so that no step does all of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SCRATCH = 64 * 2**20
"""Bytes that one step's work on matrices of one shape takes, about, unless one alone takes more."""


def turns(params: Sequence[Tensor]) -> list[int]:
    """Of each parameter its turn: what is due every k steps is due at step t where k divides t + turn.

    It is a function of the parameters' shapes and order alone. The first matrix has turn 0, and so has what is no matrix. Matrices
    of one shape share a turn, a few turns where there are many: each takes squares of both its sides.
    """
    newest = -1
    known: dict[torch.Size, tuple[int, int]] = {}
    out = []
    for p in params:
        if p.ndim < 2 or not p.numel():
            out.append(0)
            continue
        rows, columns = p.shape[0], p.numel() // p.shape[0]
        together = max(1, SCRATCH // (16 * (rows**2 + columns**2)))
        turn, count = known.get(p.shape, (newest, together))
        if count >= together:
            newest, turn, count = newest + 1, newest + 1, 0
        known[p.shape] = turn, count + 1
        out.append(turn)
    return out


def is_due(step: float, every: float, turn: int) -> bool:
    """Whether what is due every so many steps is due."""
    return (int(step) + turn) % int(every) == 0
