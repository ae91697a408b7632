r"""What each layer receives on an objective's data, reduced to a triangular factor of its extended inputs.

With H_e = [e, H], one row [1, hᵀ] per input, H_e = Q R gives RᵀR = H_eᵀH_e: singular values of R are those of H_e, without
squaring them, and the rows of R below the first are those of the centered inputs, without subtracting means.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from precond.analysis.curvature import Objective
from precond.analysis.diagnostics.source import source_of
from precond.optim.inputs import Moments, Request, Rows, Site, Tap, Weight, pool, survey
from precond.optim.inputs.hooks import remove
from precond.optim.inputs.observer import why_unread

_PATCH, _CHANNEL = Request(conv="patch"), Request(conv="channel")


@dataclass(frozen=True, eq=False)
class Gathered:
    """What a layer receives.

    Attributes:
        site: the weight and its bias.
        biased: whether a bias that is trained goes with it.
        recentered: whether its outputs go straight into a batch or instance normalization, which takes any constant out of them.
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
        alike: weights of layers that were left out and that this one stands for, with others of its kind: at other depths of a stack.
        share: the number of layers it stands for, itself included; a fraction where several stand for some.
    """

    site: Site
    biased: bool
    recentered: bool
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

    @property
    def kernel(self) -> int:
        """Entries of a patch per channel; 1 for other layers."""
        return self.site.layout(_CHANNEL).repeat


def layer_of(site: Site) -> str:
    """The name of a layer: its weight's without ``.weight``; of a model that is itself the layer, ``"(the model)"``."""
    return site.name.removesuffix(".weight") if site.name != "weight" else "(the model)"


def gather(objective: Objective, samples: int, max_inputs: int, layers: int | None = None) -> tuple[list[Gathered], list[str]]:
    """Forward all batches of an objective once; and which weights are not diagnosed, with the reasons.

    Memory: of the first batch up to all inputs of the layers, then ``samples`` of each, in the inputs' own precision; of each layer a
    triangle in float64.

    Args:
        objective: whose layers with a parameter in ``objective.params`` are watched.
        samples: inputs per layer of which R is made; beyond, as many are drawn, the same ones every time.
        max_inputs: layers with more inputs are passed by.
        layers: at most so many; of stacks some at equal distances.
    """
    found = survey(objective.model.named_modules())
    trained = {id(p) for p in objective.params}
    sites = [site for site in found.sites if id(site.weight) in trained]
    others = [passed for passed in found.passed_by if any(id(p) in trained for p in passed.params)]
    notes = [f"{passed.name or 'the model'} {passed.why}; its inputs are not diagnosed" for passed in others]
    wide = {site: n for site in sites if (n := site.layout(_PATCH).inputs(site.weight.shape)) > max_inputs}
    notes += [
        f"{site.name} has {n} inputs, more than max_inputs={max_inputs}; they are not diagnosed" for site, n in wide.items()
    ]
    sites = [site for site in sites if site not in wide]
    chosen = _spread_over_kinds(sites, layers)
    if left := len(sites) - len(chosen):
        examples = ", ".join(layer_of(site) for site in [site for site in sites if site not in chosen][:3])
        notes.append(
            f"{left} layers like others at other depths ({examples}{', …' if left > 3 else ''}) were left out by layers={layers}"
        )
    sites = list(chosen)
    streams = {site: _Stream(site, samples, objective) for site in sites}
    handles = []
    for site in sites:
        for tap, weight in site.taps:
            hook = partial(streams[site].see, tap, weight)
            handles.append(tap.module.register_forward_pre_hook(hook, with_kwargs=True))
    outputs = _Outputs(objective.model, sites)
    handles += outputs.handles
    try:
        for index in range(len(objective.batches)):
            with objective.measuring(index):
                # With gradients on: attention's fast path calls no layers, and where inputs come from is read from the graph.
                objective.evaluate(index)
            outputs.clear()
            for stream in streams.values():
                stream.end()
    finally:
        remove(handles)
    for site in sites:
        if why := streams[site].unread or ("" if streams[site].count else "was not called as a layer"):
            what = "some of its inputs" if streams[site].count else "its inputs"
            notes.append(f"{site.name} {why}; {what} are not diagnosed")
    biases = {site: site.bias is not None and id(site.bias) in trained for site in sites}
    made = [streams[site].gathered(biases[site], site in outputs.recentered) for site in sites if streams[site].count]
    return [replace(seen, alike=chosen[seen.site][0], share=chosen[seen.site][1]) for seen in made], notes


def _spread_over_kinds(sites: Sequence[Site], most: int | None) -> dict[Site, tuple[tuple[Tensor, ...], float]]:
    """At most so many sites, the first and others at equal distances of each kind; with the weights each stands for, and their number."""
    kinds: dict[str, list[Site]] = {}
    for site in sites:
        kinds.setdefault(re.sub(r"\d+", "#", site.name), []).append(site)
    if most is None or len(sites) <= most:
        return {site: ((), 1.0) for site in sites}
    # Every kind is seen once, as far as it goes; then the largest ones get more.
    order = sorted(kinds.values(), key=len)
    room, shown = most, dict[Site, tuple[tuple[Tensor, ...], float]]()
    for k, members in enumerate(order):
        count = min(len(members), max(room // (len(order) - k), 0))
        room -= count
        if not count:
            continue
        at = sorted({round(i * (len(members) - 1) / max(count - 1, 1)) for i in range(count)})
        left = [s for i, s in enumerate(members) if i not in at]
        others = tuple(p for s in left for p in (s.weight, *(() if s.bias is None else (s.bias,))))
        for n, i in enumerate(at):
            shown[members[i]] = (others if n == 0 else (), len(members) / len(at))
    return {site: shown[site] for site in sites if site in shown}


class _Outputs:
    """Which sites' outputs a normalization takes as they are, that subtracts their mean over the batch or the image."""

    def __init__(self, model: nn.Module, sites: Iterable[Site]):
        self.recentered: set[Site] = set()
        self._made: dict[int, tuple[Tensor, Site]] = {}  # the tensor, lest another has its number
        self.handles = [tap.module.register_forward_hook(partial(self._note, site)) for site in sites for tap, _ in site.taps]
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self.handles += [m.register_forward_pre_hook(self._take) for m in norms]

    def _note(self, site: Site, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self._made[id(output)] = output, site

    def _take(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and id(args[0]) in self._made:
            self.recentered.add(self._made[id(args[0])][1])

    def clear(self) -> None:
        """The forward is over."""
        self._made.clear()


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
        self.unread = ""

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
        with torch.no_grad():
            for rows in tap.pieces(call, weight):
                self._pending.append(tuple(self._drawn(part) for part in _by_parts(rows)))
            if tap.layout(weight, _CHANNEL).repeat > 1:
                seen = tap.moments(call, weight, _CHANNEL, None)
                self._channel = seen if self._channel is None or seen is None else pool([self._channel, seen])

    def _drawn(self, rows: Tensor) -> Tensor:
        """A share of the rows, (groups, k, n), that makes about as many in all as wanted."""
        N = rows.shape[1]
        self.count += N
        if self._share is None:
            return rows.detach().cpu()  # of the first batch how many there will be is not known yet
        return self._thinned(rows.detach().cpu())

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
                self._parts.append(_Part(self._source, column[0].double()))
            self._parts[k].fold(torch.cat(column, dim=1).double())
        self._used += sum(max(part.shape[1] for part in parts) for parts in self._pending)
        self._pending = []

    def gathered(self, biased: bool, recentered: bool) -> Gathered:
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
            recentered=recentered,
            source=self._source,
            n=parts[0].low.shape[-1],
            count=self.count // len(parts),
            used=self._used,
            R=tuple(R for part in parts for R in part.factors()),
            low=torch.cat([part.low for part in parts]),
            high=torch.cat([part.high for part in parts]),
            zeros=torch.cat([part.zeros / max(part.rows, 1) for part in parts]),
            edges=torch.cat([part.edges / max(part.rows, 1) for part in parts]),
            channel=self._channel,
            epsilon=self._epsilon,
        )


class _Part:
    """Groups of rows that come in the same numbers: R and what is counted, input by input; zeros of what saw nothing."""

    def __init__(self, source: str, like: Tensor):
        self._source = source
        self.rows = 0
        groups, _, n = like.shape
        self.zeros, self.edges, self.low, self.high = (like.new_zeros(groups, n) for _ in range(4))
        self.R = like.new_zeros(groups, 1, n + 1)

    def fold(self, x: Tensor) -> None:
        """Rows of a batch, (groups, k, n)."""
        if not x.shape[1]:
            return
        extended = torch.cat([torch.ones_like(x[..., :1]), x], dim=-1)
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
        """R/√N of each group."""
        return torch.linalg.qr(self.R, mode="r").R / max(self.rows, 1) ** 0.5


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
