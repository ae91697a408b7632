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
class Moments:
    """Statistics of samples of features h, for groups of output rows that see different inputs.

    Attributes:
        count: number of samples N, shape (groups,).
        mean: μ, shape (groups, n).
        spread: σ², biased, shape (groups, n); or the covariance E[(h−μ)(h−μ)ᵀ], shape (groups, n, n).
    """

    count: Tensor
    mean: Tensor
    spread: Tensor

    def raw(self) -> tuple[Tensor, Tensor, Tensor]:
        """(N, Σh, Σh² or Σhhᵀ) in float64, which add over batches and processes."""
        mean, spread = self.mean.double(), self.spread.double()
        n = self.count.double()
        return n, n[:, None] * mean, _fit(n, spread) * (spread + outer(mean, spread))

    @classmethod
    def from_raw(cls, count: Tensor, total: Tensor, square: Tensor, dtype: torch.dtype) -> Moments:
        """The inverse of :meth:`raw`."""
        n = count.clamp_min(1)
        mean = total / n[:, None]
        spread = square / _fit(n, square) - outer(mean, square)
        if spread.ndim == mean.ndim:
            spread = spread.clamp_min(0)
        return cls(count.to(dtype), mean.to(dtype), spread.to(dtype))


def pool(parts: Sequence[Moments]) -> Moments:
    """The moments of all samples together (law of total variance, in float64)."""
    if len(parts) == 1:
        return parts[0]
    counts, totals, squares = zip(*(p.raw() for p in parts), strict=True)
    return Moments.from_raw(sum(counts), sum(totals), sum(squares), parts[0].mean.dtype)  # type: ignore[arg-type]


def of_rows(x: Tensor) -> Moments:
    """Mean and variance of rows x, shape (groups, N, n), in float32 (float64 for float64 inputs), by two passes."""
    x = widened(x)
    mean = x.mean(1)
    return Moments(_count(x, x.shape[1]), mean, (x - mean[:, None]).square_().mean(1))


def of_columns(x: Tensor) -> Moments:
    """The same along the last dimension of x, shape (groups, n, N)."""
    x = widened(x)
    mean = x.mean(-1)
    return Moments(_count(x, x.shape[-1]), mean, (x - mean[..., None]).square_().mean(-1))


def covariance(x: Tensor) -> Moments:
    """Mean and full covariance of rows x, shape (groups, N, n)."""
    x = widened(x)
    mean = x.mean(1)
    d = x - mean[:, None]
    return Moments(_count(x, x.shape[1]), mean, d.mT @ d / x.shape[1])


def widened(x: Tensor) -> Tensor:
    """float32, or float64 where it is that: 300² overflows float16."""
    return x if x.dtype == torch.float64 else x.float()


def outer(mean: Tensor, like: Tensor) -> Tensor:
    """μ² or μμᵀ, whichever has the shape of ``like``."""
    return mean.square() if like.ndim == mean.ndim else mean[..., :, None] * mean[..., None, :]


def _fit(n: Tensor, like: Tensor) -> Tensor:
    return n.reshape(-1, *[1] * (like.ndim - 1))


def _count(x: Tensor, n: int) -> Tensor:
    return torch.full((x.shape[0],), float(n), dtype=x.dtype, device=x.device)
