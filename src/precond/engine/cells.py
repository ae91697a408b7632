"""Cells: a block of leaves with the strategies that step it and the state they keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from precond.blocks import Block, Leaf, State, within
from precond.inputs.observer import Seen
from precond.maps import Identity, LinearMap
from precond.momentum import Momentum
from precond.preconditioners.base import Preconditioner
from precond.preconditioners.base import Seen as Evidence
from precond.regularizers.base import Regularizer
from precond.sharding import local
from precond.vec import Tensors, Vec


@dataclass(frozen=True)
class Choice:
    """The frozen strategies of one parameter group."""

    preconditioner: Preconditioner
    momentum: Momentum | None = None
    regularizers: tuple[Regularizer, ...] = ()


@dataclass
class Cell:
    """A block, the strategies in force for it, and its state (views of the optimizer's own state tensors).

    Attributes:
        index: positions of the block's leaves among all leaves.
        inputs: what was seen of layer inputs since the last step, or None.
    """

    index: tuple[int, ...]
    block: Block
    preconditioner: Preconditioner
    momentum: Momentum | None
    state: State
    average: State
    inputs: Seen | None = None
    _views: dict[tuple[int, ...], Cell] = field(default_factory=dict, repr=False)
    _handled: tuple[Preconditioner, bool] | None = field(default=None, repr=False)

    @property
    def handled(self) -> bool:
        """Whether the preconditioner in force acts on the block."""
        if self._handled is None or self._handled[0] is not self.preconditioner:
            self._handled = self.preconditioner, self.preconditioner.handles(self.block)
        return self._handled[1]

    def restricted(self, keep: tuple[int, ...]) -> Cell:
        """The cell on some of its leaves, for a step in which the others have no gradient."""
        if keep not in self._views:
            self._views[keep] = Cell(
                tuple(self.index[i] for i in keep),
                self.block.subset(keep),
                self.preconditioner,
                self.momentum,
                self.state.restricted(keep),
                self.average.restricted(keep),
            )
        view = self._views[keep]
        view.preconditioner, view.momentum, view.inputs = self.preconditioner, self.momentum, self.inputs
        return view

    def observe(self, state: State, gradient: Vec) -> None:
        """Fold a gradient into ``state`` (the cell's own, or a copy of it)."""
        if self.handled:
            momentum = self._clean_momentum(state, gradient)
            position = lambda: tuple(p.detach().to(g.dtype) for p, g in zip(state.block.tensors, gradient, strict=True))  # noqa: E731
            seen = Evidence(gradient, self.inputs, momentum, position)
            self.preconditioner.observe(state, seen)

    def _clean_momentum(self, state: State, gradient: Vec) -> Vec | None:
        """The momentum of the clean gradient after the step in progress, where the map is made of it.

        It is the step's own, as it will be, unless regularizers add to the gradient: then it is an average of its own, ``clean``,
        which moves with the cell's own state.
        """
        if not self.preconditioner.uses_momentum or self.momentum is None or self.momentum.of != "cotangent":
            return None
        kept = self.average.get("clean", self.average.get("m"))
        own = State(state.block, {} if kept is None else {"m": kept}, step=state["step"])
        if state is not self.state or "clean" not in self.average:
            own = own.copied()
        self.momentum.fold(own, gradient)
        return self.momentum.current(own, gradient)

    def factors(self) -> tuple[LinearMap, LinearMap]:
        """(F, N) with P = F N; the momentum of cotangents is kept in the coordinates of F."""
        return self.preconditioner.factors(self.state) if self.handled else (Identity(), Identity(self.block.tensors))

    def averaged(self, a: Vec, of: str, fold: bool = True) -> Vec:
        """The momentum of cotangents (in the coordinates of F) or of tangents with a folded in; a itself where it is of the other."""
        if self.momentum is None or self.momentum.of != of:
            return a
        if fold:
            self.momentum.fold(self.average, a)
        return self.momentum.current(self.average, a)

    def refresh(self) -> None:
        """Work after the step; the momentum moves with its coordinates."""
        if self.handled and (change := self.preconditioner.refresh(self.state)) is not None and self.keeps_cotangents:
            for name in ("m", "clean"):
                if name in self.average:
                    for kept, moved in zip(self.average[name], change.mv(self.average[name]), strict=True):
                        kept.copy_(moved)

    @property
    def keeps_cotangents(self) -> bool:
        """Whether the average is one of cotangents."""
        return self.momentum is not None and self.momentum.of == "cotangent"

    def map(self, state: State) -> LinearMap:
        """P from ``state``."""
        return self.preconditioner.map(state) if self.handled else Identity(self.block.tensors)


def build(
    leaves: Sequence[Leaf],
    live: Sequence[int],
    choices: Sequence[Choice],
    existing: Mapping[Tensor, dict[str, Any]],
    outside: Callable[[str], str],
    clean: bool = True,
) -> tuple[list[Cell], list[tuple[Leaf, str, Tensor]]]:
    """Cells for the leaves at the positions ``live``, which want gradients, and their state entries (leaf, key, tensor).

    ``clean``: statistics are of the clean gradient, whatever regularizers add to what is descended.
    State tensors that ``existing`` holds already, of the same shape, under their names ``outside``, are taken over as they are.
    """
    cells, entries = [], []
    for index, preconditioner, momentum in strategies(leaves, live, choices):
        block = Block(tuple(leaves[i] for i in index))
        if block.sharded and preconditioner.needs == "block":
            raise ValueError(
                f"{type(preconditioner).__name__} acts on {block.name!r} as a whole, of which each process holds a part: use "
                "RMS, AdaGrad, BNP, Whitening or compositions of them, or leave the parameters out of sharding (ignored_params)"
            )
        state = State(block, preconditioner.init(block) if preconditioner.handles(block) else {})
        average = State(block, momentum.init(block) if momentum is not None else {})
        regularizers = choices[block.leaves[0].group].regularizers
        if clean and "m" in average and preconditioner.uses_momentum and any(r.joins_gradient for r in regularizers):
            average["clean"] = block.zeros()
        steps = tuple(as_count(existing.get(leaf.param, {}).get("step")) for leaf in block.leaves)
        for s in (state, average):
            _adopt(s, existing, steps, outside)
            entries += list(s.entries())
        entries += [(leaf, "step", t) for leaf, t in zip(block.leaves, steps, strict=True)]
        cells.append(Cell(index, block, preconditioner, momentum, state.seal(), average))
    return cells, entries


def strategies(
    leaves: Sequence[Leaf], live: Sequence[int], choices: Sequence[Choice]
) -> list[tuple[tuple[int, ...], Preconditioner, Momentum | None]]:
    """(positions, preconditioner, momentum) of each block; the numbers are those of its first leaf's group."""
    chosen = [leaves[i] for i in live]
    plans = [c.preconditioner.partition(chosen) for c in choices]
    out = []
    taken: set[int] = set()
    # Numbers of a group may decide what is a block, a limit of length, say: each group takes its own plan's.
    for group, plan in enumerate(plans):
        for part in plan:
            if chosen[part.index[0]].group == group:
                momentum = choices[group].momentum if part.preconditioner.momentum is None else part.preconditioner.momentum
                out.append((tuple(live[i] for i in part.index), part.preconditioner, momentum))
                if twice := taken.intersection(part.index):
                    raise _disagree(chosen[min(twice)])
                taken.update(part.index)
    if missed := set(range(len(chosen))) - taken:
        raise _disagree(chosen[min(missed)])
    return out


def _disagree(leaf: Leaf) -> ValueError:
    return ValueError(
        f"the groups of {leaf.name!r} and of the rest of its layer differ in a number that decides what is stepped jointly "
        "(max_dim, max_inputs); give both groups one value"
    )


_NARROW = 2**23
"""Counts of steps from here on are in float64: in float32, as torch.optim keeps them, 2²⁴ + 1 is 2²⁴."""


def as_count(known: Any) -> Tensor:
    """A count of steps, from one that is known; None: 0."""
    # On the host, as torch keeps it: reading it never waits for a device.
    steps = torch.as_tensor(0.0 if known is None else known, device="cpu")
    return steps.to(torch.float64 if steps >= _NARROW else torch.float32)


def count_step(steps: Tensors) -> None:
    """Count a step of each leaf, in place."""
    # Those that were more than 2²³ ahead of the first are wide since they were bound.
    if steps and steps[0].dtype == torch.float32 and steps[0].item() >= _NARROW - 1:
        for t in steps:
            t.data = t.to(torch.float64)
    torch._foreach_add_(steps, 1)


def _adopt(
    state: State, existing: Mapping[Tensor, dict[str, Any]], steps: Vec, outside: Callable[[str], str], prefix: str = ""
) -> None:
    """Put known tensors in place of fresh ones, and the step counts of the leaves into every part."""
    by_leaf = dict(zip(state.block.leaves, steps, strict=True)) if steps else {}
    for key, value in list(state.items()):
        if isinstance(value, State):
            _adopt(value, existing, tuple(by_leaf[leaf] for leaf in value.block.leaves), outside, prefix + within(key))
        else:
            fresh = value if isinstance(value, tuple) else (value,)
            kept = []
            for leaf, tensor in zip(state.block.leaves, fresh, strict=False):
                known = existing.get(leaf.param, {}).get(outside(prefix + key))
                mine = local(known) if isinstance(known, Tensor) else tensor
                # The parameter may have been converted since, or moved.
                kept.append(mine.to(tensor) if mine.shape == tensor.shape else tensor)
            state[key] = tuple(kept) if isinstance(value, tuple) else kept[0]
    state["step"] = steps
