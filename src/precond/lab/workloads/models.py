"""Models from one definition: linear maps between activations, with the inputs of every layer normalized or not."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from precond.algebra import checks

Kind = Literal["mlp", "convnet", "linear", "logistic"]
Normalization = Literal["none", "batch", "layer", "group"]
Activation = Literal["relu", "tanh", "gelu"]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


@dataclass(frozen=True)
class Architecture:
    r"""Layers h ↦ g(W·B(h) + b), B the normalization of the layer's inputs (Ye, eq. 21), h⁽⁰⁾ the example itself.

    Args:
        kind: ``"mlp"`` of hidden layers of ``widths``; ``"convnet"`` of 3×3 convolutions with ``widths`` channels, each
            followed by a 2×2 maximum, with a linear layer at the end; ``"linear"``, also called ``"logistic"`` for
            classification, of that last layer alone.
        widths: of the hidden layers.
        normalization: of the inputs of each layer: ``"none"``, ``"batch"``, ``"layer"`` or ``"group"``.
        activation: g.
        dropout: probability with which an input of a hidden or last layer is dropped, in [0, 1).
    """

    kind: Kind = "mlp"
    widths: tuple[int, ...] = (64, 64)
    normalization: Normalization = "none"
    activation: Activation = "relu"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        checks.one_of("model", "kind", self.kind, get_args(Kind))
        checks.one_of("model", "normalization", self.normalization, get_args(Normalization))
        checks.one_of("model", "activation", self.activation, get_args(Activation))
        checks.fraction("model", "0.1 to 0.5", dropout=self.dropout)
        if not all(width > 0 for width in self.widths):
            raise ValueError(f"model: widths must be positive, got {self.widths}")

    def build(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        """The model, with torch's own initialization from the global generator.

        Args:
            input_shape: of one example: (features,) or (channels, height, width).
            outputs: number of classes or values.

        Returns:
            A module from (N, *input_shape) to (N, outputs).

        Raises:
            ValueError: for a convolutional net on examples that are no images, or smaller than its pooling.
        """
        if self.kind == "convnet":
            return self._convnet(input_shape, outputs)
        widths = self.widths if self.kind == "mlp" else ()
        sizes = (math.prod(input_shape), *widths)
        layers = [self._layer(nn.Linear(a, b), a, first=i == 0) for i, (a, b) in enumerate(itertools.pairwise(sizes))]
        return nn.Sequential(nn.Flatten(), *layers, self._last(sizes[-1], outputs, first=not widths))

    def _convnet(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        if len(input_shape) != 3:
            raise ValueError(f"model 'convnet' needs images, got examples of shape {input_shape}; use model 'mlp' or 'linear'")
        channels, height, width = input_shape
        side = 2 ** len(self.widths)
        if min(height, width) < side:
            raise ValueError(
                f"model 'convnet' halves the image {len(self.widths)} times; give fewer widths for {height} x {width} pixels"
            )
        sizes = (channels, *self.widths)
        convolutions = [
            nn.Sequential(self._layer(nn.Conv2d(a, b, 3, padding=1), a, first=i == 0, image=True), nn.MaxPool2d(2))
            for i, (a, b) in enumerate(itertools.pairwise(sizes))
        ]
        features = sizes[-1] * (height // side) * (width // side)
        return nn.Sequential(*convolutions, nn.Flatten(), self._last(features, outputs, first=False))

    def _layer(self, linear: nn.Module, features: int, first: bool, image: bool = False) -> nn.Sequential:
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        if self.normalization != "none":
            parts["normalization"] = _normalization(self.normalization, features, image)
        if self.dropout and not first:
            parts["dropout"] = nn.Dropout(self.dropout)
        parts["linear"] = linear
        parts["activation"] = _ACTIVATIONS[self.activation]()
        return nn.Sequential(parts)

    def _last(self, features: int, outputs: int, first: bool) -> nn.Sequential:
        layer = self._layer(nn.Linear(features, outputs), features, first)
        del layer.activation
        return layer


def _normalization(kind: Normalization, features: int, image: bool) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(features) if image else nn.BatchNorm1d(features)
    if kind == "layer" and not image:
        return nn.LayerNorm(features)
    # Over an image, layer normalization is one group. A group of one feature of a vector would be 0 whatever the input.
    smallest = 1 if image else 2
    groups = (
        1 if kind == "layer" else max(g for g in (1, 2, 4, 8) if features % g == 0 and (features // g >= smallest or g == 1))
    )
    return nn.GroupNorm(groups, features)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable entries."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
