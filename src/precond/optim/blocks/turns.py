"""On which steps periodic work falls: matrices take turns, so that no step does all of it, or has to have the memory for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import count

import torch
from torch import Tensor

from precond.optim.blocks.memory import AT_ONCE


def turns(params: Sequence[Tensor]) -> list[int]:
    """Of each parameter its turn, of which :func:`ahead` makes the step of a period that its periodic work falls on.

    It is a function of the parameters' shapes and order alone. The first matrix has turn 0, and so has what is no matrix. Matrices of
    one shape share a turn where the squares of their longer sides have at most twice as many entries as they all; longer ones take
    several.
    """
    newest = -1
    alike = Counter(p.shape for p in params)
    known: dict[torch.Size, tuple[int, int]] = {}
    out = []
    for p in params:
        if p.ndim < 2 or not p.numel():
            out.append(0)
            continue
        long, short = sorted((p.shape[0], p.numel() // p.shape[0]), reverse=True)
        together = max(1, min(2 * alike[p.shape] * short // long, AT_ONCE // (16 * (long**2 + short**2))))
        turn, count = known.get(p.shape, (newest, together))
        if count >= together:
            newest, turn, count = newest + 1, newest + 1, 0
        known[p.shape] = turn, count + 1
        out.append(turn)
    return out


@cache
def ahead(turn: int, length: int) -> int:
    """How many steps before the end of a period a turn is: 0, 1/2, 1/4, 3/4, 1/8, … of its length, no step twice before each had one.

    So the first few are far from each other, and as many turns as steps never meet.
    """
    taken: set[int] = set()
    numbers = count()
    while len(taken) <= turn % length:
        step = int(length * _bits_reversed(next(numbers)))
        taken.add(step)
    return step


@cache
def _bits_reversed(k: int) -> float:
    """0, 1/2, 1/4, 3/4, 1/8, …"""
    return sum(2.0 ** -(j + 1) for j in range(k.bit_length()) if k >> j & 1)


def is_due(step: float, every: float, turn: int) -> bool:
    """Whether what is due every so many steps is due."""
    return (int(step) + ahead(turn, int(every))) % int(every) == 0


@lru_cache(1024)  # layers of one turn ask for the same in each step
def next_renewal(step: float, every: float, turn: int = 0) -> int:
    """The first step from this one on at which is due what is due at steps 1, 2, 4, 8, … and then every so many.

    On another turn than 0 it is due as many steps before, or as many modulo the length of the period that ends at such a step.
    """
    t, every = int(step), int(every)
    while True:
        end = -(-t // every) * every if t > every else min(every, 1 << (t - 1).bit_length())
        start = end - every if end > every else (1 << (end - 1).bit_length()) // 2 if end > 1 else 0
        if (due := end - ahead(turn, end - start)) >= t:
            return due
        t = end + 1
