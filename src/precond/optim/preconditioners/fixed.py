"""A map that does not change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from precond.algebra.maps import Diagonal, Identity, LinearMap
from precond.optim import blocks
from precond.optim.blocks import Block, Leaf, State
from precond.optim.checking import contracts
from precond.optim.preconditioners.base import Preconditioner
from precond.optim.preconditioners.parts import Part
from precond.optim.preconditioners.seen import Seen


@dataclass(frozen=True)
class Fixed(Preconditioner):
    """P = a given map on all parameters in order (``Fixed(Dense(A))`` acts on their entries, row-major).

    ``Fixed(Identity())`` is plain gradient descent.

    Args:
        map_: P, of all parameters.

    Raises:
        TypeError: for what is no :class:`~precond.LinearMap`.
        ValueError: (with an optimizer) for a diagonal map whose tensors are not of the parameters' shapes.

    Example:
        >>> import torch, precond
        >>> p = torch.nn.Parameter(torch.tensor([0.0, 0.0]))
        >>> P = precond.Dense(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
        >>> optimizer = precond.PreconditionedGD([p], lr=1.0, preconditioner=precond.Fixed(P))
        >>> p.grad = torch.tensor([0.0, 1.0]); _ = optimizer.step(); p.tolist()  # −P Pᵀg
        [-1.0, -1.0]

    References:
        Ye, eqs. (4), (5).
    """

    map_: LinearMap = field(default_factory=Identity)

    timeless = True

    def __post_init__(self) -> None:
        if not isinstance(self.map_, LinearMap):
            raise TypeError(f"Fixed: map must be a LinearMap such as Dense(matrix), got {type(self.map_).__name__}")

    @property
    def entrywise(self) -> bool:  # type: ignore[override]
        return isinstance(self.map_, Identity)

    @property
    def diagonal(self) -> bool:
        return self.map_.diagonal

    @property
    def states_root(self) -> bool:  # type: ignore[override]
        return self.map_.root

    def partition(self, leaves: Sequence[Leaf]) -> list[Part]:
        split = blocks.by_group if self.entrywise else blocks.together
        return [Part(i, self) for i in split(leaves)]

    def looks(self, step: int) -> bool:
        return False

    def init(self, block: Block) -> dict:
        if isinstance(self.map_, Diagonal) and self.map_.like is not None:
            contracts.shapes("Fixed: map", self.map_.like, block.tensors)
        return {}

    def observe(self, state: State, seen: Seen) -> None:
        pass

    def map(self, state: State) -> LinearMap:
        return self.map_
