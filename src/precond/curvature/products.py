r"""The Hessian and the Gauss–Newton matrix of an objective as maps, by double backprop on graphs that are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from precond import vec
from precond.curvature.errors import NoSecondDerivative
from precond.curvature.graph import GraphSize, size_of
from precond.curvature.objective import Evaluation, Objective
from precond.curvature.symmetric import Block, SymmetricMap, stacked, unstacked
from precond.vec import Vec


class _Graph(ABC):
    """What is kept of one batch: A_b, its part of the matrix, as a function v ↦ A_b v.

    Attributes:
        size: of the graph that is kept.

    Args:
        at: the batch, forwarded.
        weight: w_b.
        params: what the derivatives are taken by.
    """

    size: GraphSize

    def __init__(self, at: Evaluation, weight: float, params: Vec):
        self.params = params

    @abstractmethod
    def product(self, v: Vec, batched: bool = False) -> Vec:
        """A_b v, or A_b V for a block."""


class _HessianGraph(_Graph):
    """H_b v = ∇(vᵀ∇ℓ_b): the gradient's graph, pulled back by v."""

    def __init__(self, at: Evaluation, weight: float, params: Vec):
        super().__init__(at, weight, params)
        loss = at.loss * weight
        g = _differentiable(lambda: torch.autograd.grad(loss, params, create_graph=True, allow_unused=True), loss)
        # A part of the gradient that is constant has zero rows, and autograd takes no outputs without a graph.
        self._rows = [i for i, t in enumerate(g) if t is not None and t.requires_grad]
        self._gradient = tuple(g[i] for i in self._rows)
        self.size = size_of((loss, *self._gradient))
        if not self._rows:
            raise NoSecondDerivative(_LINEAR)

    def product(self, v: Vec, batched: bool = False) -> Vec:
        return _pulled_back(self._gradient, self.params, tuple(v[i] for i in self._rows), batched)


class _GaussNewtonGraph(_Graph):
    r"""G_b v = Jᵀ(∇²_f ℓ_b)J v, J = ∂f/∂p the Jacobian of the outputs f; J v is the graph of u ↦ Jᵀu, pulled back by v."""

    def __init__(self, at: Evaluation, weight: float, params: Vec):
        super().__init__(at, weight, params)
        if not isinstance(at.outputs, Tensor):
            raise TypeError(
                f"gauss_newton: the model must return one tensor, got {type(at.outputs).__name__}; wrap it in a module that does"
            )
        self._f = at.outputs
        self._u = torch.zeros_like(self._f, requires_grad=True)
        back = _differentiable(
            lambda: torch.autograd.grad(self._f, params, self._u, create_graph=True, allow_unused=True), self._f
        )
        self._rows = [i for i, t in enumerate(back) if t is not None]
        self._back = tuple(back[i] for i in self._rows)
        self._at = self._f.detach().requires_grad_()
        loss = at.relossed(self._at) * weight
        (slope,) = _differentiable(lambda: torch.autograd.grad(loss, self._at, create_graph=True), loss)
        self._slope = (slope,)
        self.size = size_of((loss, slope, *self._back))
        if not slope.requires_grad:
            raise NoSecondDerivative(_LINEAR)

    def product(self, v: Vec, batched: bool = False) -> Vec:
        Jv = _pulled_back(self._back, (self._u,), tuple(v[i] for i in self._rows), batched)
        HJv = _pulled_back(self._slope, (self._at,), Jv, batched)
        return _pulled_back((self._f,), self.params, HJv, batched)


class CurvatureMap(SymmetricMap):
    """A matrix of second derivatives Σ_b A_b at the parameters' current values, as a map on vectors aligned to them.

    The graph of a batch is built at the first product and reused until a parameter or buffer changes.

    Args:
        objective: what is differentiated.
        graph: the kind of graph: what A_b is.
        memory: bytes of graphs that are kept; batches beyond are forwarded again for every product.
    """

    def __init__(self, objective: Objective, graph: type[_Graph], memory: float):
        if not memory >= 0:
            raise ValueError(f"memory must be a number of bytes >= 0, got {memory!r}; 0 keeps no graph")
        self.objective, self._kind, self._memory = objective, graph, memory
        self.like = tuple(p.detach() for p in objective.params)
        self._graphs: dict[int, _Graph] = {}
        self._stamp: tuple[Any, ...] = ()
        self._one_by_one = False

    def on(self, objective: Objective) -> CurvatureMap:
        """The same kind of matrix for another objective."""
        return CurvatureMap(objective, self._kind, self._memory)

    def mv(self, v: Vec) -> Vec:
        self._check(v, 0)
        return self._sum(v, lambda graph, x: graph.product(x))

    def mm(self, block: Block) -> Block:
        self._check(block, 1)
        return self._sum(block, self._block_product)

    def _sum(self, v: Vec, product) -> Vec:
        """Σ_b A_b v, in the parameters' dtype."""
        with torch.inference_mode(False):
            x = tuple(t.detach().to(p.dtype) for t, p in zip(v, self.objective.params, strict=True))
            total: Vec = ()
            for index in range(len(self.objective.batches)):
                part = _differentiable(lambda index=index: product(self._graph(index), x))
                total = vec.add(total, part) if total else part
        return total

    def _block_product(self, graph: _Graph, block: Block) -> Block:
        k = block[0].shape[0]
        if graph.size.batchable and not self._one_by_one:
            try:
                parts = [graph.product(tuple(c), True) for c in zip(*(t.split(graph.size.chunk) for t in block), strict=True)]
                return tuple(torch.cat(p) for p in zip(*parts, strict=True)) if len(parts) > 1 else parts[0]
            except (RuntimeError, NotImplementedError):
                # An operation without a batching rule; if it is something else, the loop raises it again.
                self._one_by_one = True
        return stacked([graph.product(v) for v in unstacked(block)]) if k else block

    def _graph(self, index: int) -> _Graph:
        stamp = self.objective.stamp()
        if stamp != self._stamp:
            self._graphs.clear()
            self._stamp = stamp
        if index in self._graphs:
            return self._graphs[index]
        with self.objective.measuring(index):
            at = self.objective.evaluate(index)
            if not torch.isfinite(at.loss):
                raise ValueError(
                    f"the loss of batch {index} is {at.loss.item()}; curvature needs finite losses, look for divergence or bad data"
                )
            graph = self._kind(at, self.objective.weights[index], self.objective.params)
        if graph.size.bytes + sum(g.size.bytes for g in self._graphs.values()) <= self._memory:
            self._graphs[index] = graph
        return graph

    def _check(self, v: Vec, extra: int) -> None:
        shapes = [tuple(t.shape[extra:]) for t in v]
        expected = [tuple(p.shape) for p in self.objective.params]
        if shapes != expected:
            raise ValueError(
                f"{type(self).__name__}: the vector has tensors of shapes {shapes}, the parameters {', '.join(self.objective.names)} "
                f"have {expected}; align maps and vectors to objective.params"
            )


def hessian(objective: Objective, *, memory: float = 2**30) -> CurvatureMap:
    r"""H = ∇²L(p) as a symmetric map on vectors aligned to ``objective.params``.

    One product costs one double backprop, Hv = ∇(vᵀ∇L), on a graph that is built once for a batch and kept: about as much as a
    gradient. ``P.T @ hessian(objective) @ P`` is the Hessian in z, p = P z (Ye, after eq. 4).

    Args:
        objective: the mean loss.
        memory: bytes of graphs to keep; what does not fit is forwarded again for every product.

    Returns:
        A map with ``mv`` for vectors, ``mm`` for blocks, ``to_dense`` for small problems.

    Raises:
        NoSecondDerivative: where the loss, a kernel or a custom function cannot be differentiated twice.

    References:
        Pearlmutter (1994), Fast exact multiplication by the Hessian.
    """
    return CurvatureMap(objective, _HessianGraph, memory)


def gauss_newton(objective: Objective, *, memory: float = 2**30) -> CurvatureMap:
    r"""G = Σ_b w_b Jᵀ(∇²_f ℓ_b)J: the Hessian without the curvature of the model, ≥ 0 for a convex loss.

    It equals the Hessian in every pre-activation of a piecewise linear network, and is no stand-in for it elsewhere. Terms
    of the loss that do not pass through the outputs (a penalty on the parameters) are not part of it.

    Args:
        objective: a mean loss whose model returns one tensor.
        memory: bytes of graphs to keep.

    References:
        Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent.
    """
    return CurvatureMap(objective, _GaussNewtonGraph, memory)


_LINEAR = "the gradient of the loss is constant: the loss is linear in the parameters, or a backward on its way is detached"


def _pulled_back(outputs: Vec, inputs: Vec, v: Vec, batched: bool) -> Vec:
    """Σ_i (∂outputs_i/∂inputs)ᵀ v_i for a vector, or for each of a block."""
    found = torch.autograd.grad(outputs, inputs, v, retain_graph=True, allow_unused=True, is_grads_batched=batched)
    lead = v[0].shape[:1] if batched else ()
    return tuple(x.new_zeros(*lead, *x.shape) if t is None else t for t, x in zip(found, inputs, strict=True))


def _differentiable(f, output: Tensor | None = None):
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
    "once_differentiable": "write its backward with differentiable operations",
    "aot_autograd does not currently support double backward": "give the model before torch.compile (model._orig_mod)",
    "attention": "let the model call scaled_dot_product_attention without forcing a fused kernel",
    "ouble backward": "replace the operation by one with a second derivative",
    "is not implemented": "replace the operation by one with a second derivative",
}
