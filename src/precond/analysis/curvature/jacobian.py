r"""The Jacobian of a model's outputs as a map from parameters to outputs, and back."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from precond.algebra import vec
from precond.algebra.maps import LinearMap, Transposed
from precond.algebra.vec import Vec
from precond.analysis.curvature.graph_cache import GraphCache
from precond.analysis.curvature.objective import Objective
from precond.analysis.curvature.products import OutputJacobian
from precond.analysis.curvature.symmetric import Block, BlockMap, dense, length


class Rectangular(GraphCache, BlockMap):
    """A map from parameters to what each batch of an objective makes of them, one tensor a batch; its graphs map both ways."""

    @property
    def like(self) -> Vec:  # type: ignore[override]
        return tuple(p.detach() for p in self.objective.params)

    @property
    def images(self) -> Vec:
        """Zeros of the shapes of what it maps to."""
        return tuple(torch.zeros_like(self._graph(i).image) for i in self._indices())

    def mv(self, v: Vec) -> Vec:
        x = self._aligned(v, 0)
        return self._out(lambda graph: graph.forward(x), x)

    def mm(self, block: Block) -> Block:
        x = self._aligned(block, 1)
        return self._out(lambda graph: self._each(graph, graph.forward, x))

    def rmv(self, v: Vec) -> Vec:
        return self._back(v, 0, lambda graph, u: graph.backward(u))

    def rmm(self, block: Block) -> Block:
        """The transpose applied to the k vectors of a block."""
        return self._back(block, 1, lambda graph, u: self._each(graph, graph.backward, u))

    @property
    def T(self) -> LinearMap:
        return _Transposed(self)

    def to_dense(self) -> Tensor:
        wide = length(self.like) > length(self.images)
        return dense(self.T).T if wide else dense(self)

    def _out(self, product, along: Vec | None = None) -> Vec:
        with torch.inference_mode(False):
            return tuple(part for i in self._indices() for part in self._applied(i, product, along))

    def _back(self, u: Vec, extra: int, product) -> Vec:
        count = len(self.objective.batches)
        if len(u) != count:
            raise ValueError(
                f"{type(self).__name__}: the vector has {len(u)} tensors, the objective {count} batches; give one a batch"
            )
        with torch.inference_mode(False):
            total: Vec = ()
            for i, t in zip(self._indices(), u, strict=True):
                image = self._graph(i).image
                if t.shape[extra:] != image.shape:
                    raise ValueError(
                        f"{type(self).__name__}: the vector has shape {tuple(t.shape[extra:])} for batch {i}, which makes "
                        f"{tuple(image.shape)}; align vectors to map.images"
                    )
                part = self._applied(i, partial(product, u=(t.detach().to(image.dtype),)))
                total = vec.add(total, part) if total else part
        return total


class _Transposed(Transposed, BlockMap):
    """The transpose of a rectangular map, which acts on what that one maps to."""

    map: Rectangular

    def __init__(self, map: Rectangular):
        self.map = map

    @property
    def like(self) -> Vec:  # type: ignore[override]
        return self.map.images

    def mm(self, block: Block) -> Block:
        return self.map.rmm(block)


class _Outputs(OutputJacobian):
    """J of a batch, and the outputs that it maps to."""

    @property
    def image(self) -> Tensor:
        return self.f.detach()


def jacobian(objective: Objective, *, memory: float = 2**30) -> Rectangular:
    r"""J = ∂f/∂p of the outputs f on all data, as a map from parameters to outputs: one tensor (n_b, …) for each batch.

    ``J.mv(v)`` is how the outputs change along v, ``J.rmv(u)`` = Jᵀu a gradient, and ``J.T`` the transpose as a map. Products of
    maps are maps: ``J @ J.T`` is the (empirical) tangent kernel on outputs, ``J.T @ J`` acts on parameters.

    Args:
        objective: its model must return one tensor; its loss does not matter.
        memory: bytes of graphs to keep; what does not fit is forwarded again for every product.

    Returns:
        A map with ``mv`` and ``mm``, ``rmv`` and ``rmm``, ``T``, ``to_dense`` (outputs, n), and ``images``, zeros of the outputs' shapes.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> J = jacobian(Objective(model, torch.nn.MSELoss(), [(x, torch.zeros(2, 1))]))
        >>> J.to_dense()
        tensor([[1., 0.],
                [0., 2.]])
        >>> (J @ J.T).to_dense()
        tensor([[1., 0.],
                [0., 4.]])

    References:
        Jacot, Gabriel & Hongler (2018), Neural tangent kernel.
    """
    return Rectangular(objective, _Outputs, memory)
