"""Cells: a block of leaves, or a stack of blocks alike, with the strategies that step it and the state they keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce

from torch import Tensor

from precond.algebra import vec
from precond.algebra.maps import Identity, LinearMap
from precond.algebra.maps.stacked import OfMembers
from precond.algebra.vec import Scalar, Vec
from precond.optim.blocks import COUNTS, Block, Leaf, Stack, State, counted_together, whole_numbers
from precond.optim.inputs import Request
from precond.optim.inputs.observer import InputMoments
from precond.optim.momentum import LENGTHS, Momentum
from precond.optim.preconditioners.base import Preconditioner
from precond.optim.preconditioners.each import on
from precond.optim.preconditioners.seen import Seen
from precond.optim.regularizers.base import Regularizer


@dataclass(frozen=True)
class Choice:
    """The frozen strategies of one parameter group."""

    preconditioner: Preconditioner
    momentum: Momentum | None = None
    regularizers: tuple[Regularizer, ...] = ()


@dataclass
class Cell:
    """A block or a stack of blocks alike, the strategies in force for it, and its state.

    The optimizer's own state tensors are views of these.

    Attributes:
        index: positions of the leaves among all leaves, member after member of a stack.
        inputs: what was seen of layer inputs since the last step, or None.
    """

    index: tuple[int, ...]
    block: Block
    preconditioner: Preconditioner
    momentum: Momentum | None
    state: State
    average: State
    inputs: InputMoments | None = None
    _views: dict[tuple[int, ...], Cell] = field(default_factory=dict, repr=False)
    _known: tuple[Preconditioner | None, bool, bool] = field(default=(None, False, False), repr=False)

    @cached_property
    def members(self) -> list[tuple[int, ...]]:
        """The positions of each member's leaves; of a block alone all of them."""
        m = len(self.block.leaves)
        return [self.index[i : i + m] for i in range(0, len(self.index), m)]

    def member(self, k: int) -> Cell:
        """A member of a stack by itself: a stack of one; the tensors are the same."""
        if not isinstance(self.block, Stack):
            return self
        own = self.state.member(k), self.average.member(k)
        return Cell(self.members[k], self.block.member(k), self.preconditioner, self.momentum, *own)

    @property
    def cells(self) -> Sequence[Cell]:
        """The cells that step blocks: itself, or those that it holds."""
        return (self,)

    @property
    def here(self) -> Sequence[Cell]:
        """The cells that this process steps by themselves: itself, or what it owns of those that it holds."""
        return (self,)

    @property
    def own(self) -> Sequence[Cell]:
        """The cells whose state this process keeps: itself, or what it owns of those that it holds."""
        return (self,)

    @property
    def joint(self) -> list[int]:
        """How many of its leaves P takes jointly, block after block."""
        size = 1 if self.preconditioner.diagonal else len(self.block.leaves)
        return [size] * (len(self.index) // size)

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """All leaves, in the order of ``index``."""
        return self.block.all_leaves

    @property
    def acting(self) -> Preconditioner:
        """The preconditioner, as the block takes it."""
        return on(self.block, self.preconditioner)

    def wanted(self) -> Iterable[tuple[str, Request, Tensor | None]]:
        """What is to be observed of layer inputs before the next step: see :meth:`Preconditioner.wanted`."""
        if not self._in_force()[2] or self.preconditioner.idle(min(self.state.steps) + 1, self.block.turns):
            return ()
        return self.acting.wanted(self.state)

    @property
    def handled(self) -> bool:
        """Whether the preconditioner in force acts on the block."""
        return self._in_force()[1]

    def _in_force(self) -> tuple[Preconditioner | None, bool, bool]:
        """The preconditioner in force, whether it acts on the block, and whether it asks for inputs there: asked in each step."""
        if self._known[0] is not (P := self.preconditioner):
            handles = P.handles(self.block)
            self._known = P, handles, handles and bool(P.requests)
        return self._known

    def taking(self, has: Sequence[bool]) -> Cell:
        """The cell on what a step takes, where some leaves have a gradient: what is joint stays together."""
        if all(has) or not self.preconditioner.entrywise:
            return self
        return self.restricted(tuple(i for i, h in enumerate(has) if h))

    def restricted(self, keep: tuple[int, ...]) -> Cell:
        """The cell on some of its leaves, for a step in which the others have no gradient."""
        if keep not in self._views:
            own, index = (self.state.restricted(keep), self.average.restricted(keep)), tuple(self.index[i] for i in keep)
            self._views[keep] = Cell(index, self.block.subset(keep), self.preconditioner, self.momentum, *own)
        view = self._views[keep]
        view.preconditioner, view.momentum, view.inputs = self.preconditioner, self.momentum, self.inputs
        return view

    @property
    def upcoming(self) -> Sequence[Scalar]:
        """The number of the next step for each leaf; where the device counts, tensors."""
        if (clock := self.state.get("clock")) is not None:
            return (counted_together(clock).double() + 1).unbind()
        return [t + 1 for t in whole_numbers(self.state["step"])]

    def written(self) -> Iterator[Tensor]:
        """The tensors of its state that steps write, but for the counts of steps."""
        yield from self.state.written()
        yield from self.average.written()

    def observe(self, state: State, gradient: Vec) -> None:
        """Fold a gradient, one tensor for each leaf, into ``state`` (the cell's own, or a copy of it)."""
        if self.handled:
            gradient = self.block.gathered(gradient)
            self.acting.observe(state, Seen(gradient, self.inputs, *self._clean_momentum(state, gradient), self._shown))

    def ahead(self, gradient: Vec, lagged: bool) -> State:
        """What the state becomes where a gradient is folded into it; where it is ``lagged``, and knows one, what it is.

        Leaf by leaf where entries know nothing of each other: what is stepped by one call may have begun at different times.
        """
        known = [lagged and t > 0 for t in self.state.steps]
        if all(known):
            return self.state
        state = self.state.ahead()
        self.observe(state, gradient)
        return self.state.merged(state, known) if any(known) and self.preconditioner.entrywise else state

    @property
    def _shown(self) -> Callable[[], Vec] | None:
        return self.block.position if self.block.known else None

    def _clean_momentum(self, state: State, gradient: Vec) -> tuple[Vec | None, Tensor | None]:
        """The momentum of the clean gradient after the step in progress, and √c of its coherence, where the map is made of it.

        It is the step's own, unless regularizers add to the gradient: then an average of its own, ``clean``, in the cell's own state.
        """
        if not self.preconditioner.uses_momentum or self.momentum is None or self.momentum.of != "cotangent":
            return None, None
        kept = self.average.get("clean", self.average.get("m"))
        also = {key: x[key] for keys, x in ((LENGTHS, self.average), (COUNTS, state)) for key in keys if key in x}
        own = State(state.block, also if kept is None else {"m": kept} | also)
        if state is not self.state:
            own = own.copied()
        elif kept is not None and "clean" not in self.average:
            own["m"] = tuple(t.clone() for t in kept)
        self.momentum.fold(own, gradient)
        m = self.momentum.current(own, gradient)
        return m, self.momentum.stride(own, gradient, m)

    def descent(self, a: Vec, least: Sequence[Scalar] = (), fold: bool = True) -> Vec:
        """F N Nᵀ · momentum(Fᵀa) with P = F N, or momentum(M a) where the momentum is one of tangents; one tensor for each leaf.

        M is damped until its eigenvalues are at most 1/t, t the largest of ``least``, where that is not 0 and its map has such a form.
        """
        F, N = self.factors()
        t = reduce(vec.larger, {id(x): x for x in least}.values()) if least else 0.0
        if isinstance(F, Identity) and (isinstance(t, Tensor) or t):
            N = N.bounded(t)
        y = self._averaged(F.rmv(self.block.gathered(a)), "cotangent", fold)
        return self.block.scattered(self._averaged(F.mv(N.gram(y)), "tangent", fold))

    def taken(self, g: Vec) -> Vec:
        """:meth:`observe` and :meth:`descent` of a gradient to which nothing is added, in a step that is counted already."""
        plain = self.momentum is None or (self.keeps_cotangents and "clean" not in self.average)
        if not self.handled or not plain:
            self.observe(self.state, g)
            return self.descent(g)
        P = self.acting
        if not self.preconditioner.uses_momentum:  # nothing keeps what the next call needs no more
            seen = lambda: Seen(self.block.gathered(g), self.inputs, position=self._shown)  # noqa: E731
            return self.block.scattered(P.push(self.state, self._averaged(P.pull(self.state, seen()), "cotangent", fold=True)))
        gradient = self.block.gathered(g)
        # What was put side by side is memory of the step's own, and what is made of the momentum alone asks for no gradient.
        own = len(self.members) > 1 and not self.preconditioner.constituents and "mean_length" not in self.average
        m, stride = gradient, None
        if self.momentum is not None:
            of = self.average, gradient
            self.momentum.fold(*of)
            m = self.momentum.write(*of, gradient) if own and "m" in self.average else self.momentum.current(*of)
            stride = self.momentum.stride(*of, m)
        return self.block.scattered(P.descend(self.state, Seen(gradient, self.inputs, m, stride, self._shown)))

    def factors(self) -> tuple[LinearMap, LinearMap]:
        """(F, N) with P = F N, on the tensors of the block; the momentum of cotangents is kept in the coordinates of F."""
        return self.acting.factors(self.state) if self.handled else (Identity(), Identity(self.block.tensors))

    def _averaged(self, a: Vec, of: str, fold: bool) -> Vec:
        """The momentum of cotangents (in the coordinates of F) or of tangents with a folded in; a itself where it is of the other."""
        if self.momentum is None or self.momentum.of != of:
            return a
        if fold:
            self.momentum.fold(self.average, a)
        return self.momentum.current(self.average, a)

    def refresh(self) -> None:
        """Work after the step; the momentum moves with its coordinates."""
        if self.handled:
            kept = [self.average[name] for name in ("m", "clean") if name in self.average] if self.keeps_cotangents else []
            self.acting.refresh(self.state, kept)

    @property
    def keeps_cotangents(self) -> bool:
        """Whether the average is one of cotangents."""
        return self.momentum is not None and self.momentum.of == "cotangent"

    def damped(self, P: LinearMap, delta: float | None) -> LinearMap:
        """A map of the cell, damped as its preconditioner advises where a penalty says nothing."""
        return P.damped(self.preconditioner.advised_damping if delta is None else delta)

    def map(self, state: State) -> LinearMap:
        """P from ``state``, on one tensor for each leaf."""
        if not self.handled:
            return Identity(tuple(leaf.tensor for leaf in self.leaves))
        of_block = self.acting.map(state)
        return of_block if not isinstance(self.block, Stack) else OfMembers(of_block, self.block)
