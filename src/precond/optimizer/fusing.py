"""When fused kernels take a step, and on what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from precond.blocks import Leaf
from precond.engine import fused
from precond.engine.cells import Cell, Choice
from precond.engine.fused import Kernel
from precond.engine.loop import Rules
from precond.vec import Scalar, Tensors

Work = list[tuple[Kernel, Cell, Tensors]]
"""(kernel, cell, gradients laid out as the parameters)."""


def kernels_of(cells: Sequence[Cell], choices: Sequence[Choice], rules: Rules, second: int | None) -> list[Kernel] | None:
    """The fused kernel of each cell, or None where some cell has none.

    Args:
        second: the number of the regularizer whose gradient is found by a second pass, or None.
    """
    # With statistics of the regularized gradient the step after a probe is a plain step with that gradient.
    if second is not None and rules.statistics_from == "loss":
        return None
    kernels = []
    for cell in cells:
        mine = [_without(choices[leaf.group], second) for leaf in cell.block.leaves]
        if (kernel := fused.kernel(cell, mine, rules)) is None:
            return None
        kernels.append(kernel)
    return kernels


def _without(choice: Choice, second: int | None) -> Choice:
    return replace(choice, regularizers=tuple(r for k, r in enumerate(choice.regularizers) if k != second))


def alike(cells: Sequence[Cell], lr: Callable[[Leaf], Scalar], groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all leaves of each cell have one learning rate and one sign, as kernels take them."""
    for cell in cells:
        of_group = {leaf.group: leaf for leaf in cell.block.leaves}
        if len(of_group) > 1 and len({(float(lr(leaf)), groups[g]["maximize"]) for g, leaf in of_group.items()}) > 1:
            return False
    return True


def work_of(kernels: Sequence[Kernel], cells: Sequence[Cell]) -> Work | None:
    """What the kernels have to do with the gradients in ``.grad``; None where they cannot."""
    work: Work = []
    for cell, kernel in zip(cells, kernels, strict=True):
        grads = cell.block.gradients
        g = [x for x in grads if x is not None]
        if not g:
            continue
        if len(g) < len(grads):
            if not cell.preconditioner.entrywise:
                return None
            cell = cell.restricted(tuple(i for i, x in enumerate(grads) if x is not None))
        if any(x.is_sparse or x.dtype != p.dtype for x, p in zip(g, cell.block.tensors, strict=True)):
            return None
        work.append((kernel, cell, fused.aligned(g, cell.block.tensors)))
    return work
