"""Which operation a tensor comes from, read from autograd's graph."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

# They move or choose entries and leave their values alone.
_MOVES = re.compile(
    r"((Unsafe)?(View|Reshape)|T|Transpose|Permute|Expand|Clone|Squeeze|Unsqueeze|Slice|Select|Alias|ToCopy|MaxPool.*)\d*"
)
NORMALIZATIONS = ("batch norm", "layer norm", "group norm", "rms norm")
_NAMES = {
    "NativeBatchNorm": "batch norm", "NativeLayerNorm": "layer norm", "NativeGroupNorm": "group norm", "FusedRmsNorm": "rms norm",
    "Relu": "relu", "Tanh": "tanh", "Sigmoid": "sigmoid", "Hardtanh": "hardtanh", "Hardsigmoid": "hardsigmoid",
    "Gelu": "gelu", "Silu": "silu", "LeakyRelu": "leaky relu", "Elu": "elu", "Softplus": "softplus", "Softmax": "softmax",
    "AdaptiveAvgPool1D": "average pool", "AdaptiveAvgPool2D": "average pool",
    "AvgPool2D": "average pool", "Embedding": "embedding", "Addmm": "linear", "Mm": "linear",
    "MkldnnRnnLayer": "recurrent", "CudnnRnn": "recurrent", "ThnnFusedLstmCell": "recurrent", "ThnnFusedGruCell": "recurrent",
    "Convolution": "convolution", "Add": "residual sum", "ScaledDotProductAttentionMath": "attention",
    "ScaledDotProductFlashAttention": "attention", "ScaledDotProductFlashAttentionForCpu": "attention",
}  # fmt: skip


# Products are named by what is multiplied, a few operations before: attention by its softmax, activations by what they are made of.
_PRODUCTS = {
    "Bmm": {"Softmax": "attention", "SafeSoftmax": "attention"},
    "Mul": {"Tanh": "gelu", "Erf": "gelu", "Gelu": "gated", "Silu": "gated", "Sigmoid": "gated"},
}
_NEAR = 5


def _near(node: Any, kind: str, depth: int = _NEAR) -> bool:
    """Whether an operation of a kind is at most so many before a node."""
    below = [n for n, _ in node.next_functions if n is not None] if depth else []
    return any(type(n).__name__.partition("Backward")[0].lstrip("_") == kind or _near(n, kind, depth - 1) for n in below)


def source_of(x: Tensor) -> str:
    """``"data"`` for a tensor without a graph, else what made its values.

    Example:
        >>> import torch
        >>> w = torch.ones(2, 3, requires_grad=True)
        >>> source_of(torch.ones(3)), source_of(torch.tanh(w).reshape(-1))
        ('data', 'tanh')
    """
    node = x.grad_fn
    while node is not None:
        name = type(node).__name__.partition("Backward")[0]
        if not _MOVES.fullmatch(name):
            if name in _PRODUCTS:
                return next((text for kind, text in _PRODUCTS[name].items() if _near(node, kind)), "product")
            return _NAMES.get(name, name.lower())
        node = next((below for below, _ in node.next_functions if below is not None), None)
    return "data"
