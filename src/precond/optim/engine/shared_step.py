"""The step of what ranks hold in pieces, where penalties are no more than decay: the owners' steps, added to the pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from precond.algebra.vec import Scalar, Tensors
from precond.optim.engine import fused
from precond.optim.engine.cells import Choice
from precond.optim.engine.loop import Rules
from precond.optim.engine.sharing import Shared


@dataclass(frozen=True)
class SharedStep:
    """p ← (1 − αλ)p − αu with the u of owners.

    Attributes:
        decay: λ.
    """

    decay: float

    def __call__(self, cell: Shared, p: Tensors, g: Tensors, lr: Scalar, maximize: bool) -> None:
        lr = float(lr)
        u = cell.taken(tuple(torch._foreach_neg(g) if maximize else g))
        if self.decay:
            torch._foreach_mul_(p, 1 - lr * self.decay)
        torch._foreach_add_(p, u, alpha=-lr)
        cell.refresh()


def shared_step(cell: Shared, choices: Sequence[Choice], rules: Rules) -> SharedStep | None:
    """The step of what ranks share on processors, or None.

    Args:
        choices: of each leaf.
    """
    decay = fused.decay_alone(cell.block, choices, rules)
    on_cpu = all(t.device.type == "cpu" for t in cell.block.tensors)
    return SharedStep(decay.decoupled) if on_cpu and decay is not None and not decay.coupled else None
