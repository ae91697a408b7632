"""Rows of the inputs of a layer, folded as they come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from precond.analysis.curvature import Objective
from precond.analysis.curvature.batches import tensors
from precond.analysis.diagnostics.source import source_of
from precond.optim.inputs import Moments, Request, Rows, Site, Tap, Weight, pool
from precond.optim.inputs.observer import why_unread

_CHANNEL = Request(conv="channel")
ROUNDINGS = 8  # times the inputs' precision: a spread that is rounding


def layer_of(site: Site) -> str:
    """The name of a layer: its weight's without ``.weight``; of a model that is itself the layer, ``"(the model)"``."""
    return site.name.removesuffix(".weight") if site.name != "weight" else "(the model)"


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """What a layer receives.

    Attributes:
        site: the weight and its bias.
        biased: whether a bias that is trained goes with it.
        recentered: whether its outputs go straight into a batch or instance normalization, which takes any constant out of them.
        rescaled: whether they go straight into any normalization, which takes a common scale out of them.
        source: what the inputs come from: ``"data"``, or an operation such as ``"relu"``.
        n: number of inputs of a neuron (entries of a patch for a convolution).
        count: number of inputs seen: examples, or examples and positions.
        used: how many of them R is made of.
        R: factors with RᵀR the mean of ĥĥᵀ, ĥ = [1; h], one per group, (rows, n + 1) each, float64.
        low: smallest value of each input, (groups, n); likewise
        high: the largest,
        zeros: and the share of zeros,
        edges: and the share at the ends of tanh or sigmoid (0 elsewhere).
        channel: moments of each channel, where a convolution's inputs have several entries of one.
        epsilon: of the dtype of the inputs; of data, of that in which they came, before they were taken to float64.
        alike: weights of layers that were left out and that this one stands for, with others of its kind: at other depths of a stack.
        share: the number of layers it stands for, itself included; a fraction where several stand for some.
    """

    site: Site
    biased: bool
    recentered: bool
    rescaled: bool
    source: str
    n: int
    count: int
    used: int
    R: tuple[Tensor, ...]
    low: Tensor
    high: Tensor
    zeros: Tensor
    edges: Tensor
    channel: Moments | None
    epsilon: float
    alike: tuple[Tensor, ...] = ()
    share: float = 1.0

    @property
    def name(self) -> str:
        """The layer: the weight's name without ``.weight``."""
        return layer_of(self.site)

    def design(self, k: int) -> Tensor:
        """RᵀR is the mean of ĥĥᵀ of a group as its outputs show it; without the column of 1 where no bias is trained.

        What takes the mean of outputs out takes that of inputs out, w·μ, and the bias with it: the rows of R below the first are those
        of centered inputs, and of 1 nothing is left.
        """
        return self.R[k][int(self.recentered) :, int(not self.biased) :]

    @property
    def kernel(self) -> int:
        """Entries of a patch per channel; 1 for other layers."""
        return self.site.layout(_CHANNEL).repeat

    @property
    def constant(self) -> Tensor:
        """Which inputs never change by more than rounding, (groups, n); those that are always 0 among them."""
        return (self.high - self.low) <= ROUNDINGS * self.epsilon * torch.maximum(self.low.abs(), self.high.abs())


class Stream:
    """Inputs of one site as they come."""

    def __init__(self, site: Site, samples: int, objective: Objective):
        self._site, self._samples = site, samples
        self._sizes = torch.tensor(objective.sizes, dtype=torch.float64)
        self._left = self._sizes.flip(0).cumsum(0).flip(0)
        self._generator = torch.Generator().manual_seed(0)
        self._channel: Moments | None = None
        self._parts: list[_Part] = []
        self._source, self._epsilon = "data", torch.finfo(torch.float32).eps
        data = [t.dtype for t in tensors(objective.batches[0]) if t.is_floating_point()]
        self._given = max((torch.finfo(dtype).eps for dtype in data), default=0.0)
        self.unread = ""

    @property
    def count(self) -> int:
        """Inputs seen, of all groups that come in numbers of their own."""
        return sum(part.seen for part in self._parts)

    def see(self, tap: Tap, weight: Weight, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook."""
        try:
            call = tap.read(args, kwargs)
            if call is not None:
                self._take(tap, weight, call)
        except Exception as error:  # the forward is the user's
            self.unread = why_unread(error)

    def _take(self, tap: Tap, weight: Weight, call: Any) -> None:
        if not self.count:
            origin = tap.origin(call, weight)
            self._source = origin if isinstance(origin, str) else source_of(origin)
            self._epsilon = self._epsilon if isinstance(origin, str) else torch.finfo(origin.dtype).eps
            if self._source == "data":
                self._epsilon = max(self._epsilon, self._given)
        with torch.no_grad():
            for rows in tap.pieces(call, weight):
                parts = _by_parts(rows)
                for rows_of in parts[len(self._parts) :]:
                    self._parts.append(_Part(self._source, rows_of[:, :0].double().cpu(), self._samples, self._generator))
                for part, rows_of in zip(self._parts, parts, strict=True):
                    part.draw(rows_of.detach().cpu())
            if tap.layout(weight, _CHANNEL).repeat > 1:
                seen = tap.moments(call, weight, _CHANNEL, None)
                self._channel = seen if self._channel is None or seen is None else pool([self._channel, seen])

    def end(self, index: int) -> None:
        """Batch ``index`` is over: fold its rows."""
        share = float(self._sizes[index] / self._left[index])
        for part in self._parts:
            part.end(share)

    def gathered(self, biased: bool, recentered: bool, rescaled: bool) -> InputStatistics:
        """All of it."""
        parts = self._parts
        for part in parts:
            part.close()
        if not all(bool(part.low.isfinite().all() and part.high.isfinite().all()) for part in parts):
            raise ValueError(
                f"diagnose: what {self._site.name} receives holds inf or NaN; look for divergence (a checkpoint before, a lower "
                "learning rate) or bad data"
            )
        found = InputStatistics(
            site=self._site,
            biased=biased,
            recentered=recentered,
            rescaled=rescaled,
            source=self._source,
            n=parts[0].low.shape[-1],
            count=self.count // len(parts),
            used=sum(part.rows for part in parts) // len(parts),
            R=tuple(R for part in parts for R in part.factors()),
            low=torch.cat([part.low for part in parts]),
            high=torch.cat([part.high for part in parts]),
            zeros=torch.cat([part.zeros / max(part.rows, 1) for part in parts]),
            edges=torch.cat([part.edges / max(part.rows, 1) for part in parts]),
            channel=self._channel,
            epsilon=self._epsilon,
        )
        for R, constant in zip(found.R, found.constant, strict=True):
            R[1:, 1:][:, constant] = 0  # what is left of it is rounding of the inputs
        return found


class _Part:
    """Groups of rows that come in the same numbers: R and what is counted, input by input; zeros of what saw nothing.

    Every row is drawn with the same probability, whatever the size of its call, so that all count alike. R is folded of [1; h − c], c the
    first row: what is constant is exactly 0 then, however many rows there are.
    """

    def __init__(self, source: str, like: Tensor, samples: int, generator: torch.Generator):
        self._source, self._samples, self._generator = source, samples, generator
        self._probability: float | None = None  # not known before the end of the first batch
        self._pending: list[Tensor] = []
        self._spare: Tensor | None = None
        self.seen = 0
        self.rows = 0
        groups, _, n = like.shape
        self.zeros, self.edges, self.low, self.high = (like.new_zeros(groups, n) for _ in range(4))
        self.R = like.new_zeros(groups, 1, n + 1)
        self._first = like.new_zeros(groups, 1, n)

    def draw(self, rows: Tensor) -> None:
        """Rows of a call, (groups, N, n): about ``samples`` of all that come are kept."""
        self.seen += rows.shape[1]
        if self._spare is None and rows.shape[1]:
            self._spare = rows[:, :1].double()
        self._pending.append(rows if self._probability is None else self._thinned(rows))

    def _thinned(self, rows: Tensor) -> Tensor:
        N = rows.shape[1]
        expected = N * (self._probability or 1.0)
        # A fraction is rounded at random: up or down for good, small calls would count too much or not at all.
        k = int(expected + torch.rand((), generator=self._generator, dtype=torch.float64).item())
        return rows if k >= N else rows[:, torch.randperm(N, generator=self._generator)[:k].sort().values]

    def end(self, share: float) -> None:
        """A batch is over, the first that had rows if the probability is not known; its share of what was still to come."""
        if self._probability is None and self.seen:
            self._probability = min(1.0, self._samples * share / self.seen)
            self._pending = [self._thinned(rows) for rows in self._pending]
        if self._pending:
            self.fold(torch.cat(self._pending, dim=1).double())
            self._pending = []

    def close(self) -> None:
        """All batches are over: of a few rows that are wanted chance may have drawn none."""
        if not self.rows and self._spare is not None:
            self.fold(self._spare)

    def fold(self, x: Tensor) -> None:
        """Rows of a batch, (groups, k, n)."""
        if not x.shape[1]:
            return
        if not self.rows:
            self._first = x[:, :1].clone()
        extended = torch.cat([torch.ones_like(x[..., :1]), x - self._first], dim=-1)
        zeros, edges = (x == 0).sum(1).double(), _at_edges(x, self._source).sum(1).double()
        low, high = x.amin(1), x.amax(1)
        self.zeros, self.edges = self.zeros + zeros, self.edges + edges
        if not self.rows:
            self.low, self.high = low, high
        else:
            extended = torch.cat([self.R, extended], dim=1)
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        # Only the triangle of long matrices is kept; short ones wait.
        n = extended.shape[-1]
        self.R = torch.linalg.qr(extended, mode="r").R if extended.shape[1] > n else extended
        self.rows += x.shape[1]

    def factors(self) -> Tensor:
        """R/√N of each group, of [1; h]: R̃ + R̃[:, 0] cᵀ, and only the first entry of R̃[:, 0] is not 0."""
        R = torch.linalg.qr(self.R, mode="r").R / max(self.rows, 1) ** 0.5
        R[:, :1, 1:] += R[:, :1, :1] * self._first
        return R


def _at_edges(x: Tensor, source: str) -> Tensor:
    match source:
        case "tanh" | "hardtanh":
            return x.abs() >= 0.99
        case "sigmoid" | "hardsigmoid":
            return (x <= 0.01) | (x >= 0.99)
    return torch.zeros_like(x, dtype=torch.bool)


def _by_parts(rows: Rows) -> tuple[Tensor, ...]:
    """(groups, N, n) for each number N that groups come in."""
    return (rows,) if isinstance(rows, Tensor) else tuple(x[None] for x in rows)
