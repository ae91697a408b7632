"""Owners look at whole parameters, of which each rank holds a piece, for as long as their preconditioners ask for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from precond.algebra import collectives
from precond.optim.blocks import State, WholeLeaf

if TYPE_CHECKING:
    from precond.optim.engine.sharing import Shared


@dataclass
class Looking:
    """Which cells look at parameters in a step, as all ranks know alike.

    Attributes:
        begun: whether a step has been taken since the cells were made: in the first, owners look as in a first step.
        settled: the cells, by identity, that look no more.
    """

    begun: bool = False
    settled: set[int] = field(default_factory=set)

    @contextmanager
    def at(self, cell: Shared, state: State) -> Iterator[None]:
        """Owners see whole parameters inside, where their preconditioners may look at them in the step in progress, and tell
        all ranks afterwards which of these look at them no more."""
        if all(leaf.shard is None for leaf in cell.block.leaves):  # who steps them sees them
            yield
            return
        may = [k for k, x in enumerate(cell.inside) if id(x) not in self.settled]
        steps = state.steps if may and self.begun else [1] * len(cell.index)
        looks = [k for k in may if cell.inside[k].preconditioner.looks(max(steps[i] for i in cell.spans[k]))]
        wide = {i: cell.block.leaves[i].tensor.detach() for k in looks for i in cell.spans[k]}
        whole = cell.exchange.collect(wide) if wide else {}
        shown = []
        for k in cell.mine:
            for i, leaf in zip(cell.spans[k], cell.inside[k].leaves, strict=True):
                if i in whole:
                    assert isinstance(leaf, WholeLeaf)
                    leaf.shown.append(whole[i])
                    shown.append(leaf)
        try:
            yield
            if looks and state is cell.state:
                self._tell(cell, looks)
        finally:
            for leaf in shown:
                leaf.shown.clear()
            self.begun |= state is cell.state

    def _tell(self, cell: Shared, looks: Sequence[int]) -> None:
        """Owners to all ranks: which of some cells look at parameters no more."""
        of = [[cell.inside[k] for k in looks if cell.owners[k] == r] for r in range(cell.exchange.size)]
        mine = [float(x.preconditioner.settled(x.state)) for x in of[cell.exchange.rank]]
        flags = cell.block.tensors[0].new_tensor(mine)
        every = collectives.all_gather_v(flags, list(map(len, of)), "who looks at parameters", cell.exchange.group)
        for own, told in zip(of, every, strict=True):
            self.settled.update(id(x) for x, settled in zip(own, told.tolist(), strict=True) if settled)
