"""Count, mean and spread of layer inputs, and how such numbers of several batches are put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Kind = Literal["moments", "covariance"]
Conv = Literal["channel", "patch"]
Rows = Tensor | Sequence[Tensor]
"""Samples of features: (groups, N, n), or for each group its own (N, n)."""


class Request(NamedTuple):
    """What a preconditioner wants to know of a layer's inputs.

    Attributes:
        kind: ``"moments"``, mean and variance of each feature, or ``"covariance"``, their full covariance.
        conv: one feature per input ``"channel"``, over batch and positions, or per ``"patch"`` entry, over batch and outputs.

    Example:
        >>> import precond
        >>> precond.BNP().requests == {precond.optim.inputs.Request("moments", "channel")}
        True
    """

    kind: Kind = "moments"
    conv: Conv = "channel"


REQUESTS = tuple(Request(kind, conv) for kind in get_args(Kind) for conv in get_args(Conv))
"""All that there are."""


@dataclass(frozen=True)
class Moments:
    """Statistics of samples of features h, for groups of output rows that see different inputs.

    Attributes:
        count: number of samples N, shape (groups,), on the host, which knows it from shapes.
        mean: μ, shape (groups, n).
        spread: σ², biased, shape (groups, n); or the covariance E[(h−μ)(h−μ)ᵀ], shape (groups, n, n).
        absolute: Σ|h − c|, shape (groups, n), c the mean known before the batch, or 0: one c for all that is put together.
        examples: how many the samples come from, shape (), on the host: those of one image resemble each other.
    """

    count: Tensor
    mean: Tensor
    spread: Tensor
    absolute: Tensor
    examples: Tensor

    @cached_property
    def deviation(self) -> Tensor:
        """E|h − c|, shape (groups, n)."""
        return self.absolute / by_group(self.count.clamp_min(1), self.absolute)

    @cached_property
    def variance(self) -> Tensor:
        """σ², shape (groups, n)."""
        return variances(self.spread, self.mean)

    def to(self, device: torch.device) -> Moments:
        """The same on a device; counts stay on the host."""
        if self.mean.device == device:
            return self
        return replace(self, mean=self.mean.to(device), spread=self.spread.to(device), absolute=self.absolute.to(device))

    def raw(self) -> tuple[Tensor, ...]:
        """(N, Σh, Σh² or Σhhᵀ, Σ|h − c|, examples) in float64, which add over batches and processes."""
        mean, spread = self.mean.double(), self.spread.double()
        n = self.count.double().to(mean.device)
        square = _fit(n, spread) * (spread + outer(mean, spread))
        return self.count.double(), n[:, None] * mean, square, self.absolute.double(), self.examples.double()

    @classmethod
    def from_raw(cls, raw: Sequence[Tensor], dtype: torch.dtype) -> Moments:
        """The inverse of :meth:`raw`."""
        count, total, square, absolute, examples = raw
        n = count.clamp_min(1).to(total.device)
        mean = total / n[:, None]
        spread = square / _fit(n, square) - outer(mean, square)
        if spread.ndim == mean.ndim:
            spread = spread.clamp_min(0)
        return cls(*(t.to(dtype) for t in (count, mean, spread, absolute, examples)))

    @classmethod
    def joined(cls, parts: Sequence[Moments]) -> Moments:
        """Of several layers, one after the other."""
        rows = [p.rows.shape[1:] for p in parts if isinstance(p, OfRows)]
        kind, what = (OfRows, "rows") if len(rows) == len(parts) and len(set(rows)) == 1 else (cls, "spread")
        each = {name: [getattr(p, name) for p in parts] for name in ("count", "mean", "absolute", what)}
        tensors = {name: of[0] if len(of) == 1 else torch.cat(of) for name, of in each.items()}
        return kind(**tensors, examples=torch.stack([p.examples for p in parts]))

    def bound_to_(self, mean: Tensor, spread: Tensor) -> None:
        """Replace in place, in groups that have numbers that are not finite, all by what is known, without a look at them by the host."""
        finite = self.variance.sum(-1) < torch.inf
        for new, old in ((self.mean, mean), (self.spread, spread), (self.absolute, self.absolute.new_zeros(()))):
            torch.where(_fit(finite, new), new, old, out=new)

    def fold_spread_(self, S: Tensor, gain: float | Tensor) -> None:
        """S ← (1 − γ)·S + γ·C in place, C the covariance, the ``gain`` γ a number or a column of one a group."""
        S.lerp_(self.spread, gain if isinstance(gain, float) else gain[..., None])


class OfRows(Moments):
    """Of so few samples that they take less room than their covariance, which is made each time it is asked for.

    It is not made to be folded: another matrix of n² entries for each group may be more than all else that a step takes.

    Attributes:
        rows: h − μ of each sample, shape (groups, N, n), 2N ≤ n.
        finite: (groups,), whether they were; None: they are.
    """

    rows: Tensor
    finite: Tensor | None

    def __init__(self, count: Tensor, mean: Tensor, rows: Tensor, absolute: Tensor, examples: Tensor):
        self.__dict__.update(count=count, mean=mean, rows=rows, absolute=absolute, examples=examples, finite=None)

    @property
    def spread(self) -> Tensor:
        return _gram(self.rows)

    @cached_property
    def variance(self) -> Tensor:
        return self.rows.square().mean(1)

    def bound_to_(self, mean: Tensor, spread: Tensor) -> None:
        finite = self.variance.sum(-1) < torch.inf
        none = self.rows.new_zeros(())
        known = ((self.mean, mean), (self.variance, variances(spread, mean)), (self.rows, none), (self.absolute, none))
        for new, old in known:
            torch.where(_fit(finite, new), new, old, out=new)
        self.__dict__["finite"] = finite

    def fold_spread_(self, S: Tensor, gain: float | Tensor) -> None:
        rows, each = self.rows, 1 / self.rows.shape[1]
        if self.finite is not None:
            gain = gain * self.finite.to(S.dtype)[:, None]
        if isinstance(gain, float):
            S.baddbmm_(rows.mT, rows, beta=1 - gain, alpha=gain * each)
        else:
            S.addcmul_(S, gain[..., None], value=-1).baddbmm_(rows.mT, rows * gain[..., None], alpha=each)

    def to(self, device: torch.device) -> Moments:
        if self.mean.device == device:
            return self
        return OfRows(self.count, self.mean.to(device), self.rows.to(device), self.absolute.to(device), self.examples)


def pool(parts: Sequence[Moments]) -> Moments:
    """The moments of all samples together (law of total variance, in float64).

    Args:
        parts: moments of the same features, from batches, calls or processes.

    Returns:
        Moments of the first part's dtype.

    Example:
        >>> import torch
        >>> parts = [of_rows(torch.tensor([[[0.0], [2.0]]])), of_rows(torch.tensor([[[4.0]]]))]  # (groups, N, n)
        >>> together = pool(parts)
        >>> together.count.item(), together.mean.item(), round(together.variance.item(), 4)  # of 0, 2, 4
        (3.0, 2.0, 2.6667)
    """
    if len(parts) == 1:
        return parts[0]
    total = [sum(column[1:], column[0]) for column in zip(*(p.raw() for p in parts), strict=True)]
    return Moments.from_raw(total, parts[0].mean.dtype)


def of_samples(rows: Rows, kind: Kind, center: Tensor | None = None, examples: int | None = None) -> Moments | None:
    """Moments of rows, None where there are none; of groups that have none the count is 0, and so is everything else."""
    of = covariance if kind == "covariance" else of_rows
    if isinstance(rows, Tensor):
        return of(rows, center, examples) if rows.shape[1] else None
    if not any(len(x) for x in rows):
        return None
    parts = []
    for k, x in enumerate(rows):
        own = None if center is None else center[k : k + 1]
        parts.append(of(x[None], own, examples) if len(x) else _nothing(x, kind))
    joined = {name: torch.cat([getattr(p, name) for p in parts]) for name in ("count", "mean", "spread", "absolute")}
    return Moments(**joined, examples=joined["count"].amin() if examples is None else parts[0].examples)


def _nothing(x: Tensor, kind: Kind) -> Moments:
    zeros = lambda *shape: widened(x).new_zeros(shape)  # noqa: E731
    n = x.shape[-1]
    none = torch.zeros(1, dtype=widened(x).dtype)
    return Moments(none, zeros(1, n), zeros(1, n, n) if kind == "covariance" else zeros(1, n), zeros(1, n), none[0])


def of_rows(x: Tensor, center: Tensor | None = None, examples: int | None = None) -> Moments:
    """Mean, variance and deviation of rows x, shape (groups, N, n), in float32 (float64 for float64 inputs)."""
    return _moments(widened(x), 1, center, examples)


def of_columns(x: Tensor, center: Tensor | None = None, examples: int | None = None) -> Moments:
    """The same along the last dimension of x, shape (groups, n, N)."""
    return _moments(widened(x), 2, center, examples)


def covariance(x: Tensor, center: Tensor | None = None, examples: int | None = None) -> Moments:
    """Mean, full covariance and deviation of rows x, shape (groups, N, n)."""
    return _moments(widened(x), 1, center, examples, full=True)


def _moments(x: Tensor, samples: int, center: Tensor | None, examples: int | None, full: bool = False) -> Moments:
    on = _on_processor if x.device.type == "cpu" else _on_accelerator
    mean, spread, absolute = on(x, samples, None if center is None else center.unsqueeze(samples), full)
    count = torch.full((x.shape[0],), float(x.shape[samples]), dtype=x.dtype)
    of = count[0] if examples is None else torch.full((), float(examples), dtype=x.dtype)
    if full and 2 * x.shape[1] <= x.shape[2]:
        return OfRows(count, mean, spread, absolute, of)
    return Moments(count, mean, _gram(spread) if full else spread, absolute, of)


def _on_processor(x: Tensor, samples: int, center: Tensor | None, full: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, spread, Σ|h − c|) in as few passes over memory as it takes; in place of a ``full`` covariance h − μ."""
    # About the mean known so far, or the batch's own: one pass about zero cancels where |μ| ≫ σ.
    shift = x.mean(samples, keepdim=True) if center is None else center
    d = x - shift
    mean = d.mean(samples)
    if full:
        absolute = (x if center is None else d).abs().sum(samples)
        spread = d.sub_(mean.unsqueeze(samples))
    else:
        size = d.abs_()  # in place: memory that was never touched costs more than the arithmetic
        absolute = (x.abs() if center is None else size).sum(samples)
        spread = size.square_().mean(samples).addcmul_(mean, mean, value=-1).clamp_min_(0)
    return shift.squeeze(samples) + mean, spread, absolute


def _on_accelerator(x: Tensor, samples: int, center: Tensor | None, full: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same in as few operations as it takes."""
    absolute = torch.linalg.vector_norm(x if center is None else x - center, 1, samples)
    if full:
        mean = x.mean(samples, keepdim=True)
        return mean.squeeze(samples), x - mean, absolute
    spread, mean = torch.var_mean(x, samples, correction=0)
    return mean, spread, absolute


def _gram(d: Tensor) -> Tensor:
    """ddᵀ/N of rows d (groups, N, n)."""
    # Scaled within the product: another matrix of n² entries in fresh memory would cost half as much again.
    return torch.baddbmm(d.new_empty(()), d.mT, d, beta=0, alpha=1 / d.shape[1])


def widened(x: Tensor) -> Tensor:
    """float32, or float64 where it is that: 300² overflows float16."""
    return x if x.dtype == torch.float64 else x.float()


def variances(spread: Tensor, like: Tensor) -> Tensor:
    """The variances in a spread of either kind, of the shape of ``like``."""
    return spread if spread.ndim == like.ndim else spread.diagonal(dim1=-2, dim2=-1)


def outer(mean: Tensor, like: Tensor) -> Tensor:
    """μ² or μμᵀ, whichever has as many dimensions as ``like``."""
    return mean.square() if like.ndim == mean.ndim else mean[..., :, None] * mean[..., None, :]


def greatest(t: Tensor) -> float:
    """The greatest entry; of one alone it is read without an operation."""
    return t.item() if t.numel() == 1 else float(t.max())


def least(t: Tensor) -> float:
    """The least entry; of one alone it is read without an operation."""
    return t.item() if t.numel() == 1 else float(t.min())


def by_group(t: Tensor, like: Tensor) -> float | Tensor:
    """A number for each group, from the host: see :func:`column`."""
    return column(t.tolist(), like)


def column(numbers: Sequence[float], like: Tensor) -> float | Tensor:
    """A number for each group: a column where ``like`` is, or where all are one number that number, which costs nothing."""
    first, *others = numbers
    return first if all(x == first for x in others) else torch.tensor(numbers, dtype=like.dtype).to(like.device)[:, None]


def _fit(n: Tensor, like: Tensor) -> Tensor:
    return n.reshape(-1, *[1] * (like.ndim - 1))
