"""What drives the condition number of a layer's inputs, and what is wrong with single inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.analysis.diagnostics.conditioning import Spectra
from precond.analysis.diagnostics.streaming import ROUNDINGS, InputStatistics

_SATURATED = 0.9  # share of samples at the ends of tanh or sigmoid
_RARE = 0.99  # share of samples in which an input is 0


@dataclass(frozen=True)
class Drivers:
    r"""κ of raw inputs as a product: of what their means, their spread of scales and their correlation contribute.

    Attributes:
        means: κ(raw)/κ(centered); NaN for a layer without a bias, which cannot center.
        scales: κ(centered)/κ(standardized).
        correlation: κ(standardized): what neither means nor scales explain.
        offset: the largest |μ|/σ of an input.
        spread: the ratio of the largest and the smallest σ.
        aside: how many times a σ is larger or smaller than 1, which stands beside the inputs for the bias; 1 where there is none.
    """

    means: float
    scales: float
    correlation: float
    offset: float
    spread: float
    aside: float = 1.0

    @property
    def main(self) -> str:
        """The largest of the three: ``"means"``, ``"scales"``, ``"correlation"``, or ``"nothing"`` where κ is below 10."""
        parts = {"means": self.means, "scales": self.scales, "correlation": self.correlation}
        parts = {name: x for name, x in parts.items() if not math.isnan(x)}
        if math.prod(parts.values()) < 10:
            return "nothing"
        return max(parts, key=lambda name: parts[name])


def drivers(layer: InputStatistics, k: int, found: Spectra) -> Drivers:
    """Of a group of a layer."""
    R = layer.R[k]
    mean, std = R[0, 1:] / R[0, 0], torch.linalg.vector_norm(R[1:, 1:], dim=0)
    live = (std > ROUNDINGS * layer.epsilon * mean.abs()) & ~layer.constant[k]
    scale = std[live]
    offset = float((mean[live].abs() / scale).max()) if live.any() else math.nan
    spread = float(scale.max() / scale.min()) if live.any() else math.nan
    raw, bnp = found.kappa("raw"), found.kappa("bnp")
    if not layer.biased:
        return Drivers(math.nan, raw / bnp, bnp, offset, spread)
    centered = found.kappa("centered")
    aside = float(torch.maximum(scale, 1 / scale).max()) if live.any() and not layer.recentered else 1.0
    return Drivers(raw / centered, centered / bnp, bnp, offset, spread, aside)


@dataclass(frozen=True)
class Units:
    """Inputs (channels of a convolution) that carry little, on the samples that were looked at.

    Attributes:
        total: number of inputs.
        dead: always 0.
        constant: always the same value, not 0.
        saturated: at an end of tanh or sigmoid in 90 % of the samples.
        rare: 0 in 99 % of the samples, not always.
    """

    total: int
    dead: int
    constant: int
    saturated: int
    rare: int

    @property
    def bad(self) -> int:
        """Dead, constant and saturated ones."""
        return self.dead + self.constant + self.saturated

    def __str__(self) -> str:
        named = {"dead": self.dead, "constant": self.constant, "saturated": self.saturated, "rarely active": self.rare}
        return ", ".join(f"{count} {name}" for name, count in named.items() if count)


def units(layer: InputStatistics) -> Units:
    """Of all groups of a layer."""

    def channels(t: Tensor) -> Tensor:
        """(channels, entries of a patch)."""
        return t.reshape(-1, layer.kernel)

    low, high = channels(layer.low), channels(layer.high)
    size = torch.maximum(low.abs(), high.abs())
    dead = (size == 0).all(1)
    saturated = (channels(layer.edges) >= _SATURATED).all(1) & ~dead
    constant = channels(layer.constant).all(1) & ~dead & ~saturated
    rare = (channels(layer.zeros) >= _RARE).all(1) & ~dead & ~constant & ~saturated
    return Units(len(dead), *(int(t.sum()) for t in (dead, constant, saturated, rare)))
