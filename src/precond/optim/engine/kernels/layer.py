"""Layers that kernels step in place: how their rows lie, and what an input-side map of theirs is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from precond.algebra.maps import Layout
from precond.algebra.vec import Scalar, Tensors
from precond.optim.blocks import Block, State
from precond.optim.engine.cells import Cell
from precond.optim.engine.counting import count_step
from precond.optim.engine.verdict import Verdict
from precond.optim.inputs.moments import REQUESTS
from precond.optim.inputs.observer import Key
from precond.optim.preconditioners import input_side
from precond.optim.preconditioners.input_side import InputSide

Made = TypeVar("Made")


class Task(NamedTuple):
    """A step that a kernel is to take.

    Attributes:
        kernel: it, a :data:`precond.optim.engine.kernels.entrywise.Kernel`.
        g: laid out as the parameters ``p``.
        found_inf: on accelerators what tells a kernel not to take it.
    """

    kernel: Any
    cell: Cell
    p: Tensors
    g: Tensors
    lr: Scalar
    maximize: bool
    found_inf: tuple[Tensor, ...] = ()


class OfLayer(ABC):
    """A kernel of one layer, which finds the statistics of its inputs as :func:`observe` has left them."""

    _keys: frozenset[Key] | None = None

    def shown(self, cell: Cell) -> bool:
        """Whether something was observed of the layer since the last step."""
        if not cell.inputs:
            return False
        if self._keys is None:
            self._keys = frozenset((s.name, request) for leaf in cell.block.leaves for s in leaf.sites for request in REQUESTS)
        return not self._keys.isdisjoint(cell.inputs)

    @property
    def joint(self) -> Hashable:
        """Kernels that have this in common take their steps at once, by :meth:`steps`; None: each its own."""
        return None

    @abstractmethod
    def observed(self, cell: Cell) -> tuple[InputSide, State] | None:
        """What the inputs are folded into, and by whom; None where they are not observed."""

    @staticmethod
    def steps(tasks: Sequence[Task]) -> None:
        """Take the steps of several layers."""
        raise NotImplementedError


def take(tasks: Sequence[Task]) -> None:
    """Fold what layers have received since the last step into their statistics, and step them."""
    observe([(task.kernel, task.cell) for task in tasks])
    together: dict[Hashable, list[Task]] = {}
    for task in tasks:
        kernel, cell, p, g, lr, maximize, found_inf = task
        if isinstance(kernel, OfLayer) and (joint := kernel.joint) is not None:
            together.setdefault(joint, []).append(task)
        else:
            kernel(cell, p, g, lr, maximize, *found_inf)
    for some in together.values():
        some[0].kernel.steps(some)


def count_and_take(tasks: Sequence[Task], verdict: Verdict | None = None) -> None:
    """Count a step of each cell and take it. Where something raises, cells that have not moved have counted none."""
    count_step([task.cell.state for task in tasks], verdict)
    before = [task.p[0]._version for task in tasks]
    try:
        take(tasks)
    except BaseException:
        still = [task.cell.state for task, version in zip(tasks, before, strict=True) if task.p[0]._version == version]
        count_step(still, verdict, by=-1.0)
        raise


def observe(steps: Iterable[tuple[Any, Cell]]) -> None:
    """Fold what layers have received since the last step, of all that kernels are about to step at once."""
    shown = [
        (kernel.observed(cell), cell.inputs) for kernel, cell in steps if isinstance(kernel, OfLayer) and kernel.shown(cell)
    ]
    if shown:
        input_side.observe([(of[0], of[1].as_stack(), inputs or {}) for of, inputs in shown if of is not None])


def layer_of(P: InputSide, block: Block) -> Layout | None:
    """How the rows of a layer with its whole bias lie, where they do so one after the other in memory, by groups; or None."""
    parts = P.parts(block)
    if len(parts) != 1 or parts[0].rows != slice(None) or parts[0].weight != 0:
        return None
    layout = parts[0].layout(P.request)
    alone = len(block.leaves) == (1 if parts[0].bias is None else 2)
    weight = block.tensors[0]
    straight = layout.straight and weight.is_contiguous() and weight.numel() > 0
    return layout if alone and straight else None


def is_plain(P: InputSide, block: Block) -> bool:
    """Whether it is such a layer with one group of rows."""
    layout = layer_of(P, block)
    return layout is not None and layout.groups == 1


@dataclass
class CachedOnStatistics(Generic[Made]):
    """What a kernel makes in a step of (state, μ, σ, β) of a layer; made again where the statistics have changed, whichever engine did it.

    It is None where P is the identity yet.
    """

    P: InputSide
    make: Callable[[State, Tensor, Tensor, float | Tensor], Made]
    _of: State | None = field(default=None, init=False, repr=False)
    _read: tuple[Tensor, Tensor] = field(init=False, repr=False)
    _versions: tuple[int, int] = field(default=(-1, -1), init=False, repr=False)
    _made: Made | None = field(default=None, init=False, repr=False)

    def __call__(self, state: State) -> Made | None:
        if state is not self._of:
            mean = state["mean"]
            self._of, self._read, self._versions = state, (mean, state.get("basis", state.get("factor", mean))), (-1, -1)
        mean, root = self._read
        if self._versions != (versions := (mean._version, root._version)):
            self._made, self._versions = self._new(state), versions
        return self._made

    def _new(self, state: State) -> Made | None:
        (part,) = self.P.parts(state.block)
        mine = self.P.statistics(part, state.as_stack())
        if not self.P.known(mine):
            return None
        self.P.follow(part, mine)
        return self.make(state, *self.P.arrow(part, mine))
