"""Passes over the data that fold what layers receive and what comes back to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from precond.analysis.curvature.errors import CoupledSamples
from precond.analysis.curvature.keeping import differentiable
from precond.analysis.curvature.kronecker import Place
from precond.analysis.curvature.neurons.layer import Call, Layer, arrangements
from precond.analysis.curvature.objective import Evaluation, Objective
from precond.optim.inputs.moments import widened

_ENTRIES = 2**24  # of samples' gradients that are held at once


def extended_moment(h: Tensor, place: Place) -> Tensor:
    """Σ ĥĥᵀ, (groups, n, n), with the bias's one where there is a bias: [[Σhhᵀ, Σh], [Σhᵀ, count]]."""
    if place.weight is None:
        return h.new_full((h.shape[0], 1, 1), h.shape[1])
    if place.bias is None:
        return h.mT @ h
    n = h.shape[2]
    out = h.new_empty(h.shape[0], n + 1, n + 1)
    out[:, :n, :n] = h.mT @ h
    out[:, :n, n] = out[:, n, :n] = h.sum(1)
    out[:, n, n] = h.shape[1]
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

    def __init__(self, layers: dict[str, Known], calls: dict[str, list[Call]], at: Evaluation, V: Tensor | None, sure: bool):
        self.layers, self.calls, self.f, self.V, self.sure = layers, calls, at.outputs, V, sure
        self._deltas = [call.delta for name in layers for call in calls[name]]
        self._slopes: list[dict[str, Tensor]] = []
        self._inputs: dict[str, Tensor] = {}
        self._places: dict[str, Tensor] = {}
        self.keep = False

    @property
    def bytes(self) -> int:
        """Of all that would be kept, about: what comes back for each r, and what is received, patches of kernels as such."""
        each = sum(t.numel() * t.element_size() for t in self._deltas) * (1 if self.V is None else len(self.V))
        patches = (known.layer.tap.weights[0].param[0].numel() * call.delta.numel() / max(known.layer.units, 1)
                   for name, known in self.layers.items() for call in self.calls[name])  # fmt: skip
        return each + int(sum(patches)) * 8

    def inputs(self, name: str) -> Tensor:
        """h at all places, (groups, places, n)."""
        if name in self._inputs:
            return self._inputs[name]
        h = widened(_joined([self.layers[name].layer.inputs(call) for call in self.calls[name]], 1))
        if self.keep:
            self._inputs[name] = h
        return h

    def backward(self) -> Iterator[Callable[[str], Tensor]]:
        """For each r, a function that gives δ_r of a layer at all its places, (groups, places, rows)."""
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
            fits = [at for at in possible if N == 1 or not bool(back[name][:, at[~inside]].any())]
            if not fits:
                raise CoupledSamples(
                    f"the outputs of one sample depend on layer {name!r} in another, or its places belong to no one sample each; use "
                    "Objective(..., mode='eval') where batch normalization is in training mode, or sharing='expand' of kfac"
                )
            places[name] = fits[0]
        return places

    def _options(self, name: str) -> list[Tensor]:
        layer, calls = self.layers[name].layer, self.calls[name]
        each = [list(arrangements(layer.lead(c.delta), self.f.shape[0])) for c in calls]
        offsets = [0, *accumulate(layer.rows(c.delta).shape[0] for c in calls)]
        return [
            torch.cat([at + offset for at, offset in zip(parts, offsets, strict=False)], 1).to(self.f.device)
            for parts in zip(*each, strict=False)
        ]

    def _back(self, cotangent: Tensor, again: bool) -> dict[str, Tensor]:
        """What of a cotangent of the outputs comes back to each layer, (groups, places, rows)."""
        again = again or self.keep
        found = differentiable(
            lambda: torch.autograd.grad(
                self.f, self._deltas, cotangent, retain_graph=again, allow_unused=True, materialize_grads=True
            )
        )
        by_call, out = iter(found), {}
        for name, known in self.layers.items():
            rows = widened(_joined([known.layer.rows(next(by_call)) for _ in self.calls[name]], 0))
            out[name] = rows.view(len(rows), known.layer.groups, -1).transpose(0, 1)
        return out


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def tensor_like(objective: Objective) -> Any:
    return tuple(p.detach() for p in objective.params)


def add_to(sums: dict[str, Tensor], name: str, x: Tensor) -> None:
    if name in sums:
        sums[name] += x
    else:
        sums[name] = x
