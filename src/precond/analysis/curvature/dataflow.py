"""What feeds what: layers, and the operations between them, read from the autograd graph of a loss."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Of degree one in their input for positive factors, unit by unit: f(s·x) = s·f(x), s > 0.
_LINEAR = {
    *("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Transpose", "T", "Permute", "Clone", "Alias", "ToCopy"),
    *("Expand", "AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "MkldnnAdaptiveAvgPool2D", "Mean", "Sum"),
    *("NativeDropout", "FusedDropout"),
}
_HOMOGENEOUS = {
    *_LINEAR,
    *("Relu", "LeakyRelu", "Prelu", "PreluKernel", "Threshold", "RreluWithNoise"),
    *("MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D"),
}
# Positions of (input, weight, bias) among what a backward node hands gradients to.
_LAYERS = {
    "Addmm": (1, 2, 0),
    "Mm": (0, 1, None),
    "Linear": (0, 1, 2),
    "Convolution": (0, 1, 2),
    "NativeBatchNorm": (0, 1, 2),
    "CudnnBatchNorm": (0, 1, 2),
    "MiopenBatchNorm": (0, 1, 2),
    "NativeLayerNorm": (0, 1, 2),
    "NativeGroupNorm": (0, 1, 2),
}
_NORMS = {"NativeBatchNorm": "batch", "CudnnBatchNorm": "batch", "MiopenBatchNorm": "batch"} | {
    "NativeLayerNorm": "layer",
    "NativeGroupNorm": "group",
}


@dataclass(eq=False)
class Layer:
    """A linear or convolutional layer, or a normalization, at one place of the graph.

    Attributes:
        node: its backward node.
        norm: None, ``"batch"``, ``"layer"`` or ``"group"``.
        weight: position of its weight among the parameters; None: it has none, or a frozen one.
        bias: the same of its bias.
        readers: layers that read its output through operations of degree one alone; None: something else reads it too.
        linear: whether these operations are linear.
        softmax: whether its output goes straight into a logarithm of a softmax, and nowhere else.
    """

    node: Any
    norm: str | None
    weight: int | None
    bias: int | None
    readers: tuple[Layer, ...] | None = None
    linear: bool = True
    softmax: bool = False

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution, whose weight is (in, out, …)."""
        return bool(getattr(self.node, "_saved_transposed", False))

    @property
    def groups(self) -> int:
        """Groups of a convolution."""
        return int(getattr(self.node, "_saved_groups", 1))


def layers(loss: Tensor, params: tuple[Tensor, ...]) -> list[Layer]:
    """All layers below a loss that have a weight or a bias among ``params``, and all normalizations."""
    consumers: dict[Any, list[tuple[Any, int]]] = defaultdict(list)
    order: list[Any] = []
    seen: set[Any] = set()
    todo = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        order.append(node)
        for i, (below, _) in enumerate(node.next_functions):
            if below is not None:
                consumers[below].append((node, i))
                todo.append(below)
    position = {id(p): i for i, p in enumerate(params)}
    found = {node: _layer(node, position) for node in order if _operation(node) in _LAYERS}
    for layer in found.values():
        _read(layer, consumers, found)
    return list(found.values())


def _operation(node: Any) -> str:
    return re.sub(r"Backward\d*$", "", node.name())


def _layer(node: Any, position: dict[int, int]) -> Layer:
    _, weight, bias = _LAYERS[_operation(node)]
    of = lambda i: None if i is None else _parameter(node.next_functions[i][0], position)  # noqa: E731
    return Layer(node, _NORMS.get(_operation(node)), of(weight), of(bias))


def _parameter(node: Any, position: dict[int, int]) -> int | None:
    """Which parameter an edge leads to, through a transposition at most."""
    if node is not None and _operation(node) == "T":
        node = node.next_functions[0][0]
    return position.get(id(getattr(node, "variable", None)))


def _read(layer: Layer, consumers: dict[Any, list[tuple[Any, int]]], found: dict[Any, Layer]) -> None:
    """Follow a layer's output to the layers that read it."""
    readers: list[Layer] = []
    softmax = False
    todo = [layer.node]
    while todo:
        node = todo.pop()
        for above, at in consumers[node]:
            operation = _operation(above)
            if above in found and at == _LAYERS[operation][0]:
                readers.append(found[above])
            elif operation in _HOMOGENEOUS or (operation in ("Mul", "Div") and _only_edge(above)):
                layer.linear = layer.linear and operation not in _HOMOGENEOUS - _LINEAR
                todo.append(above)
            elif operation == "LogSoftmax":
                softmax = True
            else:
                return
    if readers and not softmax:
        layer.readers = tuple(readers)
    layer.softmax = softmax and layer.linear and not readers


def _only_edge(node: Any) -> bool:
    """Whether one factor alone depends on parameters: a product with constants, such as a fixed dropout mask."""
    return sum(below is not None for below, _ in node.next_functions) == 1
