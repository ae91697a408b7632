"""What steps of small and of large layers have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from math import isfinite
from typing import Generic, TypeVar

import torch
from torch import Tensor

from precond.algebra.maps import augmented
from precond.algebra.vec import Scalar, Tensors
from precond.optim.blocks import State
from precond.optim.engine.cells import Cell
from precond.optim.engine.kernels.layer import CachedOnStatistics, OfLayer
from precond.optim.inputs import Request
from precond.optim.inputs.moments import REQUESTS
from precond.optim.momentum import Momentum
from precond.optim.preconditioners import BNP, Polar, Whitening
from precond.optim.preconditioners.polar_roots import root_of
from precond.optim.preconditioners.stacked import on

Outer = TypeVar("Outer")
Average = TypeVar("Average")
Tangent = TypeVar("Tangent")

# Lengths whose squares stay in the range of float32.
LEAST, MOST = 1e-12, 1e15


@dataclass
class Schedule:
    """When something is renewed next: looked up where that step has come, or steps were counted anew."""

    _from: int = 1
    _next: int = 0

    def due(self, state: State, every: float) -> bool:
        """Whether it is in the step in progress."""
        t = min(state.steps)
        if not self._from <= t <= self._next:
            self._from, self._next = t, t + min(state.until_renewed(every))
        return t == self._next


@dataclass
class PolarStep(OfLayer, Generic[Outer, Average, Tangent]):
    r"""p ← (1 − αλ)p − αs·d with d = P₁ L^(−1/2) P₁ᵀ m, s such that ‖s·L^(−1/2)P₁ᵀm‖ is the length of a step.

    Attributes:
        outer: what P₁ is made of; None where it is the identity.
        decay: λ.
        _sites: what may be observed of the layer.
        _shape: (A, B) of [W b].
        _seen: the version of L when it was seen last that something was observed of it.
        _exact: see :meth:`_is_exact`, with the version of the number of samples that it was found for.
        _of_root, _of_outer: when L and when the statistics of P₁ are renewed.
    """

    P: Polar
    outer: BNP | Whitening | None
    momentum: Momentum
    decay: float
    _sites: frozenset[tuple[str, Request]] = field(default=frozenset(), init=False, repr=False)
    _shape: tuple[int, ...] = field(default=(), init=False, repr=False)
    _seen: int = field(default=-1, init=False, repr=False)
    _exact: tuple[int, bool] = field(default=(-1, False), init=False, repr=False)
    _of_root: Schedule = field(default_factory=Schedule, init=False, repr=False)
    _of_outer: Schedule = field(default_factory=Schedule, init=False, repr=False)
    _kept: CachedOnStatistics[Outer] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.outer is not None:
            self._kept = CachedOnStatistics(self.outer, self._make)

    @abstractmethod
    def _make(self, outer: State, mean: Tensor, std: Tensor, beta: float | Tensor) -> Outer:
        """P₁."""

    @abstractmethod
    def _average(self, cell: Cell, g: Tensors, P1: Outer | None) -> Average:
        """What L^(−1/2) is applied to, of the momentum m, which is folded already."""

    @abstractmethod
    def _gram(self, P1: Outer | None, m: Average) -> Tensor:
        """The Gram matrix of the shorter side of P₁ᵀm."""

    @abstractmethod
    def _turned(self, state: State, P1: Outer | None, m: Average) -> tuple[Tangent, float]:
        """(d, ‖L^(−1/2)P₁ᵀm‖); may write where m is."""

    @abstractmethod
    def _unit(self, P1: Outer | None, m: Average) -> tuple[Average, float]:
        """(m/s, s) with s = ‖P₁ᵀm‖, or about that."""

    @abstractmethod
    def _move(self, p: Tensors, P1: Outer | None, d: Tangent, keep: float, alpha: float) -> None:
        """p ← keep·p + αd."""

    def observed(self, cell: Cell) -> tuple[BNP | Whitening, State] | None:
        return None if self.outer is None else (self.outer, cell.state["outer"])

    def __call__(self, cell: Cell, p: Tensors, g: Tensors, lr: Scalar, maximize: bool) -> None:
        if not self._shape:
            rows = p[0].shape[0]
            self._shape = rows, p[0].numel() // rows + len(p) - 1
            self._sites = frozenset((site.name, request) for site in cell.block.leaves[0].sites for request in REQUESTS)
        state, P1, shown = cell.state, None, not self._sites.isdisjoint(cell.inputs or ())
        if self._kept is not None:
            assert self.outer is not None
            state = cell.state["inner"]
            P1 = self._kept(cell.state["outer"])
        if maximize:
            g = torch._foreach_neg(g)
        self.momentum.fold(cell.average, g)
        if shown:
            self.P.count_samples(state, cell.inputs)
        m, size = self._average(cell, g, P1), 1.0
        L = state["gram"]
        # Whether nothing was observed yet is looked at where L is another than when it was last.
        if first := self._seen != L._version and self.P.is_fresh(state):
            self.P.measure(state, self._inside(cell, p, P1), torch.tensor(True))
        else:
            self._seen = L._version
        if first or self._is_exact(state):
            self._renew(state, P1, m, 1.0)
        elif self._of_root.due(state, self.P.every):
            self._renew(state, P1, m, 1 - self.P.decay)
        d, norm = self._turned(state, P1, m)
        if not LEAST < norm < MOST:
            m, size = self._unit(P1, self._average(cell, g, P1))
            d, norm = self._turned(state, P1, m)
        state["norm"].fill_(norm * size)
        rank, length, N = (state[name].item() for name in ("rank", "length", "size"))
        lr, length = float(lr), self.P.step_length(rank, length, self.P.spread(N, self._shape), self._shape)
        self._move(p, P1, d, 1 - lr * self.decay, -lr * length / norm if norm else 0.0)
        if isinstance(self.outer, Whitening) and self._of_outer.due(cell.state["outer"], self.outer.every):
            on(cell.block, self.outer).refresh(cell.state["outer"])

    def _inside(self, cell: Cell, p: Tensors, P1: Outer | None) -> Tensor:
        """P₁⁻¹p as a matrix, a row for each output."""
        if self.outer is None or P1 is None:
            return augmented(tuple(p))
        outer = cell.state["outer"]
        if isinstance(self.outer, Whitening) and max(outer.steps) > 1:
            return augmented(on(cell.block, self.outer).map(outer).solve(tuple(p)))
        # No root was taken yet: P₁ = U·diag(β, 1/σ), whose inverse is diag(1/β, σ)·[[1, μᵀ], [0, I]].
        (part,) = self.outer.parts(outer.block)
        mean, std, beta = self.outer.arrow(part, self.outer.statistics(part, outer.as_stack()))
        W = p[0].flatten(1)
        return torch.cat([W * std, *((b + W @ mean[0])[:, None] / beta for b in p[1:])], 1)

    def _is_exact(self, state: State) -> bool:
        """Whether L is that of m itself."""
        size = state["size"]
        if self._exact[0] != size._version:
            self._exact = size._version, root_of(state).whole and self.P.exact(size.item(), self._shape)
        return self._exact[1]

    def _renew(self, state: State, P1: Outer | None, m: Average, share: float) -> None:
        """Fold the momentum in z₁ into L and take the root of that."""
        gram = self._gram(P1, m)
        square = float(gram.trace())
        if not LEAST**2 < square < MOST**2:
            gram = self._gram(P1, self._unit(P1, m)[0])
            square = float(gram.trace())
        if isfinite(square):  # then the matrix is: it is one of products
            self.P.fold(state, gram.div_(square or 1.0), share)
            self._seen = state["gram"]._version if square else -1
