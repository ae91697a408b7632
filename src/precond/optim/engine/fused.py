"""torch's fused kernels, each keyed by the whole frozen configuration of a cell that it computes.

They read every tensor once. What they cannot do takes :mod:`precond.optim.engine.loop`, which they are tested against.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from precond.algebra.maps import Scaled
from precond.algebra.vec import Scalar, Tensors
from precond.optim.blocks import Block, Stack
from precond.optim.blocks.memory import ONE_CALL
from precond.optim.checking import contracts
from precond.optim.engine.cells import Cell, Choice
from precond.optim.engine.kernels.adam_in_coordinates import adam_in_coordinates
from precond.optim.engine.kernels.bnp import bnp_step
from precond.optim.engine.kernels.entrywise import SGD, Adam, Decay, Kernel, entrywise
from precond.optim.engine.kernels.polar import polar_step
from precond.optim.engine.loop import Rules
from precond.optim.momentum import Momentum
from precond.optim.preconditioners import BNP, RMS, Composition, Fixed, Polar, Preconditioner, RelativeRMS, Whitening
from precond.optim.preconditioners.seen import Seen
from precond.optim.regularizers import L2


def kernel(cell: Cell, choices: Sequence[Choice], rules: Rules) -> Kernel | None:
    """The kernel that computes exactly this configuration, or None; on processors :class:`Taken` where penalties are no more than decay.

    Args:
        choices: of each leaf of the cell. Where a layer's weight and bias decay differently, in z, the decay is P(2λP⁻¹p) and moves
            both: there is no kernel for that.
    """
    if (decay := _decay_alone(cell.block, choices, rules)) is None:
        return None
    on_cpu = all(t.device.type == "cpu" for t in cell.block.tensors)
    if not on_cpu and not all(t.device.type in _get_fused_kernels_supported_devices() for t in cell.block.tensors):
        return None
    if on_cpu and (found := _of_layer(cell, decay) or _within(cell, decay)) is not None:
        return found
    found = None if isinstance(cell.block, Stack) else _entrywise(cell, decay)
    if found is not None or not on_cpu or decay.coupled:
        return found
    rates = {choice.preconditioner.lr_scale(leaf) for leaf, choice in zip(cell.leaves, choices, strict=True)}
    return Taken(decay.decoupled) if len(rates) == 1 else None


def _entrywise(cell: Cell, decay: Decay) -> Kernel | None:
    """torch's own, or None."""
    P, momentum = cell.preconditioner, _momentum(cell)
    if not cell.handled:
        P = Fixed()
    if isinstance(P, Composition) and isinstance(P.outer, Fixed) and P.entrywise:
        found = entrywise(P.inner, momentum, decay)
        return None if found is None else _OfInner(found)
    return entrywise(P, momentum, decay)


def _decay_alone(block: Block, choices: Sequence[Choice], rules: Rules) -> Decay | None:
    """The one decay of all leaves of a block of plain tensors, which is all that is added to a step; None where there is more."""
    decay, *others = dict.fromkeys(_decay(choice, rules) for choice in choices)
    plain = all(t.dtype in (torch.float32, torch.float64) and _dense(t) for t in block.all_tensors)
    return None if others or rules.max_norm is not None or not plain else decay


@dataclass(frozen=True)
class Taken:
    """p ← (1 − αλ)p − αu with the u that a cell takes, where penalties are no more than decay: the loop's step without what serves others.

    Attributes:
        decay: λ.
    """

    decay: float

    def __call__(self, cell: Cell, p: Tensors, g: Tensors, lr: Scalar, maximize: bool) -> None:
        lr = float(lr)
        u = cell.taken(tuple(torch._foreach_neg(g) if maximize else g))
        contracts.shapes("the step P Pᵀg", u, tuple(p))
        if self.decay:  # p ← p − α(u + λp): one pass over memory
            SGD(0.0, False, Decay(self.decay))(cell, p, aligned(u, p) or (), lr, False)
        else:
            torch._foreach_add_(p, u, alpha=-lr)
        cell.refresh()


@dataclass(frozen=True)
class _OfInner:
    """The kernel of the inner one of a composition, where the outer one leaves everything as it is."""

    of: Kernel

    def __call__(self, cell: Cell, p: Tensors, g: Tensors, lr: Scalar, maximize: bool, found_inf: Tensor | None = None) -> None:
        self.of(replace(cell, state=cell.state["inner"]), p, g, lr, maximize, found_inf)


def _momentum(cell: Cell) -> Momentum | None:
    """The momentum, where there is one to keep."""
    kept = cell.momentum
    return None if kept is not None and not kept.beta and kept.kind != "ema" else kept


def _maker(P: Preconditioner) -> Callable[[Cell, Momentum | None, float], Kernel | None] | None:
    """What makes the kernel of one layer on a processor, for the few preconditioners whose kernels pay (``benchmarks/kernels.py``)."""
    match P:
        case BNP():
            return lambda cell, momentum, decay: bnp_step(cell, P, momentum, decay)
        case Composition(outer=BNP() | Whitening() as outer, inner=RMS() as inner):
            return lambda cell, momentum, decay: adam_in_coordinates(cell, outer, inner, momentum, decay)
        case Polar() | Composition(outer=BNP() | Whitening(), inner=Polar()):
            return lambda cell, momentum, decay: polar_step(cell, P, momentum, decay)
    return None


def has_kernel(P: Preconditioner, block: Block) -> bool:
    """Whether a layer may be stepped by a kernel of its own, where it is on a processor."""
    return _maker(P) is not None and all(t.device.type == "cpu" for t in block.tensors)


def stacked_from(P: Preconditioner, block: Block) -> float:
    """From how many layers alike on one call for all costs less than the kernel of each (``benchmarks/kernels.py``); ∞: never.

    Of BNP from 8 layers on a stack takes 0.5 to 0.8 of the time, with RMS inside from 4 on 0.3 to 0.75, where a layer is of 64×64 at most;
    of 128×128 it takes as long. Polar's kernel takes other roots than a stack, and stays.
    """
    if sum(t.numel() * t.element_size() for t in block.tensors) > ONE_CALL:
        return math.inf
    match P:
        case BNP():
            return 8
        case Composition(inner=RMS()):
            return 4
    return math.inf


def _of_layer(cell: Cell, decay: Decay) -> Kernel | None:
    """The kernel of one layer on a processor, or None."""
    make = _maker(cell.preconditioner)
    if make is None or decay.coupled or not cell.handled or isinstance(cell.block, Stack):
        return None
    return make(cell, _momentum(cell), decay.decoupled)


def _within(cell: Cell, decay: Decay) -> Kernel | None:
    """Adam's kernel in the coordinates of a map, where the cell's preconditioner is of that form, or None."""
    unfit = decay.coupled or not cell.handled or cell.preconditioner.entrywise
    found = None if unfit else cell.preconditioner.rms
    adam = None if found is None else entrywise(found, _momentum(cell), decay)
    return _Within(adam) if isinstance(adam, Adam) else None


@dataclass(frozen=True)
class _Within:
    """y = Fᵀg, u = m̂/(√r̂ + ε), p ← (1 − αλ)p − αF u, m and r averages of y and of y²."""

    adam: Adam

    def __call__(self, cell: Cell, p: Tensors, g: Tensors, lr: Scalar, maximize: bool) -> None:
        lr, gradient = float(lr), cell.block.gathered(g)
        keep = 1 - lr * self.adam.decay.decoupled
        if (found := cell.acting.coordinates(cell.state, Seen(gradient, cell.inputs))) is None:
            step, alpha = cell.taken(tuple(torch._foreach_neg(g) if maximize else g)), -lr
        else:
            F, state = found
            y, m, given = F.rmv(gradient), cell.average["m"], {t.untyped_storage().data_ptr() for t in gradient}
            y = tuple(t.clone() if t.untyped_storage().data_ptr() in given else t for t in aligned(y, m) or ())
            self.adam.descend(y, m, state, list(cell.state["step"][: len(y)]), maximize)
            if isinstance(self.adam.P, RelativeRMS):
                P1 = F
                self.adam.P.measure(state, lambda: P1.solve(cell.block.gathered(p)), lambda: cell.acting.ready(cell.state))
                F = Scaled(F, s) if (s := RelativeRMS.scale(state)) is not None else F
            if len(cell.members) == 1:
                F.add_to(cell.block.gathered(p), y, keep, lr)
                return cell.refresh()
            step, alpha = cell.block.scattered(F.mv(y)), lr
        if keep != 1:
            torch._foreach_mul_(p, keep)
        torch._foreach_add_(p, step, alpha=alpha)
        cell.refresh()


def aligned(gradients: Tensors, p: Tensors) -> Tensors | None:
    """Gradients laid out in memory as the parameters are: the kernels walk along all tensors side by side. None for sparse ones."""
    try:
        if list(map(Tensor.stride, gradients)) == list(map(Tensor.stride, p)):
            return gradients
    except RuntimeError:  # of some layouts that have no strides
        return None
    if any(x.layout != torch.strided for x in gradients):
        return None
    return [x if x.stride() == y.stride() else torch.empty_like(y).copy_(x) for x, y in zip(gradients, p, strict=True)]


def _dense(t: Tensor) -> bool:
    """Whether its entries fill its memory, so that state made like it has its layout."""
    return torch.empty_like(t, device="meta").stride() == t.stride()


def _decay(choice: Choice, rules: Rules) -> Decay | None:
    """The regularizers as weight decay; None where they are more than that."""
    coupled = decoupled = 0.0
    for r in choice.regularizers:
        if not isinstance(r, L2) or not isinstance(r.lam, int | float) or (r.lam and r.where is not None):
            return None
        if r.space == "z":
            decoupled += 2 * r.lam
        else:
            coupled += 2 * r.lam
    adaptive = not isinstance(choice.preconditioner, Fixed)
    if coupled and adaptive and rules.statistics_from != "total":
        return None
    return Decay(coupled, decoupled)
