"""What a pass over data found of its features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Summary:
    """What is known of features, in float64.

    Attributes:
        count: number of samples.
        mean: of each feature.
        square: Σ(x − mean)².
        low: smallest value.
        high: largest value.
    """

    count: int
    mean: Tensor
    square: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Summary:
        """Of rows (samples, *features)."""
        mean = x.mean(0)
        return cls(len(x), mean, (x - mean).square().sum(0), x.amin(0), x.amax(0))

    def joined(self, other: Summary) -> Summary:
        """Of both together (Chan, Golub & LeVeque, 1979)."""
        n = self.count + other.count
        d = other.mean - self.mean
        return Summary(
            n,
            self.mean + d * (other.count / n),
            self.square + other.square + d.square() * (self.count * other.count / n),
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
        )
