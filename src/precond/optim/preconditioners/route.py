"""Different preconditioners for different parameters, inside one optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from precond.algebra import checks
from precond.algebra.maps import Identity
from precond.optim.blocks import Leaf, Rule, matches
from precond.optim.inputs import Request
from precond.optim.preconditioners.base import Preconditioner, Resolved
from precond.optim.preconditioners.fixed import Fixed
from precond.optim.preconditioners.parts import Part, placed


@dataclass(frozen=True)
class Route(Resolved):
    """The first rule that a parameter satisfies decides which preconditioner acts on it.

    One optimizer, one state, one scheduler, whatever the mixture.

    Args:
        branches: pairs ``(rule, preconditioner)`` or triples ``(rule, preconditioner, lr_scale)``; a rule is a
            predicate of a :class:`~precond.optim.blocks.Leaf` or a pattern for its name. The learning rate of the parameters
            of a branch is multiplied by ``lr_scale``.
        otherwise: for parameters that satisfy no rule.

    Raises:
        TypeError: for branches of another form.
        ValueError: for an ``lr_scale`` that is not positive.

    Example:
        >>> import precond
        >>> Route([(precond.is_matrix, precond.AdaGrad())], otherwise=precond.RMS()).states_root
        True
    """

    branches: Sequence[tuple[Rule, Preconditioner] | tuple[Rule, Preconditioner, float]]
    otherwise: Preconditioner = Fixed(Identity())

    def __post_init__(self) -> None:
        object.__setattr__(self, "branches", tuple(tuple(b) for b in self.branches))
        for branch in self.branches:
            if not (len(branch) in (2, 3) and isinstance(branch[1], Preconditioner)):
                raise TypeError(
                    f"Route: a branch is (rule, preconditioner) or (rule, preconditioner, lr_scale), got {branch!r}"
                )
            if len(branch) == 3:
                checks.positive("Route", lr_scale=branch[2])

    def _all(self) -> list[Preconditioner]:
        return [b[1] for b in self.branches] + [self.otherwise]

    @property
    def requests(self) -> frozenset[Request]:
        return frozenset().union(*(p.requests for p in self._all()))

    @property
    def diagonal(self) -> bool:
        return all(p.diagonal for p in self._all())

    @property
    def states_root(self) -> bool:  # type: ignore[override]
        return all(p.states_root for p in self._all())

    @property
    def invertible(self) -> bool:  # type: ignore[override]
        return all(p.invertible for p in self._all())

    @property
    def timeless(self) -> bool:  # type: ignore[override]
        return all(p.timeless for p in self._all())

    @property
    def uses_momentum(self) -> bool:  # type: ignore[override]
        return any(p.uses_momentum for p in self._all())

    @property
    def advised_damping(self) -> float:  # type: ignore[override]
        return max(p.advised_damping for p in self._all())

    def branch_of(self, leaf: Leaf) -> int:
        """The number of the branch that a leaf takes; the last is ``otherwise``."""
        for k, branch in enumerate(self.branches):
            if matches(branch[0], leaf):
                return k
        return len(self.branches)

    def lr_scale(self, leaf: Leaf) -> float:
        k = self.branch_of(leaf)
        own = self.branches[k][2] if k < len(self.branches) and len(self.branches[k]) == 3 else 1.0  # type: ignore[misc]
        return float(own) * self._all()[k].lr_scale(leaf)

    def partition(self, leaves: Sequence[Leaf]) -> list[Part]:
        taken = [self.branch_of(leaf) for leaf in leaves]
        parts: list[Part] = []
        for k, preconditioner in enumerate(self._all()):
            parts += placed(preconditioner, leaves, [i for i, t in enumerate(taken) if t == k])
        return parts
