"""One layer in one batch: its inputs, and its pre-activations as something that the loss is differentiated by."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from precond.algebra import checks
from precond.optim.inputs.conv import ConvTap
from precond.optim.inputs.moments import Request
from precond.optim.inputs.taps import LinearTap

_CONV = nn.modules.conv._ConvNd


@dataclass(frozen=True)
class Call:
    """A forward of the layer.

    Attributes:
        args, kwargs: what it was called with.
        delta: δ = 0, added to its output: ∂/∂δ is the derivative by the pre-activations a, whatever they feed into.
        params: what stood for the layer's parameters, by name: what acts on the loss elsewhere is these themselves.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    delta: Tensor
    params: Mapping[str, Tensor]

    @property
    def input(self) -> Tensor:
        """The tensor that it was called with."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))


@dataclass(frozen=True)
class Edge:
    """A forward of the layer, to which its output's derivatives come back.

    Attributes:
        args, kwargs: what it was called with.
        output: of the shape of what it returned, without values.
        edge: where that stands in the graph, whatever is done to it in place.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    edge: GradientEdge


class Layer:
    """A linear or convolutional layer of a model, by name.

    Its pre-activations are seen as rows: one row of (units) for each place at which the weight is applied.

    Raises:
        ValueError: where there is no such layer.
    """

    def __init__(self, model: nn.Module, name: str, caller: str):
        modules = dict(model.named_modules(remove_duplicate=False))
        eligible = [n for n, m in modules.items() if self.is_one(m)]
        if not eligible:
            raise ValueError(f"{caller}: {type(model).__name__} has no nn.Linear or convolution; H_e S H_eᵀ is about these")
        # What diagnose() calls a model that is itself the layer.
        name = "" if name == "(the model)" else name
        checks.one_of(caller, "layer", name, eligible)
        self.name, self.module = name, modules[name]
        self.conv = isinstance(self.module, _CONV)
        self.tap: Any = ConvTap(self.module) if self.conv else LinearTap(self.module)

    @staticmethod
    def is_one(module: nn.Module) -> bool:
        """Whether a module is such a layer."""
        return isinstance(module, nn.Linear | _CONV)

    @property
    def units(self) -> int:
        """Number of neurons: output features or channels."""
        return self.module.out_channels if self.conv else self.module.out_features

    @property
    def params(self) -> dict[str, Tensor]:
        """Its own weight and bias, by name, where it has them; what a parametrization makes is none."""
        of = self.module._parameters
        return {name: p for name in ("weight", "bias") if (p := of.get(name)) is not None}

    @property
    def groups(self) -> int:
        """Groups of neurons that see different inputs."""
        return self.module.groups if self.conv else 1

    def group(self, unit: int) -> int:
        """The group that a neuron belongs to."""
        return unit * self.groups // self.units

    def checked(self, unit: int, caller: str) -> int:
        """``unit``, if it exists."""
        if not isinstance(unit, int) or isinstance(unit, bool) or not 0 <= unit < self.units:
            raise ValueError(f"{caller}: unit must be a whole number in [0, {self.units}) in layer {self.name!r}, got {unit!r}")
        return unit

    @contextmanager
    def perturbed(self) -> Iterator[list[Call]]:
        """Collects the calls inside, each with a δ added to its output and with stand-ins for the parameters."""
        calls: list[Call] = []
        own = dict(self.params)
        twins = {name: p.detach().requires_grad_() for name, p in own.items()}

        def before(module, args):
            module._parameters.update(twins)

        def hook(module, args, kwargs, out):
            module._parameters.update(own)
            calls.append(Call(args, kwargs, torch.zeros_like(out, requires_grad=True), twins))
            return out + calls[-1].delta

        handles = [self.module.register_forward_pre_hook(before), self.module.register_forward_hook(hook, with_kwargs=True)]
        try:
            yield calls
        finally:
            self.module._parameters.update(own)
            for handle in handles:
                handle.remove()

    @contextmanager
    def watched(self) -> Iterator[list[Edge]]:
        """Collects the calls inside, each with the place of its output in the graph; nothing is added."""
        calls: list[Edge] = []

        def hook(module, args, kwargs, out):
            if not out.requires_grad:  # under no_grad(): no use of the layer in the graph
                return
            calls.append(Edge(args, kwargs, out.new_empty(out.shape, device="meta"), get_gradient_edge(out)))

        handle = self.module.register_forward_hook(hook, with_kwargs=True)
        try:
            yield calls
        finally:
            handle.remove()

    def rows(self, a: Tensor) -> Tensor:
        """Pre-activations, or derivatives by them, as (places, units)."""
        return self.rows_apart(a).reshape(-1, self.units)

    def rows_apart(self, a: Tensor) -> Tensor:
        """The same as a view, (images, places in each, units); of a linear layer as of one image."""
        if not self.conv:
            return a.reshape(1, -1, self.units)
        a = a if a.ndim == self.module.weight.ndim else a[None]
        return a.flatten(2).transpose(1, 2)

    def back(self, rows: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`rows`; a leading dimension of several is kept."""
        if not self.conv:
            return rows.reshape(*rows.shape[:-2], *like.shape)
        batch = like.shape[0] if like.ndim == self.module.weight.ndim else 1
        split = rows.reshape(*rows.shape[:-2], batch, rows.shape[-2] // batch, self.units)
        return split.transpose(-1, -2).reshape(*rows.shape[:-2], *like.shape)

    def lead(self, a: Tensor) -> tuple[int, ...]:
        """The dimensions of the places."""
        if not self.conv:
            return tuple(a.shape[:-1])
        return (a.shape[0], math.prod(a.shape[2:])) if a.ndim == self.module.weight.ndim else (1, math.prod(a.shape[1:]))

    def view(self, weight: Tensor) -> Tensor:
        """The weight, or a gradient of it, as (groups, units of a group, n)."""
        return self.tap.layout(self.tap.weights[0], Request("covariance")).view(weight)

    def inputs(self, call: Call | Edge) -> Tensor:
        """What the weight meets at each place, (groups, places, n)."""
        return self.inputs_apart(call).flatten(1, 2)

    def inputs_apart(self, call: Call | Edge) -> Tensor:
        """The same, (groups, images, places in each, n); of a linear layer as of one image, of a convolution a view."""
        seen, weight = self.tap.read(call.args, call.kwargs), self.tap.weights[0]
        return self.tap.patches(seen, weight) if self.conv else self.tap.rows(seen, weight).detach()[:, None]


def arrangements(lead: tuple[int, ...], samples: int) -> Iterator[Tensor]:
    """The ways in which places of dimensions ``lead`` may belong to samples: their numbers as (samples, positions)."""
    numbers = torch.arange(math.prod(lead)).reshape(lead)
    if not lead:
        numbers = numbers[None]
    elif len(lead) > 1 and lead[0] != samples == lead[1]:
        yield numbers.movedim(1, 0).reshape(samples, -1)
    if numbers.shape[0] % samples == 0:
        yield numbers.reshape(samples, -1)
        if numbers.shape[0] > samples:
            yield numbers.reshape(-1, samples, *lead[1:]).movedim(1, 0).reshape(samples, -1)
    if len(lead) > 1 and lead[0] == samples == lead[1]:
        yield numbers.movedim(1, 0).reshape(samples, -1)
