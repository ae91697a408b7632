"""What steps of small and of large layers have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite, sqrt
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from precond.algebra.maps import augmented
from precond.algebra.vec import Scalar, Tensors, Vec
from precond.optim.blocks import State
from precond.optim.engine.cells import Cell
from precond.optim.engine.kernels.layer import CachedOnStatistics, OfLayer, Task
from precond.optim.momentum import LEAST, MOST, Momentum
from precond.optim.preconditioners import BNP, Polar, Whitening
from precond.optim.preconditioners.each import on
from precond.optim.preconditioners.polar_lengths import count_samples, exact, is_fresh, measure, spread, step_length
from precond.optim.preconditioners.polar_roots import fold_all, root_of

Outer = TypeVar("Outer")
Average = TypeVar("Average")
Tangent = TypeVar("Tangent")


@dataclass
class Schedule:
    """When something is renewed next: looked up where that step has come, or steps were counted anew."""

    _from: int = 1
    _next: int = 0

    def due(self, state: State, t: int, every: float) -> bool:
        """Whether it is in the step t, which is in progress."""
        if not self._from <= t <= self._next:
            self._from, self._next = t, t + min(state.until_renewed(every))
        return t == self._next


@dataclass(eq=False)
class Layer(Generic[Outer, Average]):
    """A step in progress.

    Attributes:
        g: of what is minimized.
        t: its number.
        state: Polar's.
        P1: see :meth:`PolarStep._make`; None where it is the identity.
        m: what L^(−1/2) is applied to.
        size: by which the momentum was divided for that.
        stride: √c of the momentum's coherence.
    """

    kernel: PolarStep[Outer, Average, Any]
    cell: Cell
    p: Tensors
    g: Tensors
    lr: float
    t: int
    state: State
    P1: Outer | None
    m: Average = field(init=False)
    size: float = field(default=1.0, init=False)
    stride: float = field(default=1.0, init=False)


@dataclass
class PolarStep(OfLayer, Generic[Outer, Average, Tangent]):
    r"""p ← (1 − αλ)p − αs·d with d = P₁ L^(−1/2) P₁ᵀ m, s such that ‖s·L^(−1/2)P₁ᵀm‖ is the length of a step.

    Attributes:
        outer: what P₁ is made of; None where it is the identity.
        decay: λ.
        _shape: (A, B) of [W b].
        _seen: the version of L when it was seen last that something was observed of it.
        _exact: see :meth:`_is_exact`, with the version of the number of samples that it was found for.
        _length: of a step, with the versions of the numbers that it was found for.
        _of_root, _of_outer: when L and when the statistics of P₁ are renewed.
    """

    P: Polar
    outer: BNP | Whitening | None
    momentum: Momentum
    decay: float
    _shape: tuple[int, ...] = field(default=(), init=False, repr=False)
    _seen: int = field(default=-1, init=False, repr=False)
    _exact: tuple[int, bool] = field(default=(-1, False), init=False, repr=False)
    _length: tuple[tuple[int, ...], float] = field(default=((), 0.0), init=False, repr=False)
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
    def _memory(self, g: Tensors) -> Vec:
        """Where the momentum m is written, in the shapes of g."""

    def _written(self, memory: Vec) -> Vec:
        """All its entries, in tensors that lie in one piece."""
        return memory

    @abstractmethod
    def _average(self, P1: Outer | None) -> Average:
        """What L^(−1/2) is applied to, of the momentum that was written last."""

    @abstractmethod
    def _gram(self, P1: Outer | None, m: Average) -> Tensor:
        """The Gram matrix of the shorter side of P₁ᵀm."""

    @abstractmethod
    def _turned(self, state: State, P1: Outer | None, m: Average) -> tuple[Tangent, Scalar]:
        """(d, ‖L^(−1/2)P₁ᵀm‖²); may write where m is."""

    @abstractmethod
    def _unit(self, P1: Outer | None, m: Average) -> tuple[Average, float]:
        """(m/s, s) with s = ‖P₁ᵀm‖, or about that."""

    @abstractmethod
    def _move(self, p: Tensors, P1: Outer | None, d: Tangent, keep: float, alpha: float) -> None:
        """p ← keep·p + αd."""

    def observed(self, cell: Cell) -> tuple[BNP | Whitening, State] | None:
        return None if self.outer is None else (self.outer, cell.state["outer"])

    def __call__(self, cell: Cell, p: Tensors, g: Tensors, lr: Scalar, maximize: bool) -> None:
        self.steps([Task(self, cell, p, g, lr, maximize)])

    @staticmethod
    def steps(tasks: Sequence[Task]) -> None:
        layers = [task.kernel._begin(task) for task in tasks]
        averages, gradients, momentum = [x.cell.average for x in layers], [x.g for x in layers], layers[0].kernel.momentum
        momentum.fold_all(averages, gradients)
        memories = [x.kernel._memory(x.g) for x in layers]
        momentum.write_all(averages, gradients, memories)
        written = [x.kernel._written(own) for x, own in zip(layers, memories, strict=True)]
        for x, stride in zip(layers, momentum.strides(averages, gradients, written), strict=True):
            x.stride, x.m = stride, x.kernel._average(x.P1)
        if renewed := [(x, share) for x in layers if (share := x.kernel._share(x))]:
            _renew(renewed)
        found = [x.kernel._turned(x.state, x.P1, x.m) for x in layers]
        squares = _numbers([square for _, square in found])
        for x, (d, _), square in zip(layers, found, squares, strict=True):
            x.kernel._end(x, d, sqrt(max(square, 0.0)) if square == square else square)
        due = [x for x in layers if x.kernel._outer_is_due(x)]
        for outer in dict.fromkeys(x.kernel.outer for x in due):
            outer.renew([x.cell.state["outer"].as_stack() for x in due if x.kernel.outer == outer])

    def _begin(self, task: Task) -> Layer[Outer, Average]:
        """What comes before the momentum is folded."""
        _, cell, p, g, lr, maximize, _ = task
        if not self._shape:
            self._shape = p[0].shape[0], p[0].numel() // p[0].shape[0] + len(p) - 1
        state, P1 = cell.state, None
        if self._kept is not None:
            state, P1 = state["inner"], self._kept(state["outer"])
        if self.shown(cell):
            count_samples(state, cell.inputs)
        return Layer(self, cell, p, torch._foreach_neg(g) if maximize else g, float(lr), min(state.steps), state, P1)

    def _share(self, x: Layer[Outer, Average]) -> float:
        """That of this step's momentum in L; 0: L and its root stay."""
        L = x.state["gram"]
        # Whether nothing was observed yet is looked at where L is another than when it was last.
        if self._seen != L._version and is_fresh(x.state):
            measure(x.state, self._inside(x.cell, x.p, x.P1), augmented(tuple(x.p)), torch.tensor(True))
            return 1.0
        self._seen = L._version
        if self._is_exact(x.state):
            return 1.0
        return 1 - self.P.decay if self._of_root.due(x.state, x.t, self.P.every) else 0.0

    def _end(self, x: Layer[Outer, Average], d: Tangent, norm: float) -> None:
        """Move the parameters by d, of a known length."""
        if not LEAST < norm < MOST:
            self.momentum.write(x.cell.average, x.g, self._memory(x.g))
            m, x.size = self._unit(x.P1, self._average(x.P1))
            d, square = self._turned(x.state, x.P1, m)
            (norm,) = (s**0.5 for s in _numbers([square]))
        x.state["norm"].fill_(norm * x.size / x.stride if norm else 0.0)
        length = x.stride * self._step_length(x.state)
        self._move(x.p, x.P1, d, 1 - x.lr * self.decay, -x.lr * length / norm if norm else 0.0)

    def _outer_is_due(self, x: Layer[Outer, Average]) -> bool:
        """Whether the root in P₁ is renewed behind this step."""
        return isinstance(self.outer, Whitening) and self._of_outer.due(x.cell.state["outer"], x.t, self.outer.every)

    def _step_length(self, state: State) -> float:
        rank, length, N = of = state["rank"], state["length"], state["size"]
        versions = tuple(t._version for t in of)
        if self._length[0] != versions:
            times = spread(N.item(), self._shape)
            self._length = versions, step_length(rank.item(), length.item(), times, self._shape, self.P.gain)
        return self._length[1]

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
        W, *b = (t.reshape(len(std), t.shape[0] // len(std), -1) for t in p)  # by groups of rows
        return torch.cat([W * std[:, None], *((t + W @ mean[..., None]) / beta for t in b)], -1).flatten(0, 1)

    def _is_exact(self, state: State) -> bool:
        """Whether L is that of m itself."""
        size = state["size"]
        if self._exact[0] != size._version:
            self._exact = size._version, root_of(state).whole and exact(size.item(), self._shape)
        return self._exact[1]


def _renew(some: Sequence[tuple[Layer[Any, Any], float]]) -> None:
    """Fold the momenta in z₁ into L, with a share each, and take the roots of that."""
    grams = [x.kernel._gram(x.P1, x.m) for x, _ in some]
    squares = _numbers([gram.trace() for gram in grams])
    for i, (x, _) in enumerate(some):
        if not LEAST**2 < squares[i] < MOST**2:
            grams[i] = x.kernel._gram(x.P1, x.kernel._unit(x.P1, x.m)[0])
            squares[i] = float(grams[i].trace())
    finite = [i for i, square in enumerate(squares) if isfinite(square)]  # then the matrix is: it is one of products
    if finite:
        torch._foreach_div_([grams[i] for i in finite], [squares[i] or 1.0 for i in finite])
        states, shares = [some[i][0].state for i in finite], [some[i][1] for i in finite]
        fold_all(states, [grams[i] for i in finite], shares, some[0][0].kernel.P.damping)
    for i in finite:
        x = some[i][0]
        x.kernel._seen = x.state["gram"]._version if squares[i] else -1


def _numbers(found: Sequence[Scalar]) -> list[float]:
    """Tensors as numbers, read at once."""
    if len(found) > 1 and all(isinstance(x, Tensor) for x in found):
        return torch.stack(found).tolist()  # type: ignore[arg-type]
    return [float(x) for x in found]
