"""Control of norms, for any preconditioner: lengths of weights and of steps, of whole matrices and of their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from precond.algebra import checks, vec
from precond.algebra.schedules import Schedule
from precond.algebra.spaces import Bend, ProposedStep, Stage
from precond.algebra.vec import Vec
from precond.optim.blocks import Leaf, Rule, is_matrix
from precond.optim.checking.arguments import settle
from precond.optim.regularizers.base import At
from precond.optim.regularizers.bends import Bending, by_piece, products


@dataclass(frozen=True)
class Hyperball(Bending):
    r"""Weights and steps of fixed norms: u ← ℓ‖p‖·u/‖u‖, p ← p − αu, and back to the norm that p had.

    The learning rate is then the angle of a step (times ℓ), whatever the width, and no decay is needed: what it would do to the length is
    undone. In z the norms are those of P⁻¹p and P⁻¹u; behind :class:`~precond.Whitening` ‖z‖ is the root mean square of a layer's
    outputs times the root of their number. What has length 0, or is not moved, stays as it would be without.

    Args:
        length: ℓ ≥ 0; 0 in a group leaves its parameters out.
        space: ``"p"``, where each tensor has its length, or ``"z"``, where each block that P takes jointly has.
        where: which parameters; matrices by default.

    Raises:
        ValueError: (with an optimizer) in z where P has no inverse.

    Example:
        >>> import torch, precond
        >>> W = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = precond.sgd([W], lr=0.1, regularizers=[precond.Hyperball()])
        >>> W.grad = torch.tensor([[1.0, 0.0]]); _ = optimizer.step()
        >>> round(W.norm().item(), 4)  # the step had length 0.1·5
        5.0

    References:
        Wen, Dang, Lyu, Ma & Liang (2026), Hyperball optimization, eq. (2); Karras et al. (2024) for magnitude-preserving training.
    """

    length: float | Schedule = 1.0
    space: Literal["p", "z"] = "p"
    where: Rule | None = is_matrix

    scalars = ("length",)
    stage = Stage.LENGTH

    def __post_init__(self) -> None:
        settle(self)
        if not isinstance(self.length, Schedule):
            checks.non_negative("Hyperball", length=self.length)

    def bent(self, at: At, w: Vec, made: ProposedStep) -> Vec:
        factors = _quotients(self._lengths(at, at.space.solve(at.p)), self._lengths(at, w))
        return vec.scale(w, [f * x for f, x in zip(by_piece(at, self.space, factors), at["length"], strict=True)])

    def term(self, at: At) -> Bend:
        before: list[Tensor] = []

        def bend(u: Vec, made: ProposedStep) -> Vec:
            before.extend(self._lengths(at, at.space.solve(at.p)))  # while p is where it was
            return self.bend(at, u, made)

        def project(p: Vec) -> Vec:
            z = at.space.solve(p)
            back = by_piece(at, self.space, _quotients(before, self._lengths(at, z)))
            return vec.add(p, at.space.push(vec.scale(z, [x - 1 for x in back])))

        return Bend(bend, self.stage, project)

    def _lengths(self, at: At, z: Vec) -> list[Tensor]:
        return [x.sqrt() for x in products(at, self.space, z, z)]


def _quotients(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """a/b, and 1 where one of them is 0."""
    return [torch.where((x > 0) & (y > 0), x / y, 1.0) for x, y in zip(a, b, strict=True)]


@dataclass(frozen=True)
class RadialBrake(Bending):
    r"""Growth of weights is slowed: of a step that lengthens p the part along p is multiplied by 1 − κ.

    w ← w − κ min(0, ⟨w, z⟩/‖z‖²) z with w = P⁻¹u and z = P⁻¹p, or u and p. What shortens p, and what turns it, stays.

    Args:
        strength: κ in [0, 1]; with 1 a step lengthens p to second order alone.
        space, where: as in :class:`Hyperball`.

    Raises:
        ValueError: as there.

    Example:
        >>> import torch, precond
        >>> W = torch.nn.Parameter(torch.tensor([[1.0, 0.0]]))
        >>> optimizer = precond.sgd([W], lr=1.0, regularizers=[precond.RadialBrake()])
        >>> W.grad = torch.tensor([[-1.0, -1.0]]); _ = optimizer.step()
        >>> W.tolist()  # along W it would grow
        [[1.0, 1.0]]

    References:
        Heo et al. (2021), AdamP, for the projection; as a brake of growth alone in the records of modded-nanogpt (2026), pull request 294.
    """

    strength: float | Schedule = 1.0
    space: Literal["p", "z"] = "p"
    where: Rule | None = is_matrix

    scalars = ("strength",)
    stage = Stage.RADIUS

    def __post_init__(self) -> None:
        settle(self)
        if not isinstance(self.strength, Schedule) and not 0 <= self.strength <= 1:
            raise ValueError(f"RadialBrake: strength must be in [0, 1], got {self.strength!r}; 1 stops all growth")

    def bent(self, at: At, w: Vec, made: ProposedStep) -> Vec:
        z = at.space.solve(at.p)
        along, square = products(at, self.space, w, z), products(at, self.space, z, z)
        outward = [torch.where(s > 0, (x / s).clamp_max(0), 0.0) for x, s in zip(along, square, strict=True)]
        factors = [c * k for c, k in zip(by_piece(at, self.space, outward), at["strength"], strict=True)]
        return tuple(x - c * y for x, y, c in zip(w, z, factors, strict=True))


@dataclass(frozen=True)
class RowFloor(Bending):
    r"""No row of a weight lags behind: ‖wᵢ‖ ≥ f‖zᵢ‖ for the rows of the step w = P⁻¹u and of z = P⁻¹p, or of u and p.

    A row is what makes one output. Rows of a polar factor are of unequal length where a matrix is tall; shorter ones are lengthened, rows
    that do not move at all stay.

    Args:
        ratio: f ≥ 0.
        space: ``"p"`` or ``"z"``.
        where: which parameters; matrices by default. What has fewer than two dimensions has no rows.

    Raises:
        ValueError: (with an optimizer) in z where P has no stated root or no inverse; for a weight whose rows are divided among processes.

    Example:
        >>> import torch, precond
        >>> W = torch.nn.Parameter(torch.tensor([[1.0], [1.0], [1.0]]))
        >>> optimizer = precond.sgd([W], lr=1.0, regularizers=[precond.RowFloor(0.5)])
        >>> W.grad = torch.tensor([[1.0], [0.25], [0.0]]); _ = optimizer.step()
        >>> W.flatten().tolist()  # steps of 1, 0.25 lengthened to 0.5·1, and none
        [0.0, 0.5, 1.0]

    References:
        You et al. (2017), LARS, for the ratio; row by row in the records of modded-nanogpt (2026), pull request 328.
    """

    ratio: float | Schedule
    space: Literal["p", "z"] = "p"
    where: Rule | None = is_matrix

    scalars = ("ratio",)
    stage = Stage.ROWS
    rooted = True

    def __post_init__(self) -> None:
        settle(self)
        if not isinstance(self.ratio, Schedule):
            checks.non_negative("RowFloor", ratio=self.ratio)

    def bent(self, at: At, w: Vec, made: ProposedStep) -> Vec:
        z = at.space.solve(at.p)
        out = list(w)
        for i, (leaf, ratio) in enumerate(zip(at.leaves, at["ratio"], strict=True)):
            if at.takes_part[i] and leaf.ndim >= 2:
                step, least = _rows(leaf, w[i]), ratio * _rows(leaf, z[i])
                out[i] = w[i] * torch.where((step > 0) & (step < least), least / step, 1.0)
        return tuple(out)


def _rows(leaf: Leaf, t: Tensor) -> Tensor:
    """The norms of rows, of a shape that broadcasts."""
    out = 1 if leaf.inputs_first else 0
    if leaf.shard is not None and leaf.shard.span(out) is None:
        raise ValueError(
            f"RowFloor: the rows of {leaf.name!r} are divided among processes; shard it along its outputs, leave it out "
            "(where=), or leave it out of sharding"
        )
    return torch.linalg.vector_norm(t, 2, [d for d in range(t.ndim) if d != out], keepdim=True)
