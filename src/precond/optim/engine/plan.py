"""From leaves and the strategies of their groups to cells: which leaves are stepped jointly, and which blocks side by side."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from precond.optim.blocks import COUNTS, Block, Leaf, Stack, State
from precond.optim.blocks.memory import stacked
from precond.optim.blocks.stacking import side_by_side
from precond.optim.engine.adoption import Existing, adopt, lacking, named
from precond.optim.engine.cells import Cell, Choice
from precond.optim.engine.counting import as_count, count_together
from precond.optim.engine.fused import has_kernel, stacked_from
from precond.optim.engine.ownership import Placement, Unit, Whole, assign_owners, units
from precond.optim.engine.sharing import Shared
from precond.optim.preconditioners.each import stackable, takes_stacks

Entries = list[tuple[Leaf, str, Tensor]]
"""(leaf, key, tensor) of state."""


def build(
    leaves: Sequence[Leaf],
    live: Sequence[int],
    choices: Sequence[Choice],
    existing: Existing,
    outside: Callable[[str], str],
    reference: bool = False,
    clean: bool = True,
    owners: dict[Tensor, int] | None = None,
    there: Callable[[Leaf], torch.device | None] = lambda leaf: None,
    kernels: bool = True,
) -> tuple[list[Cell], Entries]:
    """Cells for the leaves at the positions ``live``, which want gradients, and their state entries (leaf, key, tensor).

    Of a block that another rank owns the entries are empty tensors.

    Args:
        existing: whose tensors, of the same shape, are taken over as they are.
        outside: our names of state tensors → those in ``existing``.
        reference: every block alone.
        clean: statistics are of the clean gradient, whatever regularizers add to what is descended.
        owners: who owns which parameters' blocks; completed here.
        there: the device that counts a leaf's steps; None: the host does.
        kernels: whether kernels may step cells: blocks that have one are not stacked then.
    """

    cells: list[Cell] = []
    entries: Entries = []
    shared: dict[Any, list[tuple[Cell, int, Entries]]] = {}
    whole = Whole(leaves)
    found = units(leaves, live, choices, whole)
    placements = assign_owners(found, leaves, {} if owners is None else owners)
    singles = [
        _Single.of(unit, leaves, choices, existing, outside, clean, kernels, placement, whole)
        for unit, placement in zip(found, placements, strict=True)
    ]
    for alike in [[single] for single in singles] if reference else _alike(singles):
        first, index = alike[0], tuple(i for single in alike for i in single.unit.index)
        preconditioner, momentum, block = first.unit.preconditioner, first.unit.momentum, first.block
        state, average = first.state, first.average
        if first.elsewhere:
            own = [entry for s in alike for entry in (*s.state.entries(), *s.average.entries())]
            entries += [(leaf, key, t.new_empty(0)) for leaf, key, t in own]
            block = block if len(alike) == 1 else Stack.of([single.block for single in alike])
            state, average = State(block, step=tuple(t for s in alike for t in s.state["step"])), State(block, step=())
        else:
            if len(alike) > 1 or first.stacks:
                block = Stack.of([single.block for single in alike])
                state, average = (side_by_side([getattr(s, name) for s in alike], block) for name in ("state", "average"))
            own = [*state.entries(), *average.entries()]
            entries += own
        # Where ranks step for each other the host counts, on all of them.
        count_together([state, average], there(first.block.leaves[0]) if first.placement is None else None)
        cell = Cell(index, block, preconditioner, momentum, state.seal(), average)
        entries += [(leaf, "step", t) for leaf, t in zip(cell.leaves, state.get("clock", state["step"]), strict=True)]
        if first.placement is None:
            cells.append(cell)
        else:
            # An owner's stack has them key by key, the others know of them block by block: one order, in which they are sent.
            own = sorted(own, key=lambda entry: (entry[0].name, entry[1]))
            shared.setdefault(first.placement.exchange, []).append((cell, first.placement.owner, own))
    for together in shared.values():
        inside, ranks, contents = zip(*together, strict=True)
        held = [leaves[i] for cell in inside for i in cell.index]
        cells.append(Shared.of(inside, ranks, held, reference, contents=contents))
    return cells, entries


def unchanged(
    cells: Iterable[Cell], units: Mapping[tuple[int, ...], Unit], choices: Sequence[Choice], before: Sequence[Choice]
) -> bool:
    """Whether the blocks of cells have the strategies of these units, and regularizers are what they were."""
    return [c.regularizers for c in choices] == [c.regularizers for c in before] and all(
        (units[index].preconditioner, units[index].momentum) == (cell.preconditioner, cell.momentum)
        for cell in cells
        for index in cell.members
    )


@dataclass
class _Single:
    """A unit with its block and state, before it is known which are alike.

    Attributes:
        stacks: whether its methods take stacks, also one of a single block.
        placement: who steps it, where ranks share it.
        enough: how many alike make a stack; fewer are stepped by the kernel of each.
    """

    unit: Unit
    block: Block
    state: State
    average: State
    stacks: bool
    key: tuple[Any, ...]
    placement: Placement | None = None
    enough: float = 0

    @property
    def elsewhere(self) -> bool:
        """Whether another rank steps it."""
        return self.placement is not None and not self.placement.here

    @classmethod
    def of(
        cls,
        unit: Unit,
        leaves: Sequence[Leaf],
        choices: Sequence[Choice],
        existing: Existing,
        outside: Callable[[str], str],
        clean: bool,
        kernels: bool,
        placement: Placement | None,
        whole: Whole,
    ) -> _Single:
        P = unit.preconditioner
        block = whole.block(P, [leaves[i] for i in unit.index])
        handled = P.handles(block)
        state = State(block, P.init(block) if handled else {})
        average = State(block, unit.momentum.init(block) if unit.momentum is not None else {})
        regularizers = choices[block.leaves[0].group].regularizers
        if clean and "m" in average and P.uses_momentum and any(r.joins_gradient for r in regularizers):
            average["clean"] = block.zeros()
        anew = lacking(state, existing, outside, named(P, "second_moments"))
        existing = {leaf.param: existing.get(leaf.param, {}) for leaf in block.leaves if leaf not in anew}
        steps = tuple(as_count(existing.get(leaf.param, {}).get("step")) for leaf in block.leaves)
        for s in (state, average):
            adopt(s, existing, steps, outside, named(P, "optional"))
        enough = stacked_from(P, block) if kernels and has_kernel(P, block) else 0
        # Means over the entries of a stack are of what this process holds: what others hold parts of stays a block.
        apart = not handled or block.sharded or enough == math.inf or not stackable(P)
        if placement is not None and not placement.here:
            state, average = state.hollow(), average.hollow()
        key = (
            id(block) if apart or P.entrywise else None,
            placement,
            tuple((tuple(leaf.shape), leaf.param.dtype, leaf.param.device) for leaf in block.leaves),
            # Members of a stack are at one step, and have or have not a gradient together.
            tuple(float(t) for t in steps),
            any(leaf.param.grad is not None for leaf in block.leaves),
            P.kind(block) if handled else None,
            tuple(_structure(state)),
            tuple(_structure(average)),
        )
        return cls(unit, block, state, average, not (apart or enough) and takes_stacks(P), key, placement, enough)


def _alike(singles: Sequence[_Single]) -> Iterator[list[_Single]]:
    """Those that one stack may hold, in the order of their first ones, and no more than scratch memory is for."""
    sets: list[list[_Single]] = []
    by_key: dict[tuple[Any, ...], list[list[_Single]]] = {}
    counted = Counter(single.key for single in singles)
    for single in singles:
        if counted[single.key] < single.enough:
            sets.append([single])
            continue
        same = by_key.setdefault(single.key, [])
        for found in same:
            first, size = found[0], sum(t.numel() * t.element_size() for t in single.block.tensors)
            fits = (len(found) + 1) * size <= stacked(first.block.tensors[0].device)
            if fits and first.unit.preconditioner == single.unit.preconditioner and first.unit.momentum == single.unit.momentum:
                found.append(single)
                break
        else:
            same.append([single])
            sets.append(same[-1])
    yield from sets


def _structure(state: State) -> Iterator[tuple[Any, ...]]:
    """Names, shapes and dtypes of a state."""
    for key, value in state.items():
        if isinstance(value, State):
            yield key, tuple(_structure(value))
        elif key not in COUNTS:
            yield key, tuple((tuple(t.shape), t.dtype) for t in (value if isinstance(value, tuple) else (value,)))
