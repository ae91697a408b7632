"""A step's view of the parameters that have a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from precond.algebra import vec
from precond.algebra.maps import LinearMap, block_diagonal
from precond.algebra.schedules import value_at
from precond.algebra.sharding import Sums, sums
from precond.algebra.spaces import P, Space, Z
from precond.algebra.vec import Scalar, Vec
from precond.optim.blocks import Leaf, State, matches, state_dtype
from precond.optim.engine.cells import Cell, Choice
from precond.optim.regularizers.base import At, Regularizer


@dataclass
class Point:
    """Cells restricted to what has a gradient, and their leaves' tensors in one order, cell after cell.

    Attributes:
        p: the parameters; for 16-bit parameters float32 copies, with their compensation added.
        g: their gradients, in the dtype of p.
        lr: the learning rate of each tensor.
        times: the number of the step in progress for each tensor, from 1; where devices count, tensors. Empty where no regularizer's
            numbers may follow it.
    """

    cells: list[Cell]
    leaves: tuple[Leaf, ...]
    p: Vec
    g: Vec
    lr: list[Scalar]
    times: list[Scalar]
    choices: Sequence[Choice]

    @property
    def spans(self) -> list[tuple[Cell, slice]]:
        """Each cell and where its tensors stand."""
        out, start = [], 0
        for cell in self.cells:
            out.append((cell, slice(start, start + len(cell.index))))
            start += len(cell.index)
        return out

    @property
    def _joint(self) -> list[slice]:
        """The tensors that P takes jointly."""
        out: list[slice] = []
        for size in (n for cell in self.cells for n in cell.joint):
            start = out[-1].stop if out else 0
            out.append(slice(start, start + size))
        return out

    @property
    def storage(self) -> Vec:
        """The parameters' own tensors, of which this process holds what it steps."""
        return tuple(leaf.tensor for leaf in self.leaves)

    @cached_property
    def sums(self) -> Sums:
        """Sums over vectors of the point, whoever holds them."""
        return sums([leaf.shard for leaf in self.leaves])

    def maps(self, states: Sequence[State] | None = None) -> list[LinearMap]:
        """P of each cell, from the states given or from the cells' own."""
        own = [cell.state for cell in self.cells] if states is None else states
        return [cell.map(state) for cell, state in zip(self.cells, own, strict=True)]

    def joined(self, maps: Sequence[LinearMap]) -> LinearMap:
        """P over all tensors, from the maps of the cells."""
        return block_diagonal([(range(s.start, s.stop), m) for (_, s), m in zip(self.spans, maps, strict=True)], self.p)

    def at(self, k: int, maps: Callable[[], Sequence[LinearMap]], **more: Any) -> At:
        """Where the k-th regularizer is evaluated; ``maps`` gives P of each cell when it is asked for."""
        mine: list[Regularizer] = [c.regularizers[k] for c in self.choices]
        first = mine[0]
        value, times = cache(value_at), self.times  # leaves that share λ share the tensor too, where it is one

        def raw(name: str) -> list[Scalar]:
            fields = [getattr(mine[leaf.group], name) for leaf in self.leaves]
            return [value(x, t, lr) for x, t, lr in zip(fields, times, self.lr, strict=True)]

        takes_part = tuple(
            matches(mine[leaf.group].where, leaf)
            and not (first.scalars and all(_is_zero(getattr(mine[leaf.group], name)) for name in first.scalars))
            for leaf in self.leaves
        )

        def values(name: str) -> list[Scalar]:
            return [x if m else 0.0 for x, m in zip(raw(name), takes_part, strict=True)]

        def space() -> Space:
            if first.space == "p":
                return P(takes_part, self.sums)
            if not first.takes_damping:
                return Z(joined, takes_part, self.sums)
            damped = lambda: [cell.damped(m, first.damping) for cell, m in zip(self.cells, maps(), strict=True)]  # noqa: E731
            return Z(lambda: self.joined(damped()), takes_part, self.sums)

        joined = lambda: self.joined(maps())  # noqa: E731
        dtype = max((leaf.param.dtype for leaf in self.leaves), key=lambda d: torch.finfo(d).eps)
        return At(
            self.p,
            self.g,
            self.lr,
            values,
            takes_part,
            space,
            joined,
            dtype=dtype,
            sums=self.sums,
            joint=self._joint,
            leaves=self.leaves,
            **more,
        )

    def hessian(self, gradient: Sequence[Tensor | None]) -> Callable[[Vec], Vec]:
        """v ↦ H v from the graph of the gradient of each of the point's leaves, built with ``create_graph``."""
        index = [(i, g) for i, g in enumerate(gradient) if g is not None and g.requires_grad]

        def product(v: Vec) -> Vec:
            if not index:
                return vec.zeros_like(v)
            out = torch.autograd.grad(
                [g for _, g in index],
                self.storage,
                [v[i].to(g.dtype) for i, g in index],
                retain_graph=True,
                allow_unused=True,
            )
            return tuple(torch.zeros_like(p) if h is None else h.to(p.dtype) for h, p in zip(out, self.p, strict=True))

        return product


def _is_zero(x) -> bool:
    return not isinstance(x, Tensor) and x == 0


def gather(
    cells: Sequence[Cell],
    choices: Sequence[Choice],
    lr: Callable[[Leaf], Scalar],
    gradients: Sequence[Tensor | None],
    residual: Callable[[Leaf], Tensor | None],
) -> Point:
    """The point of a step: cells in which something has a gradient, with zeros for what is missing in a joint block.

    Args:
        gradients: one per leaf of the optimizer, None where there is none.
    """
    kept, leaves, g = [], [], []
    for cell in cells:
        has = [gradients[i] is not None for i in cell.index]
        if not any(has):
            continue
        cell = cell.taking(has)
        kept.append(cell)
        for i, leaf in zip(cell.index, cell.leaves, strict=True):
            leaves.append(leaf)
            grad = gradients[i]
            if grad is not None and grad.is_sparse:
                raise RuntimeError(  # torch.optim's type
                    f"the gradient of {leaf.name!r} is sparse: make its layer with sparse=False (or use SparseAdam for it)"
                )
            wide = state_dtype(leaf.param.dtype)
            g.append(torch.zeros_like(leaf.tensor, dtype=wide) if grad is None else leaf.local(grad).to(wide))
    p = []
    for leaf in leaves:
        wide_p = leaf.tensor.detach().to(state_dtype(leaf.param.dtype))
        rest = residual(leaf)
        p.append(wide_p if rest is None else wide_p + rest)
    times = [t for cell in kept for t in cell.upcoming] if any(choice.regularizers for choice in choices) else []
    return Point(kept, tuple(leaves), tuple(p), tuple(g), [lr(leaf) for leaf in leaves], times, choices)
