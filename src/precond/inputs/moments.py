"""Count, mean and spread of layer inputs, and how such numbers of several batches are put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Request:
    """What a preconditioner wants to know of a layer's inputs.

    Attributes:
        kind: ``"moments"``, mean and variance of each feature, or ``"covariance"``, their full covariance.
        conv: one feature per input ``"channel"``, over batch and positions, or per ``"patch"`` entry, over batch and outputs.
    """

    kind: Literal["moments", "covariance"] = "moments"
    conv: Literal["channel", "patch"] = "channel"


@dataclass(frozen=True)
class Reference:
    """What was known of the inputs before the batch: μ and σ², shape (groups, n)."""

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class Moments:
    """Statistics of samples of features h, for groups of output rows that see different inputs.

    Attributes:
        count: number of samples N, shape (groups,).
        mean: μ, shape (groups, n).
        spread: σ², biased, shape (groups, n); or the covariance E[(h−μ)(h−μ)ᵀ], shape (groups, n, n).
        activity: E[min(1, (h−μ)²/σ²)], how many of the samples show the variance, shape (groups, n): half for a normal
            distribution, 2π for an input that is nonzero in a fraction π ≪ 1 of them.
    """

    count: Tensor
    mean: Tensor
    spread: Tensor
    activity: Tensor

    def raw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(N, Σh, Σh² or Σhhᵀ, NE[activity]) in float64, which add over batches and processes."""
        mean, spread = self.mean.double(), self.spread.double()
        n = self.count.double()
        return n, n[:, None] * mean, _fit(n, spread) * (spread + outer(mean, spread)), n[:, None] * self.activity.double()

    @classmethod
    def from_raw(cls, count: Tensor, total: Tensor, square: Tensor, activity: Tensor, dtype: torch.dtype) -> Moments:
        """The inverse of :meth:`raw`."""
        n = count.clamp_min(1)
        mean = total / n[:, None]
        spread = square / _fit(n, square) - outer(mean, square)
        if spread.ndim == mean.ndim:
            spread = spread.clamp_min(0)
        return cls(count.to(dtype), mean.to(dtype), spread.to(dtype), (activity / n[:, None]).to(dtype))


def pool(parts: Sequence[Moments]) -> Moments:
    """The moments of all samples together (law of total variance, in float64)."""
    if len(parts) == 1:
        return parts[0]
    count, total, square, activity = (sum(column[1:], column[0]) for column in zip(*(p.raw() for p in parts), strict=True))
    return Moments.from_raw(count, total, square, activity, parts[0].mean.dtype)


def of_rows(x: Tensor, reference: Reference | None = None) -> Moments:
    """Mean, variance and activity of rows x, shape (groups, N, n), in float32 (float64 for float64 inputs)."""
    return _moments(widened(x), 1, reference)


def of_columns(x: Tensor, reference: Reference | None = None) -> Moments:
    """The same along the last dimension of x, shape (groups, n, N)."""
    return _moments(widened(x), 2, reference)


def covariance(x: Tensor, reference: Reference | None = None) -> Moments:
    """Mean, full covariance and activity of rows x, shape (groups, N, n)."""
    return _moments(widened(x), 1, reference, full=True)


def _moments(x: Tensor, samples: int, reference: Reference | None, full: bool = False) -> Moments:
    # About the mean known so far, or the batch's own: one pass about zero cancels where |μ| ≫ σ.
    shift = x.mean(samples) if reference is None else reference.mean
    d = x - shift.unsqueeze(samples)
    mean = d.mean(samples)
    spread = d.mT @ d / x.shape[1] - outer(mean, x) if full else None
    square = d.square_()
    variance = (square.mean(samples) - mean.square()).clamp_min_(0)
    known = variance if reference is None else reference.variance
    activity = square.clamp_(max=known.unsqueeze(samples)).mean(samples).div_(known).nan_to_num_(0.0)
    return Moments(_count(x, x.shape[samples]), shift + mean, variance if spread is None else spread, activity)


def widened(x: Tensor) -> Tensor:
    """float32, or float64 where it is that: 300² overflows float16."""
    return x if x.dtype == torch.float64 else x.float()


def outer(mean: Tensor, like: Tensor) -> Tensor:
    """μ² or μμᵀ, whichever has as many dimensions as ``like``."""
    return mean.square() if like.ndim == mean.ndim else mean[..., :, None] * mean[..., None, :]


def _fit(n: Tensor, like: Tensor) -> Tensor:
    return n.reshape(-1, *[1] * (like.ndim - 1))


def _count(x: Tensor, n: int) -> Tensor:
    return torch.full((x.shape[0],), float(n), dtype=x.dtype, device=x.device)
