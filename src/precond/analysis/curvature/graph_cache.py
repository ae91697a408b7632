"""Graphs of batches that are built once and kept, and passes through them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from precond.algebra.vec import Vec
from precond.analysis.curvature.errors import NoSecondDerivative
from precond.analysis.curvature.graph import GraphSize
from precond.analysis.curvature.objective import Evaluation, Objective
from precond.analysis.curvature.stamp import Stamp
from precond.analysis.curvature.symmetric import Block, stacked, unstacked


@dataclass(frozen=True)
class Batch:
    """A batch of an objective.

    Attributes:
        index: b.
        weight: w_b.
        size: n_b.
        total: N = Σn.
    """

    index: int
    weight: float
    size: float
    total: float


class Graph(Protocol):
    """What is kept of one batch."""

    @property
    def size(self) -> GraphSize: ...


class GraphCache:
    """What is made of each batch of an objective at the parameters' current values, and kept until one of them or a buffer changes.

    Args:
        objective: what is differentiated.
        graph: makes the graph of a batch.
        memory: bytes of graphs that are kept, beside one copy of parameters and buffers; batches beyond are forwarded again for every product.
    """

    def __init__(self, objective: Objective, graph: Callable[[Evaluation, Batch, Vec], Graph], memory: float):
        if not memory >= 0:
            raise ValueError(f"memory must be a number of bytes >= 0, got {memory!r}; 0 keeps no graph")
        self.objective, self._kind, self._memory = objective, graph, memory
        self._graphs: dict[int, Any] = {}
        self._stamp: Stamp | None = None
        self._one_by_one = False
        self._dual: bool | None = None  # whether dual numbers passed through the model; None: not tried

    def on(self, objective: Objective) -> Any:
        """The same for another objective."""
        return type(self)(objective, self._kind, self._memory)

    def _indices(self) -> range:
        """Of all batches, for one pass over them: graphs of what has changed since the last one are gone."""
        if self._graphs and not (self._stamp and self._stamp.stands):
            self._graphs.clear()
        return range(len(self.objective.batches))

    def _applied(self, index: int, product: Callable[[Any], Vec], along: Vec | None = None) -> Vec:
        """What ``product`` makes of the graph of a batch; where that is made anew, along a vector if dual numbers pass through the model."""
        try:
            return differentiable(lambda: product(self._graph(index, along)))
        except Exception:
            # An operation without a forward derivative, a checkpoint, …: if it is something else, passes without them raise it again.
            if not self._dual:
                raise
            self._dual = False
            self._graphs.clear()
        return differentiable(lambda: product(self._graph(index)))

    def _graph(self, index: int, along: Vec | None = None) -> Any:
        while self._graphs and sum(g.size.bytes for g in self._graphs.values()) > self._memory:
            self._graphs.popitem()  # graphs grow when what is made of them is differentiated
        if index in self._graphs:
            return self._graphs[index]
        if self._dual is False:
            along = None
        elif along is not None:
            self._dual = True
        with self.objective.measuring(index):
            at = self.objective.evaluate(index, along)
            if not torch.isfinite(at.loss):
                raise ValueError(
                    f"the loss of batch {index} is {at.loss.item()}; curvature needs finite losses, look for divergence or bad data"
                )
            graph = self._kind(at, self._batch(index), self.objective.params)
        if graph.size.bytes + sum(g.size.bytes for g in self._graphs.values()) <= self._memory:
            self._stamp = self._stamp if self._graphs else Stamp(self.objective)
            self._graphs[index] = graph
        return graph

    def _batch(self, index: int) -> Batch:
        o = self.objective
        return Batch(index, o.weights[index], o.sizes[index], o.total)

    def _each(self, graph: Any, product: Callable[..., Any], block: Block) -> Any:
        """``product(v, batched)`` of a graph for the vectors of a block: several at once where that is faster."""
        k = block[0].shape[0]
        if graph.size.batchable and not self._one_by_one:
            try:
                parts = [product(tuple(c), True) for c in zip(*(t.split(graph.size.chunk) for t in block), strict=True)]
                return tuple(torch.cat(p) for p in zip(*parts, strict=True)) if len(parts) > 1 else parts[0]
            except (RuntimeError, NotImplementedError):
                # An operation without a batching rule; if it is something else, the loop raises it again.
                self._one_by_one = True
        return stacked([product(v, False) for v in unstacked(block)]) if k else block

    def _aligned(self, v: Vec, extra: int) -> Vec:
        """v in the parameters' dtype."""
        shapes = [tuple(t.shape[extra:]) for t in v]
        expected = [tuple(p.shape) for p in self.objective.params]
        if shapes != expected:
            raise ValueError(
                f"{type(self).__name__}: the vector has tensors of shapes {shapes}, the parameters {', '.join(self.objective.names)} "
                f"have {expected}; align maps and vectors to objective.params"
            )
        return tuple(t.detach().to(p.dtype) for t, p in zip(v, self.objective.params, strict=True))


LINEAR = "the gradient of the loss is constant: the loss is linear in the parameters, or a backward on its way is detached"


def pulled_back(outputs: Vec, inputs: Vec, v: Vec, batched: bool) -> Vec:
    """Σ_i (∂outputs_i/∂inputs)ᵀ v_i for a vector, or for each of a block."""
    found = torch.autograd.grad(outputs, inputs, v, retain_graph=True, allow_unused=True, is_grads_batched=batched)
    lead = v[0].shape[:1] if batched else ()
    return tuple(x.new_zeros(*lead, *x.shape) if t is None else t for t, x in zip(found, inputs, strict=True))


def differentiable(f, output: Tensor | None = None):
    """f(), with autograd's refusals in words that name the remedy."""
    if output is not None and not output.requires_grad:
        raise NoSecondDerivative(
            "the loss does not depend on the parameters; is it computed under no_grad, detached or outside torch?"
        )
    try:
        return f()
    except (RuntimeError, NotImplementedError) as error:
        message = str(error)
        for sign, remedy in _REFUSALS.items():
            if sign in message:
                raise NoSecondDerivative(f"no second derivative: {message.splitlines()[0]}; {remedy}") from error
        raise


_REFUSALS = {
    "oncedifferentiable": "write its backward with differentiable operations",
    "aot_autograd does not currently support double backward": "give the model before torch.compile (model._orig_mod)",
    "attention": "let the model call scaled_dot_product_attention without forcing a fused kernel",
    "ouble backward": "replace the operation by one with a second derivative",
    "is not implemented": "replace the operation by one with a second derivative",
}
