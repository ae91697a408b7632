"""Passes over the data that fold what layers receive and what comes back to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from precond.analysis.curvature.errors import CoupledSamples
from precond.analysis.curvature.graph_cache import differentiable
from precond.analysis.curvature.kronecker import Place
from precond.analysis.curvature.neurons.layer import Edge, Layer, arrangements
from precond.analysis.curvature.objective import Evaluation, Objective
from precond.optim.inputs.moments import widened

_ENTRIES = 2**24  # of samples' gradients that are held at once
_BLOCK = 256  # from about which width on the smaller products of a symmetric one pay


def gram(parts: list[Tensor], out: Tensor | None = None) -> Tensor:
    """Σ hhᵀ over all places, (groups, n, n), of parts (groups, images, places in each, n); into ``out`` where it is given."""
    first, *others = parts
    groups, images, places, n = first.shape
    out = first.new_empty(groups, n, n) if out is None else out
    if images > 1 and places >= n:  # products of each image, without a copy of what is no more than a view
        out.zero_()
        for image in first.unbind(1):
            out.baddbmm_(image.mT, image)
    else:
        _fill(out, first.flatten(1, 2))
    for part in others:
        out += gram([part])
    return out


def _fill(out: Tensor, h: Tensor) -> None:
    """hᵀh; of large ones the blocks beside the diagonal once."""
    n = h.shape[-1]
    if n <= _BLOCK:
        torch.matmul(h.mT, h, out=out)
        return
    left, right = slice(n // 2), slice(n // 2, None)
    for half in (left, right):
        _fill(out[..., half, half], h[..., half])
    torch.matmul(h[..., left].mT, h[..., right], out=out[..., left, right])
    out[..., right, left] = out[..., left, right].mT


def extended_moment(parts: list[Tensor], place: Place) -> Tensor:
    """Σ ĥĥᵀ, (groups, n, n), with the bias's one where there is a bias: [[Σhhᵀ, Σh], [Σhᵀ, count]]."""
    count = sum(h.shape[1] * h.shape[2] for h in parts)
    if place.weight is None:
        return parts[0].new_full((parts[0].shape[0], 1, 1), count)
    if place.bias is None:
        return gram(parts)
    n = parts[0].shape[-1]
    out = parts[0].new_empty(parts[0].shape[0], n + 1, n + 1)
    gram(parts, out[:, :n, :n])
    out[:, :n, n] = out[:, n, :n] = sum(h.sum((1, 2)) for h in parts)
    out[:, n, n] = count
    return out


def in_basis(h: Tensor, place: Place, V: Tensor) -> Tensor:
    """ĥV of all places, (groups, places, n)."""
    if place.weight is None:
        return V.expand(-1, h.shape[1], -1)
    return h @ V if place.bias is None else torch.baddbmm(V[:, -1:], h, V[:, :-1])


def squared_entries(d: Tensor, h: Tensor, places: Tensor) -> Tensor:
    """Σ_n (Σ_t δ_nt h_ntᵀ)² entry by entry, (groups, rows, n), of δ (groups, places, rows) and h (groups, places, n)."""
    if places.shape[1] == 1:
        return d.square().mT @ h.square()
    total = d.new_zeros(d.shape[0], d.shape[2], h.shape[2])
    for some in places.split(max(1, _ENTRIES // max(total.numel(), 1))):
        total += (d[:, some].mT @ h[:, some]).square().sum(1)
    return total


@dataclass(frozen=True, eq=False)
class Known:
    """A layer and where its parameters stand."""

    layer: Layer
    place: Place


class Pass:
    """A batch forwarded, with what each layer received, and what comes back to it.

    Attributes:
        keep: whether what was computed is kept for the next time.
    """

    def __init__(self, layers: dict[str, Known], calls: dict[str, list[Edge]], at: Evaluation, V: Tensor | None, sure: bool):
        self.layers, self.calls, self.f, self.V, self.sure = layers, calls, at.outputs, V, sure
        self._edges = [call.edge for name in layers for call in calls[name]]
        self._slopes: list[dict[str, list[Tensor]]] = []
        self._inputs: dict[str, list[Tensor]] = {}
        self._places: dict[str, Tensor] = {}
        self.keep = False

    @property
    def bytes(self) -> int:
        """Of all that would be kept, about: what comes back for each r, and what is received, patches of kernels as such."""
        outputs = [call.output for name in self.layers for call in self.calls[name]]
        each = sum(t.numel() * t.element_size() for t in outputs) * (1 if self.V is None else len(self.V))
        patches = (known.layer.tap.weights[0].param[0].numel() * call.output.numel() / max(known.layer.units, 1)
                   for name, known in self.layers.items() for call in self.calls[name])  # fmt: skip
        return each + int(sum(patches)) * 8

    def inputs(self, name: str) -> list[Tensor]:
        """h of each call, (groups, images, places in each, n)."""
        if name in self._inputs:
            return self._inputs[name]
        h = [widened(self.layers[name].layer.inputs_apart(call)) for call in self.calls[name]]
        if self.keep:
            self._inputs[name] = h
        return h

    def backward(self) -> Iterator[Callable[[str], list[Tensor]]]:
        """For each r, a function that gives δ_r of each call of a layer, (groups, images, places in each, rows)."""
        if self._slopes:
            for found in self._slopes:
                yield found.__getitem__
            return
        for r, cotangent in enumerate(() if self.V is None else self.V):
            found = self._back(cotangent, r < len(self.V) - 1)  # type: ignore[arg-type]
            if self.keep:
                self._slopes.append(found)
            yield found.__getitem__

    def arranged(self, name: str) -> Tensor:
        """The places of each sample, (N, T): those that a change of the outputs of half of the samples alone comes back to.

        Raises:
            CoupledSamples: where there are none.
        """
        if not self._places:
            options = {name: self._options(name) for name in self.layers}
            if self.sure and all(len(found) == 1 for found in options.values()):
                self._places = {name: found[0] for name, found in options.items()}
            else:
                self._places = self._separated(options)
        return self._places[name]

    def _separated(self, options: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        N = self.f.shape[0]
        inside = (torch.randperm(N, generator=torch.Generator().manual_seed(0)) < N // 2).to(self.f.device)
        half = torch.ones_like(self.f) * inside.to(self.f).view(-1, *[1] * (self.f.ndim - 1))
        back, places = self._back(half, True), {}
        for name, possible in options.items():
            fits = [at for at in possible if N == 1 or not bool(joined(back[name])[:, at[~inside]].any())]
            if not fits:
                raise CoupledSamples(
                    f"the outputs of one sample depend on layer {name!r} in another, or its places belong to no one sample each; use "
                    "Objective(..., mode='eval') where batch normalization is in training mode, or sharing='expand' of kfac"
                )
            places[name] = fits[0]
        return places

    def _options(self, name: str) -> list[Tensor]:
        layer, calls = self.layers[name].layer, self.calls[name]
        each = [list(arrangements(layer.lead(c.output), self.f.shape[0])) for c in calls]
        offsets = [0, *accumulate(math.prod(layer.lead(c.output)) for c in calls)]
        return [
            torch.cat([at + offset for at, offset in zip(parts, offsets, strict=False)], 1).to(self.f.device)
            for parts in zip(*each, strict=False)
        ]

    def _back(self, cotangent: Tensor, again: bool) -> dict[str, list[Tensor]]:
        """What of a cotangent of the outputs comes back to each call of each layer, (groups, images, places in each, rows)."""
        again = again or self.keep
        by_edge = iter(
            differentiable(lambda: torch.autograd.grad(self.f, self._edges, cotangent, retain_graph=again, allow_unused=True))
        )
        out: dict[str, list[Tensor]] = {}
        for name, known in self.layers.items():
            out[name] = []
            for call in self.calls[name]:
                found = next(by_edge)
                rows = known.layer.rows_apart(self.f.new_zeros(call.output.shape) if found is None else found)
                out[name].append(widened(rows).unflatten(2, (known.layer.groups, -1)).permute(2, 0, 1, 3))
        return out


def joined(parts: list[Tensor]) -> Tensor:
    """All places of several calls, (groups, places, n)."""
    flat = [part.flatten(1, 2) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat, 1)


def tensor_like(objective: Objective) -> Any:
    return tuple(p.detach() for p in objective.params)


def add_to(sums: dict[str, Tensor], name: str, x: Tensor) -> None:
    if name in sums:
        sums[name] += x
    else:
        sums[name] = x
