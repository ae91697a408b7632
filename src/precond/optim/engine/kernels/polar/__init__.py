"""Polar's step in place, alone or in the coordinates of BNP or Whitening."""

from __future__ import annotations

from precond.algebra.precision import in_16_bits
from precond.optim.engine.cells import Cell
from precond.optim.engine.kernels.layer import layer_of
from precond.optim.engine.kernels.polar.large import LargeStep
from precond.optim.engine.kernels.polar.small import SmallStep
from precond.optim.engine.kernels.polar.step import PolarStep
from precond.optim.momentum import Momentum
from precond.optim.preconditioners import BNP, Composition, Polar, Preconditioner, Whitening
from precond.optim.preconditioners.polar_roots import root_of

_SMALL = 5 * 2**20  # AB² up to which an operation's own cost is more than what it multiplies
__all__ = ["PolarStep", "polar_step"]


def polar_step(cell: Cell, P: Preconditioner, momentum: Momentum | None, decay: float) -> PolarStep | None:
    """The kernel of a contiguous layer, alone or behind BNP or Whitening; or None."""
    outer, inner = (P.outer, P.inner) if isinstance(P, Composition) else (None, P)
    if not isinstance(inner, Polar) or momentum is None or momentum.of != "cotangent":
        return None
    if "clean" in cell.average or "m" not in cell.average:
        return None
    if inner.is_turned(cell.block):
        return None
    if not isinstance(outer, BNP | Whitening | None) or (isinstance(outer, BNP) and outer.width_scaling):
        return None
    layout = None if outer is None else layer_of(outer, cell.block)
    if outer is not None and layout is None:
        return None
    if not all(t.is_contiguous() for t in cell.block.tensors):
        return None
    weight = cell.block.tensors[0]
    rows, columns = len(weight), weight[0].numel()
    state = cell.state if outer is None else cell.state["inner"]
    whole, groups = root_of(state).whole, 1 if layout is None else layout.groups
    if whole and rows * columns**2 <= _SMALL:
        return SmallStep(inner, outer, momentum, decay, groups)
    if groups > 1:
        return None
    # Products with a few columns gain less from 16 bits than their small numbers, differences of large ones, would lose.
    halves = whole and inner.arithmetic == "bfloat16" and in_16_bits(weight)
    return LargeStep(inner, outer, momentum, decay, halves)
