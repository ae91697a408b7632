r"""The Hessian and the Gauss–Newton matrix of an objective as maps, by double backprop on graphs that are kept."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from precond.algebra import vec
from precond.algebra.vec import Vec
from precond.analysis.curvature.errors import NoSecondDerivative
from precond.analysis.curvature.graph import GraphSize, size_of
from precond.analysis.curvature.graph_cache import LINEAR, Batch, GraphCache, differentiable, pulled_back
from precond.analysis.curvature.objective import Evaluation, Objective
from precond.analysis.curvature.symmetric import Block, SymmetricMap


class _Hessian:
    """H_b v = ∇(vᵀ∇ℓ_b): the gradient's graph, pulled back by v."""

    def __init__(self, at: Evaluation, batch: Batch, params: Vec):
        self.params = params
        loss = at.loss * batch.weight
        g = differentiable(lambda: torch.autograd.grad(loss, params, create_graph=True, allow_unused=True), loss)
        # A part of the gradient that is constant has zero rows, and autograd takes no outputs without a graph.
        self._rows = [i for i, t in enumerate(g) if t is not None and t.requires_grad]
        self._gradient = tuple(g[i] for i in self._rows)
        self.size = size_of((loss, *self._gradient))
        if not self._rows:
            raise NoSecondDerivative(LINEAR)

    def product(self, v: Vec, batched: bool = False) -> Vec:
        """H_b v, or H_b V for a block."""
        return pulled_back(self._gradient, self.params, tuple(v[i] for i in self._rows), batched)


class OutputJacobian:
    """J = ∂f/∂p of the outputs f in a batch. J v is the graph of u ↦ Jᵀu, pulled back by v; the first one may come with the outputs.

    Attributes:
        f: the outputs.
    """

    def __init__(self, at: Evaluation, batch: Batch, params: Vec):
        self.params = params
        if not isinstance(at.outputs, Tensor):
            raise TypeError(f"the model must return one tensor, got {type(at.outputs).__name__}; wrap it in a module that does")
        self.f, self._again, self._along = at.outputs, at.again, at.along
        differentiable(lambda: None, self.f)
        self._forwarded = size_of((self.f,))

    @cached_property
    def _transposed(self) -> tuple[Tensor, dict[int, Tensor]]:
        """u, and Jᵀu as a graph: parts by the number of their parameter."""
        u = torch.zeros_like(self.f, requires_grad=True)
        with self._again():
            back = torch.autograd.grad(self.f, self.params, u, create_graph=True, allow_unused=True)
        return u, {i: t for i, t in enumerate(back) if t is not None}

    @property
    def size(self) -> GraphSize:
        """Of the graph that is kept."""
        return self._whole if "_transposed" in vars(self) else self._forwarded

    @cached_property
    def _whole(self) -> GraphSize:
        return size_of((self.f, *self._transposed[1].values()))

    def forward(self, v: Vec, batched: bool = False) -> Vec:
        """J v."""
        along, self._along = self._along, None
        if along is not None and along[0] is v:
            return (along[1],)
        u, back = self._transposed
        return pulled_back(tuple(back.values()), (u,), tuple(v[i] for i in back), batched)

    def backward(self, u: Vec, batched: bool = False) -> Vec:
        """Jᵀu."""
        return pulled_back((self.f,), self.params, u, batched)


class _GaussNewton(OutputJacobian):
    r"""G_b v = Jᵀ(∇²_f ℓ_b)J v."""

    def __init__(self, at: Evaluation, batch: Batch, params: Vec):
        super().__init__(at, batch, params)
        self._at = self.f.detach().requires_grad_()
        loss = at.relossed(self._at) * batch.weight
        (slope,) = differentiable(lambda: torch.autograd.grad(loss, self._at, create_graph=True), loss)
        self._slope = (slope,)
        if not slope.requires_grad:
            raise NoSecondDerivative(LINEAR)

    def product(self, v: Vec, batched: bool = False) -> Vec:
        """G_b v, or G_b V for a block."""
        Jv = self.forward(v, batched)
        return self.backward(pulled_back(self._slope, (self._at,), Jv, batched), batched)


class CurvatureMap(GraphCache, SymmetricMap):
    """A matrix Σ_b A_b of an objective at the parameters' current values, as a map on vectors aligned to them.

    The graph of a batch is built at the first product and reused until a parameter or buffer changes.
    """

    @property
    def like(self) -> Vec:  # type: ignore[override]
        return tuple(p.detach() for p in self.objective.params)

    def mv(self, v: Vec) -> Vec:
        x = self._aligned(v, 0)
        return self._sum(lambda graph: graph.product(x))

    def mm(self, block: Block) -> Block:
        x = self._aligned(block, 1)
        return self._sum(lambda graph: self._each(graph, graph.product, x))

    def _sum(self, product, along: Vec | None = None) -> Vec:
        """Σ_b A_b v, in the parameters' dtype."""
        with torch.inference_mode(False):
            total: Vec = ()
            for index in self._indices():
                part = self._applied(index, product, along)
                total = vec.add(total, part) if total else part
        return total


class ThroughOutputs(CurvatureMap):
    """A matrix Σ_b J_bᵀA_bJ_b, whose first product takes J_b v from the forward pass that makes the graph."""

    def mv(self, v: Vec) -> Vec:
        x = self._aligned(v, 0)
        return self._sum(lambda graph: graph.product(x), x)


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

    Example:
        >>> import torch
        >>> from precond.analysis.curvature import Objective
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> objective = Objective(model, lambda out, y: 0.5 * (out - y).square().mean(), [(x, torch.zeros(2, 1))])
        >>> hessian(objective).to_dense()  # XXᵀ/N
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])

    References:
        Pearlmutter (1994), Fast exact multiplication by the Hessian.
    """
    return CurvatureMap(objective, _Hessian, memory)


def gauss_newton(objective: Objective, *, memory: float = 2**30) -> CurvatureMap:
    r"""G = Σ_b w_b Jᵀ(∇²_f ℓ_b)J: the Hessian without the curvature of the model, ≥ 0 for a convex loss.

    It equals the Hessian in every pre-activation of a piecewise linear network, and is no stand-in for it elsewhere. Terms
    of the loss that do not pass through the outputs (a penalty on the parameters) are not part of it.

    Args:
        objective: a mean loss whose model returns one tensor.
        memory: bytes of graphs to keep.

    Raises:
        NoSecondDerivative: where the loss cannot be differentiated twice in the outputs.

    Example:
        >>> import torch
        >>> from precond.analysis.curvature import Objective
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> objective = Objective(model, lambda out, y: 0.5 * (out - y).square().mean(), [(x, torch.zeros(2, 1))])
        >>> gauss_newton(objective).to_dense()  # the Hessian of a linear model: XXᵀ/N
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])

    References:
        Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent.
    """
    return ThroughOutputs(objective, _GaussNewton, memory)
