"""Learning rates: over the steps of a training, and as candidates of a search."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Grid:
    """A log-uniform grid.

    Example:
        >>> Grid(1e-4, 1.0, 5).values()
        (0.0001, 0.001, 0.01, 0.1, 1.0)
    """

    low: float
    high: float
    points: int

    def __post_init__(self) -> None:
        if not (0 < self.low <= self.high < math.inf):
            raise ValueError(f"grid: need 0 < lowest <= highest, got {self.low:g} and {self.high:g}")
        if self.points < 1 or (self.points == 1 and self.low < self.high):
            raise ValueError(f"grid: need at least 2 points between {self.low:g} and {self.high:g}, got {self.points}")

    def values(self) -> tuple[float, ...]:
        """Its points, to six significant digits, so that what is printed is what is used."""
        ratio = math.log(self.high / self.low) / max(1, self.points - 1)
        return tuple(float(f"{self.low * math.exp(ratio * i):.6g}") for i in range(self.points))
