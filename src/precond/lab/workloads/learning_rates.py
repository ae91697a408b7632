"""Learning rates over the steps of a training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

Decay = Literal["constant", "cosine", "linear"]


def factor(decay: Decay, warmup: int, steps: int) -> Callable[[int], float]:
    """The learning rate of each step (from 0) in units of its peak.

    It rises linearly over the first ``warmup`` steps; from there to the end it is constant, or falls to 0 along a straight line
    or half a cosine.

    Example:
        >>> [factor("linear", warmup=2, steps=6)(t) for t in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    def at(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if decay == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 1 - done if decay == "linear" else (1 + math.cos(math.pi * done)) / 2

    return at
