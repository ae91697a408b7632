"""Looking at an optimizer: the P in force, and numbers of the last step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from precond.algebra import vec
from precond.algebra.maps import LinearMap
from precond.algebra.maps.widened import of_parameters
from precond.algebra.sharding import local
from precond.optim.blocks import Leaf
from precond.optim.engine import loop
from precond.optim.engine.cells import Cell
from precond.optim.engine.point import Point
from precond.optim.engine.sharing import Shared


@torch.no_grad()
def map_in_force(leaves: Sequence[Leaf], cells: Sequence[Cell], params: Iterable[Tensor] | None = None) -> LinearMap:
    """P aligned to ``params`` (None: all in order); see :meth:`precond.PreconditionedGD.map`."""
    wanted = [leaf.param for leaf in leaves] if params is None else list(params)
    place = {p: i for i, p in enumerate(wanted)}
    if alien := [tuple(p.shape) for p in wanted if p not in {leaf.param for leaf in leaves}]:
        raise ValueError(f"map: a parameter of shape {alien[0]} is not this optimizer's")
    stateful = any(len(cell.state) > 1 or isinstance(cell, Shared) for cell in cells)
    if cells and not any(max(cell.state.steps) for cell in cells) and stateful:
        raise RuntimeError("map: no gradient has been seen yet, of which P is made; take a step first")
    blocks = []
    for shared in (cell for cell in cells if isinstance(cell, Shared)):
        has = [leaf.param in place and t > 0 for leaf, t in zip(shared.leaves, shared.state.steps, strict=True)]
        chosen = shared.taking(has)
        if any(has):
            if cut := [leaf for leaf in chosen.leaves if leaf.param not in place]:
                raise _joint(cut[0].name)
            blocks.append(([place[leaf.param] for leaf in chosen.leaves], chosen.map(chosen.state)))
    own = [cell for cell in cells if not isinstance(cell, Shared)]
    for cell in [stack.member(k) for stack in own for k in range(len(stack.members))]:
        inside = tuple(i for i, leaf in enumerate(cell.leaves) if leaf.param in place)
        if not inside:
            continue
        if len(inside) < len(cell.index):
            if not cell.preconditioner.entrywise:
                raise _joint(cell.block.name)
            cell = cell.restricted(inside)
        if len(cell.state) > 1 and min(cell.state.steps) == 0:
            # What its first gradient will make of it is not known: until then it is left as it is.
            started = tuple(i for i, t in enumerate(cell.state.steps) if t)
            if not started or not cell.preconditioner.entrywise:
                continue
            cell = cell.restricted(started)
        blocks.append(([place[leaf.param] for leaf in cell.leaves], cell.map(cell.state)))
    return of_parameters(blocks, tuple(local(p).detach() for p in wanted))


def _joint(name: str) -> ValueError:
    return ValueError(f"map: the block {name!r} acts jointly; ask for all of its parameters")


@torch.no_grad()
def measure(point: Point, name: str, second: int | None, length: Callable[[], Tensor] | None) -> Tensor | float:
    """A number of the last step, from gradients and state as they are now: see :class:`precond.optim.optimizer.record.Record`.

    Args:
        second: the number of the regularizer that wants a second gradient, or None.
        length: gives |Δp| where the step knows it.
    """
    if not point.cells:
        return float("nan")
    match name:
        case "grad_norm":
            return point.sums.norm(point.g)
        case "preconditioned_grad_norm":
            return point.sums.dot(point.g, point.joined(point.maps()).gram(point.g)).clamp_min(0).sqrt()
        case "penalty":
            point.times = [t - 1 for t in point.times]
            regularizers = point.choices[0].regularizers
            return sum((r.value(point.at(k, point.maps)) for k, r in enumerate(regularizers)), start=0.0)
        case _:
            kept = second is None or all("m" in each.average for cell in point.cells for each in cell.cells)
            if length is None and not kept:
                return float("nan")
            moved = point.sums.norm(vec.scale(loop.last_update(point), point.lr)) if length is None else length()
            return moved / point.sums.norm(point.p)
