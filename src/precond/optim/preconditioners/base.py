"""What a preconditioner is: statistics that are kept of what is seen, and the map P that they make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from precond.algebra.maps import Identity, LinearMap
from precond.algebra.vec import Vec
from precond.optim import blocks
from precond.optim.blocks import Block, Leaf, State
from precond.optim.inputs import Request
from precond.optim.preconditioners.contract import Checked
from precond.optim.preconditioners.parts import Needs, Part
from precond.optim.preconditioners.seen import Seen

if TYPE_CHECKING:
    from precond.optim.momentum import Momentum
    from precond.optim.preconditioners.rms import RMS


class Preconditioner(Checked, ABC):
    """A frozen choice of how statistics become a map P.

    A new one is one file: a frozen dataclass with ``init``, ``observe`` and ``map``.

    Attributes:
        entrywise: its map acts entry by entry, so that any block serves and leaves may come and go.
        diagonal: its map is diagonal, as every entrywise one is.
        states_root: its map states a root P of M = P Pᵀ.
        invertible: P has an inverse.
        alone: blocks alike are not taken side by side (unless it is :class:`~precond.Stacked`), and not tried to: its methods read tensors on
            the host, say.
        counts: names of numbers in its state that the host knows (how many samples a layer saw) and keeps.
        optional: names of statistics without which a state goes on: some configurations alone keep them, or earlier versions did not.
        second_moments: names of statistics that divide what has made a step only where they have seen that step: else it begins anew.
        timeless: every step does the same work: the number of a step enters its formulas alone, as :attr:`State.times`.
        uses_momentum: its map is made of the momentum.
        momentum: an average of its own for the parameters that it acts on, in place of the optimizer's; None: the optimizer's.
        advised_damping: the damping of M that penalties in z take unless told otherwise (math: M_r = (M⁻¹ + δI)⁻¹).

    Example:
        >>> import torch, precond
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Largest(precond.Preconditioner):  # M = 1/max |g| of each tensor so far
        ...     def init(self, block):
        ...         return {"peak": tuple(z.new_zeros(()) for z in block.zeros())}
        ...
        ...     def observe(self, state, seen):
        ...         for peak, g in zip(state["peak"], seen.gradient):
        ...             torch.maximum(peak, g.abs().max(), out=peak)
        ...
        ...     def map(self, state):
        ...         return precond.InverseRoot(tuple(x.expand_as(p) for x, p in zip(state["peak"], state.block.tensors)))
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = precond.PreconditionedGD([p], lr=1.0, preconditioner=Largest())
        >>> p.grad = torch.tensor([8.0, 2.0]); _ = optimizer.step(); p.tolist()
        [-1.0, -0.25]

    References:
        Ye, eqs. (4), (5).
    """

    entrywise: bool = False
    states_root: bool = True
    invertible: bool = True
    alone: bool = False
    counts: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    second_moments: frozenset[str] = frozenset()
    timeless: bool = False
    uses_momentum: bool = False
    momentum: Momentum | None = None
    advised_damping: float = 0.0

    @property
    def diagonal(self) -> bool:
        return self.entrywise

    @property
    def constituents(self) -> tuple[Preconditioner, ...]:
        """The preconditioners that it is made of; none by default."""
        return ()

    @property
    def singly(self) -> Preconditioner:
        """The same on a block that stands alone."""
        return self

    @property
    def needs(self) -> Needs:
        """What one process must hold whole where parameters are divided among several."""
        return "entry" if self.entrywise else "block"

    def divisible(self, block: Block) -> bool:
        """Whether each of the processes that hold parts of a block can step its own part."""
        if self.constituents:
            return all(part.divisible(block) for part in self.constituents)
        return self.needs != "block"

    @property
    def has_owner(self) -> bool:
        """Whether, where several processes hold a parameter, one does its work for all and alone keeps its state.

        What works on matrices is; what is diagonal costs less than to send its result.
        """
        if self.constituents:
            return any(part.has_owner for part in self.constituents)
        return self.needs == "block" and not self.diagonal

    @property
    def requests(self) -> frozenset[Request]:
        """What it wants to know of the inputs of layers; nothing by default."""
        return frozenset()

    def idle(self, step: int, turns: Iterable[int]) -> bool:
        """Whether nothing of layer inputs is to be observed for a step of leaves with these turns, whatever the statistics are."""
        if self.constituents:
            return all(part.idle(step, turns) for part in self.constituents)
        return not self.requests

    def looks(self, step: int) -> bool:
        """Whether it may look at the parameters' values in a step; where processes hold parts of them, they are sent to it then."""
        return any(part.looks(step) for part in self.constituents) if self.constituents else True

    def settled(self, state: State) -> bool:
        """Whether it has learned of the parameters what it wants, and looks at them no more, whatever the step."""
        return False

    def cost(self, block: Block) -> float:
        """About what a step of a block costs, products and a share of roots, to divide work among processes."""
        shapes = ((max(1, leaf.shape[0]) if leaf.ndim > 1 else 1, leaf.param.numel()) for leaf in block.leaves)
        return sum(size * min(n, size // n) + (n**3 + (size // n) ** 3 if n > 1 else 0) / 10 for n, size in shapes)

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

    def kind(self, block: Block) -> Any:
        """What, beside the shapes of their tensors, blocks that are taken side by side have in common."""
        return None

    def program(self, block: Block, step: int) -> Hashable:
        """What the number of a step decides about its work: steps of one program do the same, whatever their formulas make of the number."""
        return None if self.timeless else step

    @abstractmethod
    def init(self, block: Block) -> State | dict[str, Any]:
        """Fresh statistics of a block."""

    @abstractmethod
    def observe(self, state: State, seen: Seen) -> None:
        """Fold what was seen into the statistics, in place."""

    @abstractmethod
    def map(self, state: State) -> LinearMap:
        """P, from the statistics."""

    def descend(self, state: State, seen: Seen) -> Vec:
        """:meth:`observe`, and M m of the momentum seen, where that is what the step takes: both at once may cost less."""
        self.observe(state, seen)
        return self.map(state).gram(seen.gradient if seen.momentum is None else seen.momentum)

    def pull(self, state: State, seen: Seen) -> Vec:
        """:meth:`observe`, and Fᵀg of the gradient seen."""
        self.observe(state, seen)
        return self.factors(state)[0].rmv(seen.gradient)

    def push(self, state: State, y: Vec) -> Vec:
        """F N Nᵀ y: the step of an average y in the coordinates of F."""
        F, N = self.factors(state)
        return F.mv(N.gram(y))

    @property
    def rms(self) -> RMS | None:
        """The preconditioner that it is in the coordinates of F, P = F·N with its N; None: none of that kind. It has Adam's kernel."""
        return None

    def coordinates(self, state: State, seen: Seen) -> tuple[LinearMap, State] | None:
        """:meth:`observe` of all but :attr:`rms`; F, and the statistics of that. None, and nothing is observed: the step is another."""
        return None

    def ready(self, state: State) -> bool:
        """Whether what it has seen makes a map; until then P is the identity, and z is p."""
        return True

    def findings(self, state: State) -> Sequence[str]:
        """What it found of a block, of a stack for each member, that :meth:`~precond.PreconditionedGD.explain` tells; nothing by default."""
        return ()

    def wanted(self, state: State) -> Iterable[tuple[str, Request, Tensor | None]]:
        """(site name, request, the mean that deviations are measured from) to observe before the next step; nothing by default."""
        return ()

    def factors(self, state: State) -> tuple[LinearMap, LinearMap]:
        """(F, N) with P = F N: the momentum of cotangents is kept in the coordinates of F, as an average of Fᵀg.

        F is the identity by default. Where N is made of Fᵀg, step after step, its numerator then sees what its denominator saw.
        """
        return Identity(), self.map(state)

    def refresh(self, state: State, carried: Sequence[Vec] = ()) -> None:
        """Work after the step, such as new eigenbases, which the next step finds; nothing by default.

        ``state.steps`` counts the step that was just taken. A class with one of its own is taken block by block, unless it derives from
        :class:`precond.Stacked`. One that takes ``state`` alone may return a LinearMap, which then carries the averages.

        Args:
            carried: vectors in the coordinates of F, averages of cotangents, to be carried into its new ones in place.
        """

    def __matmul__(self, other: Preconditioner) -> Preconditioner:
        from precond.optim.preconditioners.compose import Composition

        return Composition(self, other) if isinstance(other, Preconditioner) else NotImplemented


class Resolved(Preconditioner):
    """A preconditioner that :meth:`partition` resolves: every part holds one that was chosen, never this."""

    def init(self, block: Block) -> dict:
        raise NotImplementedError

    def observe(self, state: State, seen: Seen) -> None:
        raise NotImplementedError

    def map(self, state: State) -> LinearMap:
        raise NotImplementedError
