"""What a step shows to a preconditioner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from precond.algebra.vec import Vec
from precond.optim.inputs import Moments, Request


@dataclass(frozen=True)
class Seen:
    """What a step shows to a preconditioner.

    Attributes:
        gradient: the loss gradient in this preconditioner's coordinates, one tensor per leaf of the block.
        inputs: statistics of layer inputs by site name and request, or None.
        momentum: that of the clean gradient as this step makes it, where :attr:`Preconditioner.uses_momentum` asks for it; else None.
        stride: √c of the momentum's coherence, see :class:`~precond.Momentum`; of a stack (k,); None: not measured.
        position: makes the parameters in this preconditioner's coordinates, z = P₁⁻¹p; None: not known.
        ready: whether P₁ is known: :meth:`Preconditioner.ready`.
        parameters: makes p, where there is a P₁; None: not known, or z is p.
    """

    gradient: Vec
    inputs: Mapping[tuple[str, Request], Moments] | None = None
    momentum: Vec | None = None
    stride: Tensor | None = None
    position: Callable[[], Vec] | None = None
    ready: Callable[[], bool] = lambda: True
    parameters: Callable[[], Vec] | None = None
