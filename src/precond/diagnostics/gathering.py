r"""What each layer receives on an objective's data, reduced to a triangular factor of its extended inputs.

With H_e = [e, H], one row [1, hᵀ] per input, H_e = Q R gives RᵀR = H_eᵀH_e: singular values of R are those of H_e, without
squaring them, and the rows of R below the first are those of the centered inputs, without subtracting means.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from precond.curvature import Objective
from precond.diagnostics.source import source_of
from precond.hooks import remove
from precond.inputs import Moments, Request, Site, Tap, Weight, pool, survey
from precond.inputs.attention import AttentionTap
from precond.inputs.conv import ConvTap

_PATCH, _CHANNEL = Request(conv="patch"), Request(conv="channel")
_CHUNK = 2**24  # entries of patches that are unfolded at once


@dataclass(frozen=True, eq=False)
class Gathered:
    """What a layer receives.

    Attributes:
        site: the weight and its bias.
        biased: whether a bias that is trained goes with it.
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
        epsilon: of the dtype of the inputs.
    """

    site: Site
    biased: bool
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

    @property
    def name(self) -> str:
        """The layer: the weight's name without ``.weight``."""
        return layer_of(self.site)

    @property
    def kernel(self) -> int:
        """Entries of a patch per channel; 1 for other layers."""
        return self.site.layout(_CHANNEL).repeat


def layer_of(site: Site) -> str:
    """The name of a layer: its weight's without ``.weight``; of a model that is itself the layer, ``"(the model)"``."""
    return site.name.removesuffix(".weight") if site.name != "weight" else "(the model)"


def gather(objective: Objective, samples: int, max_inputs: int) -> tuple[list[Gathered], list[str]]:
    """Forward all batches of an objective once, and what could not be seen, as notes.

    Args:
        objective: whose layers with a parameter in ``objective.params`` are watched.
        samples: inputs per layer of which R is made; beyond, as many are drawn, the same ones every time.
        max_inputs: layers with more inputs are passed by.
    """
    found = survey(objective.model.named_modules())
    trained = {id(p) for p in objective.params}
    sites = [site for site in found.sites if id(site.weight) in trained]
    notes = [f"{name or 'the model'} {why}; its inputs are not diagnosed" for name, why in found.passed_by]
    wide = {site: n for site in sites if (n := site.layout(_PATCH).inputs(site.weight.shape)) > max_inputs}
    notes += [
        f"{site.name} has {n} inputs, more than max_inputs={max_inputs}; they are not diagnosed" for site, n in wide.items()
    ]
    sites = [site for site in sites if site not in wide]
    streams = {site: _Stream(site, samples, objective) for site in sites}
    handles = []
    for site in sites:
        for tap, weight in site.taps:
            hook = partial(streams[site].see, tap, weight)
            handles.append(tap.module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        for index in range(len(objective.batches)):
            with objective.measuring(index):
                # With gradients on: attention's fast path calls no layers, and where inputs come from is read from the graph.
                objective.evaluate(index)
            for stream in streams.values():
                stream.end()
    finally:
        remove(handles)
    silent = [site.name for site in sites if not streams[site].count]
    notes += [f"{name} was not called as a layer; its inputs are not diagnosed" for name in silent]
    biases = {site: site.bias is not None and id(site.bias) in trained for site in sites}
    return [streams[site].gathered(biases[site]) for site in sites if streams[site].count], notes


class _Stream:
    """Inputs of one site as they come."""

    def __init__(self, site: Site, samples: int, objective: Objective):
        self._site, self._samples, self._batches = site, samples, len(objective.batches)
        self._generator = torch.Generator().manual_seed(0)
        self._share: float | None = None
        self._pending: list[tuple[Tensor, ...]] = []
        self._channel: Moments | None = None
        self._parts: list[_Part] = []
        self.count = self._used = 0
        self._source, self._epsilon = "data", torch.finfo(torch.float32).eps

    def see(self, tap: Tap, weight: Weight, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook."""
        first = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        if not first.numel():
            return
        if not self.count:
            attended = isinstance(tap, AttentionTap) and weight.param is tap.module.out_proj.weight
            self._source = "attention" if attended else source_of(first)
            self._epsilon = torch.finfo(first.dtype).eps if first.is_floating_point() else self._epsilon
        with torch.no_grad():
            for rows in _rows(tap, args, kwargs, weight):
                self._pending.append(tuple(self._drawn(part) for part in rows))
            if isinstance(tap, ConvTap) and tap.layout(weight, _CHANNEL).repeat > 1:
                seen = tap.moments(args, kwargs, weight, _CHANNEL, None)
                self._channel = seen if self._channel is None else pool([self._channel, seen])

    def _drawn(self, rows: Tensor) -> Tensor:
        """A share of the rows, (groups, k, n), that makes about as many in all as wanted."""
        N = rows.shape[1]
        self.count += N
        if self._share is None:
            return rows.detach().double().cpu()  # of the first batch how many there will be is not known yet
        return self._thinned(rows.detach().double().cpu())

    def _thinned(self, rows: Tensor) -> Tensor:
        N = rows.shape[1]
        k = min(N, max(1, round(N * (self._share or 1.0))))
        return rows if k == N else rows[:, torch.randperm(N, generator=self._generator)[:k].sort().values]

    def end(self) -> None:
        """A batch is over: fold its rows."""
        if not self._pending:
            return
        if self._share is None:
            groups = len(self._pending[0])
            self._share = min(1.0, groups * self._samples / (self.count * self._batches))
            self._pending = [tuple(self._thinned(rows) for rows in parts) for parts in self._pending]
        for k, column in enumerate(zip(*self._pending, strict=True)):
            if k == len(self._parts):
                self._parts.append(_Part(self._source))
            self._parts[k].fold(torch.cat(column, dim=1))
        self._used += sum(parts[0].shape[1] for parts in self._pending)
        self._pending = []

    def gathered(self, biased: bool) -> Gathered:
        """All of it."""
        parts = self._parts
        if not all(bool(part.low.isfinite().all() and part.high.isfinite().all()) for part in parts):
            raise ValueError(
                f"diagnose: what {self._site.name} receives holds inf or NaN; look for divergence (a checkpoint before, a lower "
                "learning rate) or bad data"
            )
        return Gathered(
            site=self._site,
            biased=biased,
            source=self._source,
            n=parts[0].low.shape[-1],
            count=self.count // len(parts),
            used=self._used,
            R=tuple(R for part in parts for R in part.factors()),
            low=torch.cat([part.low for part in parts]),
            high=torch.cat([part.high for part in parts]),
            zeros=torch.cat([part.zeros / part.rows for part in parts]),
            edges=torch.cat([part.edges / part.rows for part in parts]),
            channel=self._channel,
            epsilon=self._epsilon,
        )


class _Part:
    """Groups of rows that come in the same numbers: R and what is counted, input by input."""

    def __init__(self, source: str):
        self._source = source
        self.rows = 0
        self.R: Tensor | None = None

    def fold(self, x: Tensor) -> None:
        """Rows of a batch, (groups, k, n)."""
        extended = torch.cat([torch.ones_like(x[..., :1]), x], dim=-1)
        zeros, edges = (x == 0).sum(1).double(), _at_edges(x, self._source).sum(1).double()
        low, high = x.amin(1), x.amax(1)
        if self.R is None:
            self.zeros, self.edges, self.low, self.high = zeros, edges, low, high
        else:
            extended = torch.cat([self.R, extended], dim=1)
            self.zeros, self.edges = self.zeros + zeros, self.edges + edges
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        # Only the triangle of long matrices is kept; short ones wait.
        n = extended.shape[-1]
        self.R = torch.linalg.qr(extended, mode="r").R if extended.shape[1] > n else extended
        self.rows += x.shape[1]

    def factors(self) -> Tensor:
        """R/√N of each group."""
        assert self.R is not None
        return torch.linalg.qr(self.R, mode="r").R / self.rows**0.5


def _at_edges(x: Tensor, source: str) -> Tensor:
    match source:
        case "tanh" | "hardtanh":
            return x.abs() >= 0.99
        case "sigmoid" | "hardsigmoid":
            return (x <= 0.01) | (x >= 0.99)
    return torch.zeros_like(x, dtype=torch.bool)


def _rows(tap: Tap, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Weight) -> Iterator[tuple[Tensor, ...]]:
    """All inputs of a call in pieces, each a tuple of (groups, N, n) with their own N."""
    if isinstance(tap, AttentionTap) and tap.layout(weight, _PATCH).groups == 3:
        # Queries, keys and values of a packed projection.
        yield tuple(tap.rows(args, kwargs, replace(weight, slot=slot)) for slot in range(3))
    elif isinstance(tap, ConvTap) and args and args[0].ndim == weight.param.ndim:
        x, entries = args[0], weight.param[0].numel() * args[0][0, 0].numel()
        for piece in x.split(max(1, _CHUNK // max(entries, 1))):
            yield (tap.rows((piece, *args[1:]), kwargs, weight),)
    else:
        yield (tap.rows(args, kwargs, weight),)
