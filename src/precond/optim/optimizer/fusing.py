"""When fused kernels take a step, and on what."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from precond.algebra.vec import Scalar, Tensors
from precond.optim.blocks import Leaf
from precond.optim.engine import fused
from precond.optim.engine.cells import Cell, Choice
from precond.optim.engine.kernels.entrywise import Kernel
from precond.optim.engine.loop import Rules
from precond.optim.regularizers import L2

Work = list[tuple[Kernel, Cell, Tensors, Tensors]]
"""(kernel, cell, parameters, gradients laid out as these)."""
_dtype = operator.attrgetter("dtype")


def kernels_of(
    cells: Sequence[Cell], choices: Sequence[Choice], rules: Rules, second: int | None
) -> list[Kernel | None] | None:
    """The fused kernel of each cell, or None for a cell that has none; None altogether where no cell can be stepped by itself.

    Args:
        second: the number of the regularizer whose gradient is found by a second pass, or None.
    """
    if not fusible(choices, rules, second):
        return None
    plain = [_without(choice, second) for choice in choices]
    return [fused.kernel(cell, [plain[leaf.group] for leaf in cell.leaves], rules) for cell in cells]


def fusible(choices: Sequence[Choice], rules: Rules, second: int | None) -> bool:
    """Whether cells can be stepped by themselves, as kernels do."""
    # With statistics of the regularized gradient the step after a probe is a plain step with that gradient.
    if second is not None and rules.statistics_from == "loss":
        return False
    # Other penalties, and a bound on the gradient's norm, may look at all parameters.
    others = (r for choice in choices for r in _without(choice, second).regularizers if not isinstance(r, L2))
    return not rules.reference and rules.max_norm is None and next(others, None) is None


def _without(choice: Choice, second: int | None) -> Choice:
    return replace(choice, regularizers=tuple(r for k, r in enumerate(choice.regularizers) if k != second))


def alike(cell: Cell, lr: Callable[[Leaf], Scalar], groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all leaves of a cell have one learning rate and one sign, as kernels take them."""
    of_group = cell.block.groups
    return len(of_group) == 1 or len({(float(lr(leaf)), groups[g]["maximize"]) for g, leaf in of_group.items()}) == 1


def divided(
    kernels: Sequence[Kernel | None],
    cells: Sequence[Cell],
    lr: Callable[[Leaf], Scalar],
    groups: Sequence[Mapping[str, Any]],
    gradients: Sequence[Tensor | None],
) -> tuple[Work, list[Cell]]:
    """What the kernels have to do, and the cells that are left to the reference engine.

    Args:
        gradients: one per leaf of the optimizer, None where there is none.
    """
    work: Work = []
    rest = []
    for cell, kernel in zip(cells, kernels, strict=True):
        grads = [gradients[i] for i in cell.index]
        g = [x for x in grads if x is not None]
        if not g:
            continue
        whole = len(g) == len(grads)
        if kernel is None or not (whole or cell.preconditioner.entrywise) or not alike(cell, lr, groups):
            rest.append(cell)
            continue
        if not whole:
            cell = cell.restricted(tuple(i for i, x in enumerate(grads) if x is not None))
        if cell.block.sharded:
            g = cell.block.local(g)
        p = cell.block.all_tensors
        laid_out = fused.aligned(g, p) if list(map(_dtype, g)) == cell.block.dtypes else None
        if laid_out is None:
            rest.append(cell)
        else:
            work.append((kernel, cell, p, laid_out))
    return work, rest
