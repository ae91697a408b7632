"""Which parameters have no gradient in a step where others have one that they are stepped jointly with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Joint:
    """What is stepped jointly where all of it has gradients; read in each step, and thought about where that has changed.

    A parameter that has none then is *absent*: left as it is, as torch's optimizers leave it, and the others are stepped as if it were frozen.

    Attributes:
        params: all, by position.
        units: positions of what is stepped jointly, unit by unit.
        layers: positions layer by layer: what acts on a parameter is chosen by what its layer has.
        absent: those that were absent in the last step.
    """

    params: Sequence[Tensor] = ()
    units: Sequence[tuple[int, ...]] = ()
    layers: Sequence[tuple[int, ...]] = ()
    absent: frozenset[Tensor] = frozenset()
    _have: list[bool] = field(default_factory=list, repr=False)
    _now: frozenset[Tensor] = field(default=frozenset(), repr=False)

    def now(self) -> frozenset[Tensor]:
        """Those that are absent by the gradients that are there; of a unit that has none at all those that were."""
        if (have := [p.grad is not None for p in self.params]) != self._have:
            self._have = have
            self._now = frozenset(self.params[i] for unit in self.units for i in self._absent(unit, have))
        return self._now

    def _absent(self, unit: tuple[int, ...], have: Sequence[bool]) -> list[int]:
        if any(have[i] for i in unit):
            return [i for i in unit if not have[i]]
        return [i for i in unit if self.params[i] in self.absent]

    def concerned(self, absent: frozenset[Tensor], stepped: Sequence[Sequence[int]]) -> set[int]:
        """The positions of all that is to be planned anew where others are absent: their layers, and what is ``stepped`` with any of these."""
        found = {i for i, p in enumerate(self.params) if p in absent ^ self.absent}
        together = [*self.layers, *self.units, *stepped]
        while more := {i for of in together if not found.isdisjoint(of) for i in of} - found:
            found |= more
        return found
