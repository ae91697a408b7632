r"""The coordinates in which a penalty acts, and the kinds of terms that penalties add to a step.

With p = P z a penalty R may be a function of p or of z (Ye, eqs. 9 and 10). Space z is space p with the metric (P Pᵀ)⁻¹,
so a regularizer is written once, against the five verbs of :class:`Space`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

from torch import Tensor

from precond.algebra import vec
from precond.algebra.maps import Identity, LinearMap
from precond.algebra.sharding import LOCAL_SUMS, Sums
from precond.algebra.vec import Scalar, Vec


@dataclass(frozen=True)
class Cotangent:
    """A term that lives where gradients live: it joins the gradient and is multiplied by M before it moves p.

    Attributes:
        vec: one tensor for each parameter, of its shape.

    Example:
        >>> import torch, precond
        >>> from precond.algebra.spaces import P
        >>> P((True,)).raised((torch.tensor([2.0]),))  # what a penalty in p adds, ∇_p R = 2
        Cotangent(vec=(tensor([2.]),))
    """

    vec: Vec


@dataclass(frozen=True)
class Instead:
    """A cotangent that stands in place of the loss gradient (SAM: the gradient at the perturbed point).

    Attributes:
        vec: the gradient to take, one tensor for each parameter, of its shape.

    Example:
        >>> import torch, precond
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Clipped(precond.Regularizer):  # no entry of the gradient is larger than ``most``
        ...     most: float
        ...     space: str = "p"
        ...     scalars = ("most",)
        ...
        ...     def term(self, at):
        ...         return precond.Instead(tuple(g.clamp(-c, c) for g, c in zip(at.g, at["most"])))
        >>> p = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = precond.sgd([p], lr=0.5, regularizers=[Clipped(1.0)])
        >>> p.grad = torch.tensor([8.0, -0.5]); _ = optimizer.step(); p.tolist()
        [0.5, 1.25]
    """

    vec: Vec


@dataclass(frozen=True)
class Tangent:
    """A term that lives where steps live: p ← p − α·(…), past momentum and past M; also a displacement of a probe.

    Attributes:
        vec: its direction.
        scale: what multiplies it, one number or one per tensor: a displacement need not be formed to be added.

    Example:
        >>> import torch, precond
        >>> from precond.algebra.spaces import Z
        >>> Z(precond.Identity(), (True,)).raised((torch.tensor([2.0]),), 0.5)  # what a penalty in z adds, P ∇_z R = 0.5·2
        Tangent(vec=(tensor([2.]),), scale=0.5)
        >>> precond.Tangent((torch.tensor([2.0]),), 0.5).formed()
        (tensor([1.]),)
    """

    vec: Vec
    scale: Scalar | Sequence[Scalar] = 1.0

    def formed(self) -> Vec:
        """scale·vec."""
        return self.vec if isinstance(self.scale, float) and self.scale == 1.0 else vec.scale(self.vec, self.scale)

    def part(self, span: slice) -> Tangent:
        """Of the tensors of a span."""
        return Tangent(self.vec[span], self.scale[span] if isinstance(self.scale, Sequence) else self.scale)

    def add_to_(self, p: Vec) -> None:
        """p ← p + scale·vec in place."""
        vec.add_scaled_(p, self.vec, self.scales)

    @property
    def scales(self) -> Sequence[Scalar]:
        """What multiplies each tensor."""
        return self.scale if isinstance(self.scale, Sequence) else [self.scale] * len(self.vec)


@dataclass(frozen=True)
class Prox:
    """A proximal step, p ← apply(p), after everything else has moved p.

    Attributes:
        apply: the parameters, one tensor each → where to put them, the same shapes.

    Example:
        >>> import torch, precond
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Box(precond.Regularizer):  # |p| ≤ ``side``
        ...     side: float
        ...     space: str = "p"
        ...     scalars = ("side",)
        ...
        ...     def term(self, at):
        ...         return precond.Prox(lambda p: tuple(t.clamp(-c, c) for t, c in zip(p, at["side"])))
        >>> p = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = precond.sgd([p], lr=0.5, regularizers=[Box(2.0)])
        >>> p.grad = torch.tensor([8.0, -1.0]); _ = optimizer.step(); p.tolist()
        [-2.0, 1.5]
    """

    apply: Callable[[Vec], Vec]


class Stage(IntEnum):
    """What a :class:`Bend` looks at, in the order in which several act: the order of a list decides nothing.

    Attributes:
        ENTRIES: single entries of the step.
        RADIUS: its part along p.
        ROWS: the lengths of its rows.
        DECAY: what shrinks p.
        LENGTH: the length of the whole, which comes last.

    Example:
        >>> import precond
        >>> precond.Cautious().stage < precond.Hyperball().stage
        True
    """

    ENTRIES = 0
    RADIUS = 1
    ROWS = 2
    DECAY = 3
    LENGTH = 4


@dataclass(frozen=True)
class ProposedStep:
    """A step as M made it, u, and what it descends, a: the gradient with what penalties add to it."""

    u: Vec
    a: Vec


@dataclass(frozen=True)
class Bend:
    """What makes another step of the one that M made: u ↦ apply(u, made) of p ← p − α(u + tangents), past momentum and past M.

    Attributes:
        apply: the steps of all tensors, as others have bent them, and as M made them → the steps to take.
        stage: what it looks at.
        project: what acts on p last, as a :class:`Prox` does; None: nothing.

    Example:
        >>> import torch, precond
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Short(precond.Regularizer):  # ‖u‖ ≤ ``most`` for each tensor
        ...     most: float
        ...     space: str = "p"
        ...     scalars = ("most",)
        ...
        ...     def term(self, at):
        ...         shortened = lambda u, made: tuple(t / (t.norm() / c).clamp_min(1) for t, c in zip(u, at["most"]))
        ...         return precond.Bend(shortened, precond.Stage.LENGTH)
        >>> p = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = precond.sgd([p], lr=0.5, regularizers=[Short(1.0)])
        >>> p.grad = torch.tensor([6.0, 8.0]); _ = optimizer.step(); [round(x, 4) for x in p.tolist()]  # 1 − 0.5·(0.6, 0.8)
        [0.7, 0.6]
    """

    apply: Callable[[Vec, ProposedStep], Vec]
    stage: Stage
    project: Callable[[Vec], Vec] | None = None


Term = Cotangent | Instead | Tangent | Prox | Bend


class Space(ABC):
    """Coordinates of the parameters: p itself, or z = P⁻¹p.

    Args:
        map: the map from these coordinates to p, or what makes it when it is first asked for.
        takes_part: for each tensor, whether its coordinates belong to the penalty; the others are projected away.
        sums: sums over the entries of a vector, whoever holds them.

    References:
        Ye, eqs. (4), (9), (10).
    """

    def __init__(self, map: LinearMap | Callable[[], LinearMap], takes_part: tuple[bool, ...], sums: Sums = LOCAL_SUMS):
        self._map, self._mask, self.sums = map, None if all(takes_part) else takes_part, sums

    @cached_property
    def map(self) -> LinearMap:
        """The map from these coordinates to p."""
        return self._map if isinstance(self._map, LinearMap) else self._map()

    def project(self, z: Vec) -> Vec:
        """Π z: zero in the coordinates that take no part."""
        return z if self._mask is None else vec.scale(z, [float(m) for m in self._mask])

    def push(self, z: Vec) -> Vec:
        """P Π z, a tangent."""
        return self.map.mv(self.project(z))

    def pull(self, g: Vec) -> Vec:
        """y = Π Pᵀ g, the gradient in these coordinates."""
        return self.project(self.map.rmv(g))

    def solve(self, p: Vec) -> Vec:
        """Π P⁻¹ p, the coordinates of p."""
        return self.project(self.map.solve(p))

    def scaled(self, p: Vec, scales: Sequence[Scalar]) -> Vec:
        """P Π Λ P⁻¹ p: p where each tensor of z is multiplied by a number."""
        own = scales if self._mask is None else [s * m for s, m in zip(scales, self._mask, strict=True)]
        return self.map.conjugated(p, own)

    def sharp(self, g: Vec) -> Vec:
        """P Π Pᵀ g: the tangent of steepest ascent; g in p, M g in z."""
        return self.map.gram(g) if self._mask is None else self.push(self.pull(g))

    def dual_norm(self, g: Vec, sharp: Vec | None = None) -> Tensor:
        """√(gᵀ P Π Pᵀ g), the length of the gradient in these coordinates."""
        return self.sums.dot(g, self.sharp(g) if sharp is None else sharp).clamp_min(0).sqrt()

    @abstractmethod
    def raised(self, v: Vec, scale: Scalar | Sequence[Scalar] = 1.0) -> Cotangent | Tangent:
        """The term of a penalty whose gradient, raised by this space's own metric, is scale·v.

        In z this is P ∇_z R, which moves p as it is; in p it is ∇_p R, which M multiplies.
        """


class P(Space):
    """The parameters as they are."""

    def __init__(self, takes_part: tuple[bool, ...], sums: Sums = LOCAL_SUMS):
        super().__init__(Identity(), takes_part, sums)

    def raised(self, v: Vec, scale: Scalar | Sequence[Scalar] = 1.0) -> Cotangent:
        return Cotangent(Tangent(v, scale).formed())


class Z(Space):
    """The preconditioned coordinates z = P⁻¹p."""

    def raised(self, v: Vec, scale: Scalar | Sequence[Scalar] = 1.0) -> Tangent:
        return Tangent(v, scale)
