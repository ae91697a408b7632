"""What a preconditioner is: statistics that are kept of what is seen, and the map P that they make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from precond import blocks
from precond.blocks import Block, Leaf, State
from precond.inputs import Moments, Request
from precond.maps import Identity, LinearMap
from precond.vec import Vec

if TYPE_CHECKING:
    from precond.momentum import Momentum


@dataclass(frozen=True)
class Seen:
    """What a step shows to a preconditioner.

    Attributes:
        gradient: the loss gradient in this preconditioner's coordinates, one tensor per leaf of the block.
        inputs: statistics of layer inputs by site name and request, or None.
        momentum: the momentum of the clean gradient as this step makes it, where :attr:`Preconditioner.uses_momentum` asks for
            it; None: there is none, or it was not asked for.
        position: makes the parameters in this preconditioner's coordinates, z = P₁⁻¹p; None: not known.
    """

    gradient: Vec
    inputs: Mapping[tuple[str, Request], Moments] | None = None
    momentum: Vec | None = None
    position: Callable[[], Vec] | None = None


Needs = Literal["entry", "row", "block"]
"""A map acts by entries, by rows of a weight with their bias, or on a block as a whole."""


def strictest(preconditioners: Iterable[Preconditioner]) -> Needs:
    """What several preconditioners need together."""
    return max((p.needs for p in preconditioners), key=("entry", "row", "block").index)


@dataclass(frozen=True)
class Part:
    """Leaves, by position, that one preconditioner acts on jointly."""

    index: tuple[int, ...]
    preconditioner: Preconditioner


class Preconditioner(ABC):
    """A frozen choice of how statistics become a map P.

    A new one is one file: a frozen dataclass with ``init``, ``observe`` and ``map``.

    Attributes:
        entrywise: its map acts entry by entry, so that any block serves and leaves may come and go.
        diagonal: its map is diagonal, as every entrywise one is.
        states_root: its map states a root P of M = P Pᵀ.
        invertible: P has an inverse.
        alone: its methods read tensors on the host: blocks alike are not taken side by side.
        uses_momentum: its map is made of the momentum.
        momentum: an average of its own for the parameters that it acts on, in place of the optimizer's; None: the optimizer's.
        advised_damping: the damping of M that penalties in z take unless told otherwise (math: M_r = (M⁻¹ + δI)⁻¹).
    """

    entrywise: bool = False
    states_root: bool = True
    invertible: bool = True
    alone: bool = False
    uses_momentum: bool = False
    momentum: Momentum | None = None
    advised_damping: float = 0.0

    @property
    def diagonal(self) -> bool:
        return self.entrywise

    @property
    def needs(self) -> Needs:
        """What one process must hold whole where parameters are divided among several."""
        return "entry" if self.entrywise else "block"

    @property
    def requests(self) -> frozenset[Request]:
        """What it wants to know of the inputs of layers; nothing by default."""
        return frozenset()

    def lr_scale(self, leaf: Leaf) -> float:
        """What multiplies the learning rate of a leaf."""
        return 1.0

    def partition(self, leaves: Sequence[Leaf]) -> list[Part]:
        """The blocks that this preconditioner acts on; by default each tensor, or all of a group where it is entrywise."""
        split = blocks.by_group if self.entrywise else blocks.by_tensor
        return [Part(i, self) for i in split(leaves)]

    def reasons(self, leaves: Sequence[Leaf]) -> Mapping[int, str]:
        """Why leaves, by position, get what :meth:`partition` gives them, where that was a choice."""
        return {}

    def handles(self, block: Block) -> bool:
        """Whether it does anything to a block; what it does not handle it maps by the identity."""
        return True

    @abstractmethod
    def init(self, block: Block) -> State | dict[str, Any]:
        """Fresh statistics of a block."""

    @abstractmethod
    def observe(self, state: State, seen: Seen) -> None:
        """Fold what was seen into the statistics, in place."""

    @abstractmethod
    def map(self, state: State) -> LinearMap:
        """P, from the statistics."""

    def pull(self, state: State, seen: Seen) -> tuple[Vec, LinearMap, LinearMap]:
        """:meth:`observe`, and (Fᵀg, F, N) of the gradient seen, with F and N as of :meth:`factors`: all at once may cost less."""
        self.observe(state, seen)
        F, N = self.factors(state)
        return F.rmv(seen.gradient), F, N

    def descend(self, state: State, seen: Seen) -> Vec:
        """:meth:`observe`, and M m of the momentum seen, where that is what the step takes: both at once may cost less."""
        self.observe(state, seen)
        return self.map(state).gram(seen.gradient if seen.momentum is None else seen.momentum)

    def wanted(self, state: State) -> Iterable[tuple[str, Request, Tensor | None]]:
        """(site name, request, the mean that deviations are measured from) to observe before the next step; nothing by default."""
        return ()

    def factors(self, state: State) -> tuple[LinearMap, LinearMap]:
        """(F, N) with P = F N: the momentum of cotangents is kept in the coordinates of F, as an average of Fᵀg.

        F is the identity by default. Where N is made of Fᵀg, step after step, its numerator then sees what its denominator saw.
        """
        return Identity(), self.map(state)

    def refresh(self, state: State, carried: Sequence[Vec] = ()) -> None:
        """Work after the step, such as new eigenbases; nothing by default.

        Args:
            carried: vectors in the coordinates of F, averages of cotangents, to be carried into its new ones in place.
        """

    def __matmul__(self, other: Preconditioner) -> Preconditioner:
        from precond.preconditioners.compose import Composition

        return Composition(self, other) if isinstance(other, Preconditioner) else NotImplemented


class Resolved(Preconditioner):
    """A preconditioner that :meth:`partition` resolves: every part holds one that was chosen, never this."""

    def init(self, block: Block) -> dict:
        raise NotImplementedError

    def observe(self, state: State, seen: Seen) -> None:
        raise NotImplementedError

    def map(self, state: State) -> LinearMap:
        raise NotImplementedError


def placed(preconditioner: Preconditioner, leaves: Sequence[Leaf], index: Sequence[int]) -> list[Part]:
    """The parts of those leaves that ``index`` names, by their positions among all."""
    parts = preconditioner.partition([leaves[i] for i in index])
    return [Part(tuple(index[i] for i in part.index), part.preconditioner) for part in parts]
