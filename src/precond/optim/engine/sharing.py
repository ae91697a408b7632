"""Blocks divided among the ranks that share their parameters: each has an owner, who keeps its state and does its work for all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count, islice
from typing import Any

from torch import Tensor

from precond.algebra import vec
from precond.algebra.maps import LinearMap
from precond.algebra.memory import FRESH, Memory
from precond.algebra.vec import Scalar, Vec
from precond.optim.blocks import Block, Leaf, State, state_dtype
from precond.optim.engine import fused
from precond.optim.engine.asking import Asking
from precond.optim.engine.carried import Carried
from precond.optim.engine.cells import Cell, Choice
from precond.optim.engine.counting import count_on_host
from precond.optim.engine.kernels.entrywise import Kernel
from precond.optim.engine.kernels.layer import Task, take
from precond.optim.engine.looking import Looking
from precond.optim.engine.loop import Rules
from precond.optim.inputs import Request
from precond.optim.preconditioners.parts import Part
from precond.optim.preconditioners.split import Split
from precond.optim.ranks.exchange import Exchange
from precond.optim.ranks.pieces import Pieces


@dataclass
class Shared(Cell):
    """The cells of a group of ranks, each stepped by its owner, which the engine takes as one cell.

    Gradients come to their owners whole and steps go back in pieces, by one exchange each for all of them. Maps, penalties in z and
    second gradients go the same way. Every rank knows all cells and counts their steps; those of others have no state here.

    Attributes:
        inside: all cells, in the same order on every rank.
        owners: the rank in the group that owns each.
        exchange: of all their leaves, cell after cell.
        reference: no kernels: the reference.
        contents: of each cell (leaf, key, tensor) of all its state but the counts of steps; of others' cells the tensors have shapes alone.
    """

    inside: tuple[Cell, ...] = ()
    owners: tuple[int, ...] = ()
    exchange: Exchange = field(default_factory=lambda: Exchange((), (), ()), repr=False)
    reference: bool = False
    contents: tuple[Sequence[tuple[Leaf, str, Tensor]], ...] = field(default=(), repr=False)
    _kernels: dict[int, Kernel | None] = field(default_factory=dict, repr=False)
    _settled: set[int] = field(default_factory=set, repr=False)
    _looking: Looking = field(default_factory=Looking, repr=False)
    _memory: Memory = field(default_factory=Memory, repr=False)
    asking: Asking = field(default_factory=lambda: Asking((), ()), repr=False)

    @classmethod
    def of(cls, cells: Sequence[Cell], owners: Sequence[int], leaves: Sequence[Leaf], reference: bool, **more: Any) -> Shared:
        """The cells of a group of ranks.

        Args:
            leaves: theirs, cell after cell, as this process holds them.
        """
        every = [owner for cell, owner in zip(cells, owners, strict=True) for _ in cell.index]
        pieces = [leaf.pieces for leaf in leaves]
        assert all(isinstance(p, Pieces) for p in pieces)
        exchange = Exchange([leaf.shape for leaf in leaves], pieces, every)  # type: ignore[arg-type]
        block = Block(tuple(leaves))
        own = {f"#{k}": cell.state for k, cell in enumerate(cells) if owners[k] == exchange.rank}
        return cls(
            index=tuple(i for cell in cells for i in cell.index),
            block=block,
            preconditioner=_together(cells),
            momentum=None,
            state=State(block, own, step=tuple(t for cell in cells for t in cell.state["step"])).seal(),
            average=State(block),
            inside=tuple(cells),
            owners=tuple(owners),
            exchange=exchange,
            reference=reference,
            **{"asking": Asking(cells, owners)} | more,
        )

    @property
    def cells(self) -> Sequence[Cell]:
        return self.inside

    @cached_property
    def in_place(self) -> bool:
        """Whether owners may step their parameters as one process does, and send them: all ranks hold them whole, in their own precision."""
        plain = all(leaf.shard is None and leaf.param.dtype == state_dtype(leaf.param.dtype) for leaf in self.block.leaves)
        return plain and self.exchange.copied and not self.reference

    @property
    def here(self) -> Sequence[Cell]:
        return self.own if self.in_place else (self,)

    @cached_property
    def own(self) -> Sequence[Cell]:
        return [self.inside[k] for k in self.mine]

    @property
    def joint(self) -> list[int]:
        return [n for cell in self.inside for n in cell.joint]

    @cached_property
    def mine(self) -> list[int]:
        """The numbers of the cells that this rank owns."""
        return [k for k, owner in enumerate(self.owners) if owner == self.exchange.rank]

    @cached_property
    def theirs(self) -> list[int]:
        """The numbers of the cells that others own."""
        return [k for k, owner in enumerate(self.owners) if owner != self.exchange.rank]

    @cached_property
    def spans(self) -> list[tuple[int, ...]]:
        """The positions of each cell's leaves."""
        assert isinstance(self.preconditioner, Split)
        return [part.index for part in self.preconditioner.parts]

    @property
    def elsewhere(self) -> list[tuple[Leaf, str, Tensor]]:
        """``contents`` of the cells that other ranks own."""
        return [entry for k in self.theirs for entry in self.contents[k]]

    def renumber(self) -> None:
        """Follow numbers that have changed in the cells' strategies."""
        self.preconditioner, self._kernels, self._views = _together(self.inside), {}, {}
        self.asking = Asking(self.inside, self.owners)

    def taking(self, has: Sequence[bool]) -> Cell:
        if all(has):
            return self
        keep = tuple(k for k, span in enumerate(self.spans) if any(has[i] for i in span))
        if len(keep) == len(self.inside):
            return self
        if keep not in self._views:
            cells, owners = [self.inside[k] for k in keep], [self.owners[k] for k in keep]
            leaves = [self.block.leaves[i] for k in keep for i in self.spans[k]]
            also = {name: getattr(self, name) for name in ("_kernels", "_settled", "_looking", "asking", "_memory")}
            self._views[keep] = Shared.of(cells, owners, leaves, self.reference, **also)
        return self._views[keep]

    # --- to owners and back ------------------------------------------------------------------------------------------------

    def gather(self, v: Vec, memory: Memory = FRESH) -> dict[int, Vec]:
        """The whole vectors of this rank's cells, from every rank's pieces."""
        whole = self.exchange.collect(dict(enumerate(v)), memory)
        return {k: tuple(whole[i] for i in self.spans[k]) for k in self.mine}

    def scatter(self, wholes: Mapping[int, Vec], like: Vec, last: bool = False) -> Vec:
        """The inverse of :meth:`gather`, from every rank's cells.

        Args:
            last: whether it is what a step has made: with it goes what owners want to be observed for the next.
        """
        tensors = {i: t for k, v in wholes.items() for i, t in zip(self.spans[k], v, strict=True)}
        deliver = partial(self.exchange.deliver, tensors, dict(enumerate(like)))
        found = self.asking.along(partial(deliver, memory=self._memory)) if last else deliver()[0]
        return tuple(found[i] for i in range(len(like)))

    # --- what a cell does ----------------------------------------------------------------------------------------------------

    def observe(self, state: State, gradient: Vec) -> None:
        whole = self.gather(gradient)
        with self._looking.at(self, state):
            for k in self.mine:
                self.inside[k].observe(state[f"#{k}"], whole[k])

    def ahead(self, gradient: Vec, lagged: bool) -> State:
        if lagged and min(self.state.steps) > 0:
            return self.state
        whole, mine = self.gather(gradient), {f"#{k}": k for k in self.mine}
        state = State(self.block, {key: value for key, value in self.state.items() if key not in mine}).ahead()
        with self._looking.at(self, state):
            state |= {key: self.inside[k].ahead(whole[k], lagged) for key, k in mine.items()}
        return state

    def descent(self, a: Vec, least: Sequence[Scalar] = (), fold: bool = True) -> Vec:
        whole, spans = self.gather(a), self.spans
        own = {k: self.inside[k].descent(whole[k], [least[i] for i in spans[k]] if least else (), fold) for k in self.mine}
        return self.scatter(own, a)

    def taken(self, g: Vec) -> Vec:
        whole = self.gather(g, self._memory)
        with self._looking.at(self, self.state):
            own, tasks = {}, []
            for k in self.mine:
                cell = self.inside[k]
                if (kernel := self._acting(cell)) is None:
                    own[k] = cell.taken(whole[k])
                    continue
                own[k] = self._memory.zeros(k, cell.block.all_tensors)  # what a kernel makes of zeros is the step
                tasks.append(Task(kernel, cell, own[k], fused.aligned(whole[k], own[k]) or (), -1.0, False))
            take(tasks)
            self._settled.update(id(task.cell) for task in tasks)
        return self.scatter(own, g, last=True)

    def spread(self, has: Sequence[bool]) -> None:
        """After each owner has stepped its cells in place: their parameters to all ranks, which count the step.

        Args:
            has: of each leaf, whether it has a gradient.
        """
        if not any(has):
            return
        cell = self.taking(has)
        assert isinstance(cell, Shared)
        count_on_host([cell.inside[k].state for k in cell.theirs])
        p = cell.block.tensors
        found = cell.scatter({k: tuple(p[i] for i in cell.spans[k]) for k in cell.mine}, p, last=True)
        theirs = [i for k in cell.theirs for i in cell.spans[k]]
        vec.copy_(tuple(p[i] for i in theirs), tuple(found[i] for i in theirs))

    def _acting(self, cell: Cell) -> Kernel | None:
        """The kernel of a cell, where it has one and needs not look at the parameters in the step in progress."""
        P = cell.preconditioner
        return self._kernel(cell) if not P.looks(max(cell.state.steps)) or P.settled(cell.state) else None

    def _kernel(self, cell: Cell) -> Kernel | None:
        if id(cell) not in self._kernels:
            plain = Choice(cell.preconditioner, cell.momentum)
            self._kernels[id(cell)] = None if self.reference else fused.kernel(cell, [plain] * len(cell.leaves), Rules())
        return self._kernels[id(cell)]

    def refresh(self) -> None:
        for k in self.mine:
            if id(self.inside[k]) not in self._settled:
                self.inside[k].refresh()
        self._settled.clear()

    def map(self, state: State) -> LinearMap:
        return Carried(self, {k: self.inside[k].map(state[f"#{k}"]) for k in self.mine})

    def damped(self, P: LinearMap, delta: float | None) -> LinearMap:
        assert isinstance(P, Carried)
        return Carried(self, {k: self.inside[k].damped(m, delta) for k, m in P.maps.items()})

    def wanted(self) -> Iterable[tuple[str, Request, Tensor | None]]:
        """What owners want to be observed, told to all ranks: a flag of each site, and the mean known before."""
        return self.asking()


def _together(cells: Sequence[Cell]) -> Split:
    positions = count()
    return Split(tuple(Part(tuple(islice(positions, len(cell.index))), cell.preconditioner) for cell in cells))
