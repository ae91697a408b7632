"""What autograd keeps of a gradient: how much memory it holds, how small its operations are, whether it can be differentiated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from precond.algebra.vec import Vec
from precond.analysis.curvature.errors import NoSecondDerivative


@dataclass(frozen=True)
class GraphSize:
    """Size of an autograd graph.

    Attributes:
        nodes: number of operations.
        bytes: memory of the tensors that they keep.
        convolutional: whether one of them is a convolution.
    """

    nodes: int
    bytes: int
    convolutional: bool

    @property
    def batchable(self) -> bool:
        """Whether a block of vectors is faster than its vectors one by one.

        It is where the work of an operation is small beside the cost of calling it; measured on CPU, the two meet near 6 kB kept
        per operation. A convolution's double backward under ``vmap`` is slower at every size.
        """
        return not self.convolutional and self.bytes <= 6e3 * self.nodes

    @property
    def chunk(self) -> int:
        """The number of vectors of a block that go through at once, so that what they touch stays in cache."""
        return max(2, min(256, int(1.3e5 * self.nodes / max(self.bytes, 1))))


def size_of(outputs: Vec) -> GraphSize:
    """Walk the graph below ``outputs``.

    Raises:
        NoSecondDerivative: where it holds a custom function whose backward is marked as differentiable only once.
    """
    storages: dict[int, int] = {}
    convolutional, nodes = False, 0
    for node in _below(outputs):
        nodes += 1
        convolutional = convolutional or "Convolution" in node.name()
        if isinstance(node, BackwardCFunction):
            _refuse_once_differentiable(node)
        for tensor in _saved(node):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return GraphSize(max(nodes, 1), sum(storages.values()), convolutional)


def uses(outputs: Vec) -> tuple[Counter[Tensor], set[Any]]:
    """How many operations of the graph below ``outputs`` take a leaf, such as a parameter, keyed by the leaves; and all operations.

    What takes a leaf in another precision, which autocast casts once for all, takes the leaf.
    """
    seen = set(_below(outputs))
    leaves = {node: node.variable for node in seen if hasattr(node, "variable")}
    casts = {
        n: leaves[n.next_functions[0][0]] for n in seen if n.name() == "ToCopyBackward0" and n.next_functions[0][0] in leaves
    }
    below = (below for node in seen - casts.keys() for below, _ in node.next_functions)
    return Counter((leaves | casts)[node] for node in below if node in leaves or node in casts), seen


def _below(outputs: Vec) -> Iterator[Any]:
    """The operations of the graph below ``outputs``, each once."""
    seen: set[Any] = set()
    todo = [t.grad_fn for t in outputs if t.grad_fn is not None]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        todo += [below for below, _ in node.next_functions if below is not None]


def _saved(node: Any) -> list[Tensor]:
    if isinstance(node, BackwardCFunction):
        return [t for t in node.saved_tensors if isinstance(t, Tensor)]
    found: list[Tensor] = []
    for name in _saved_names(node.__class__):
        value = getattr(node, name)
        found += [t for t in (value if isinstance(value, tuple | list) else (value,)) if isinstance(t, Tensor)]
    return found


@cache
def _saved_names(kind: type) -> tuple[str, ...]:
    # dir() for each node was half of what a product's set-up cost beside its passes.
    return tuple(name for name in dir(kind) if name.startswith("_saved_"))


def _refuse_once_differentiable(node: Any) -> None:
    backward = node._forward_cls.backward
    # Where no incoming gradient needs a gradient, such a backward does not raise: it silently passes for a constant.
    if getattr(getattr(backward, "__code__", None), "co_qualname", "").startswith("once_differentiable"):
        name = node._forward_cls.__name__
        raise NoSecondDerivative(
            f"{name}.backward is marked once_differentiable, so the loss has no second derivative; write it with differentiable operations"
        )
