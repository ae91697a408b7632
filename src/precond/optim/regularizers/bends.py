"""What bends of a step share: its coordinates, and lengths of tensors or of what P takes jointly."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from precond.algebra import vec
from precond.algebra.spaces import Bend, ProposedStep, Stage
from precond.algebra.vec import Vec
from precond.optim.preconditioners.base import Preconditioner
from precond.optim.regularizers.base import At, Regularizer, needs_inverse, needs_root


class Bending(Regularizer):
    """No penalty, but another step in place of u = M·momentum, in p ← p − αu: a function of w = P⁻¹u, z = P⁻¹p
    and y = Pᵀa, or of u, p and a, the gradient with its cotangents.

    A new one says its :attr:`stage` and :meth:`bent`.

    Attributes:
        stage: what it looks at; it decides which of several acts first.
        rooted: whether it depends on the root P, as signs of coordinates do, or on M alone, as lengths and angles.
    """

    stage: Stage
    rooted: bool = False

    @abstractmethod
    def bent(self, at: At, w: Vec, made: ProposedStep) -> Vec:
        """The step in the coordinates of the space."""

    def validate(self, preconditioner: Preconditioner) -> None:
        super().validate(preconditioner)
        if self.space == "z":
            who = f"{type(self).__name__}(space='z')"
            needs_inverse(who, "a step in z, P⁻¹u,", preconditioner)
            if self.rooted:
                needs_root(who, "what it looks at in z", preconditioner)

    @property
    def joins_gradient(self) -> bool:
        return False

    def waits(self, at: At) -> bool:
        return False  # P is asked for when u is there

    def term(self, at: At) -> Bend:
        return Bend(lambda u, made: self.bend(at, u, made), self.stage)

    def bend(self, at: At, u: Vec, made: ProposedStep) -> Vec:
        """The step u with :meth:`bent` in place of its coordinates that take part."""
        w = at.space.solve(u)
        return vec.add(u, at.space.push(vec.sub(self.bent(at, w, made), w)))

    def value(self, at: At) -> Tensor | float:
        return 0.0


def pieces(at: At, space: str) -> list[slice]:
    """What has a length of its own: each tensor in p, what P takes jointly in z."""
    return [slice(i, i + 1) for i in range(len(at.p))] if space == "p" else list(at.joint)


def products(at: At, space: str, a: Vec, b: Vec) -> list[Tensor]:
    """⟨a, b⟩ of each piece, over all entries, whoever holds them."""
    each = at.sums.each(vec.mul(a, b))
    return [sum((x.to(first.device) for x in more), start=first) for first, *more in (each[span] for span in pieces(at, space))]


def by_piece(at: At, space: str, numbers: Sequence[Tensor]) -> list[Tensor]:
    """A number of each piece, for each of its tensors."""
    return [
        x.to(at.p[i].device) for x, span in zip(numbers, pieces(at, space), strict=True) for i in range(span.start, span.stop)
    ]
