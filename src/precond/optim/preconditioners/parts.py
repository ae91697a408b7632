"""Which parameters a preconditioner takes jointly, and what of them it must have whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from precond.optim.blocks import Leaf

if TYPE_CHECKING:
    from precond.optim.preconditioners.base import Preconditioner

Needs = Literal["entry", "row", "block"]
"""A map acts by entries, by rows of a weight with their bias, or on a block as a whole."""


def strictest(preconditioners: Iterable[Preconditioner]) -> Needs:
    """What several preconditioners need together."""
    return max((p.needs for p in preconditioners), key=("entry", "row", "block").index)


@dataclass(frozen=True)
class Part:
    """Leaves, by position, that one preconditioner acts on jointly.

    Attributes:
        index: their positions among the leaves that :meth:`Preconditioner.partition` was given.
        preconditioner: what acts on them.
    """

    index: tuple[int, ...]
    preconditioner: Preconditioner


def placed(preconditioner: Preconditioner, leaves: Sequence[Leaf], index: Sequence[int]) -> list[Part]:
    """The parts of those leaves that ``index`` names, by their positions among all."""
    parts = preconditioner.partition([leaves[i] for i in index])
    return [Part(tuple(index[i] for i in part.index), part.preconditioner) for part in parts]
