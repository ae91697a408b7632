"""What a regularizer is: a penalty in p or in z, written once against a :class:`~precond.algebra.spaces.Space`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from precond.algebra import checks
from precond.algebra.maps import LinearMap
from precond.algebra.sharding import LOCAL_SUMS, Sums
from precond.algebra.spaces import Bend, Prox, Space, Tangent, Term
from precond.algebra.vec import Scalar, Vec
from precond.optim.blocks import Leaf, Rule
from precond.optim.checking import contracts
from precond.optim.preconditioners.base import Preconditioner

SPACES = ("p", "z")


class At:
    """Where a penalty is evaluated; what costs something is made when it is first asked for.

    Attributes:
        p: the parameters (unperturbed).
        g: the loss gradient at p.
        lr: the learning rate of each tensor.
        takes_part: which tensors take part.
        dtype: the narrowest dtype in which parameters are stored.
        found: the gradients at the probed points, in the order of :meth:`Regularizer.probe`.
        hessian: v ↦ H v by double backprop, where the closure allows it.
        memo: what ``probe`` leaves for ``term`` of the same step.
        sums: products and norms of vectors over all entries, whoever holds them.
        joint: the tensors that P takes jointly.
        leaves: what is known of each tensor.
        values: a name of the regularizer's ↦ its value on each tensor: what ``at["lam"]`` asks.
        make_space, make_map: make :attr:`space` and :attr:`map`, when they are first asked for.
    """

    def __init__(
        self,
        p: Vec,
        g: Vec,
        lr: Sequence[Scalar],
        values: Callable[[str], Sequence[Scalar]],
        takes_part: tuple[bool, ...],
        make_space: Callable[[], Space],
        make_map: Callable[[], LinearMap],
        dtype: torch.dtype = torch.float32,
        found: tuple[Vec, ...] = (),
        hessian: Callable[[Vec], Vec] | None = None,
        memo: dict[str, Any] | None = None,
        sums: Sums = LOCAL_SUMS,
        joint: Sequence[slice] | None = None,
        leaves: Sequence[Leaf] = (),
    ):
        self.p, self.g, self.lr, self.takes_part, self.dtype, self.found = p, g, lr, takes_part, dtype, found
        self.hessian, self.memo, self.sums = hessian, {} if memo is None else memo, sums
        self.joint, self.leaves = [slice(0, len(p))] if joint is None else joint, leaves
        self._values, self._make_space, self._make_map = values, make_space, make_map

    @cached_property
    def space(self) -> Space:
        """The coordinates of the penalty, restricted to the parameters that take part, with M damped where that applies."""
        return self._make_space()

    @cached_property
    def map(self) -> LinearMap:
        """P, without damping and without the restriction."""
        return self._make_map()

    def __getitem__(self, name: str) -> Sequence[Scalar]:
        """The value of a number of the regularizer on each tensor; 0 where a tensor takes no part."""
        return self._values(name)

    @property
    def size(self) -> Tensor:
        """‖p‖ over the parameters that take part: the scale of finite-difference steps."""
        return self.sums.norm(tuple(t if m else t.new_empty(0) for t, m in zip(self.p, self.takes_part, strict=True)))


def _check_term(self: Regularizer, returned: Any, at: At) -> None:
    who = f"{type(self).__name__}.term"
    if not isinstance(returned, Term):
        raise TypeError(
            f"{who} returned {type(returned).__name__}; return at.space.raised(v), which is a Cotangent(v) in p, that M multiplies, "
            "and a Tangent(v) in z, that moves p as it is; or Instead(g), Prox(f), or Bend(f, stage)"
        )
    if not isinstance(returned, Prox | Bend):
        contracts.shapes(who, returned.vec, at.p)


def _check_probe(self: Regularizer, returned: Any, at: At) -> None:
    who = f"{type(self).__name__}.probe"
    if not isinstance(returned, tuple) or not all(isinstance(d, Tangent) for d in returned):
        raise TypeError(f"{who} returned {type(returned).__name__}; return a tuple of Tangents, (Tangent(d),), () for none")
    for displacement in returned:
        contracts.shapes(who, displacement.vec, at.p)


_CHECKS: dict[str, Callable[..., None]] = {"term": _check_term, "probe": _check_probe}
_SIGNATURES = {"term": "term(self, at), which returns at.space.raised(v), a Cotangent or Tangent"}


class Regularizer(ABC):
    """A frozen penalty λR.

    A new one is one file: a frozen dataclass with ``term`` and, if it needs gradients elsewhere, ``probe``.

    Attributes:
        scalars: names of the fields that may differ per tensor (λ, ρ); they may be numbers or schedules. A tensor on which all are
            0 takes no part.
        probes: whether it needs gradients at other points.
        exact: whether it needs Hessian–vector products by double backprop.
        replaces_gradient: its term stands in place of the loss gradient, which need not be kept.
        takes_damping: whether M is damped inside the penalty.

    Example:
        >>> import torch, precond
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Drift(precond.Regularizer):  # λ Σ x, x the coordinates: a constant force
        ...     lam: float
        ...     space: str = "z"
        ...
        ...     def term(self, at):
        ...         return at.space.raised(at.space.push(tuple(lam * torch.ones_like(t) for t, lam in zip(at.p, at["lam"]))))
        >>> p = torch.nn.Parameter(torch.tensor([0.0]))
        >>> P = precond.Fixed(precond.Diagonal((torch.tensor([2.0]),)))
        >>> optimizer = precond.PreconditionedGD([p], lr=0.5, preconditioner=P, regularizers=[Drift(1.0)])
        >>> p.grad = torch.tensor([0.0]); _ = optimizer.step(); p.item()  # −αPλ
        -1.0
    """

    scalars: tuple[str, ...] = ("lam",)
    probes: bool = False
    exact: bool = False
    replaces_gradient: bool = False
    takes_damping: bool = False

    space: str
    where: Rule | None = None
    damping: float | None = None

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if isinstance(cls.scalars, str):
            raise TypeError(
                f"{cls.__name__}: scalars is {cls.scalars!r}; make it a tuple of names, ({cls.scalars!r},), () for none"
            )
        contracts.checked(cls, _CHECKS)

    def __new__(cls, *args: Any, **more: Any) -> Regularizer:
        contracts.whole(cls, _SIGNATURES)
        return super().__new__(cls)

    def validate(self, preconditioner: Preconditioner) -> None:
        """Raise ValueError where the penalty is not defined for the preconditioner's map."""
        checks.one_of(type(self).__name__, "space", self.space, SPACES)

    @property
    def needs_map(self) -> bool:
        """Whether P must be known before the term is."""
        return self.space == "z"

    def waits(self, at: At) -> bool:
        """Whether its term there waits for P."""
        return self.needs_map

    @property
    def circular(self) -> bool:
        """Whether its term is a cotangent that needs P, so that P cannot be built from the regularized gradient."""
        return False

    @property
    def joins_gradient(self) -> bool:
        """Whether its term is a cotangent, which M multiplies."""
        return self.probes or self.exact or self.space == "p"

    def probe(self, at: At) -> tuple[Tangent, ...]:
        """Displacements δ of the points p + δ at which further gradients are wanted; empty: none."""
        return ()

    @abstractmethod
    def term(self, at: At) -> Term:
        """What the penalty adds to the step."""

    def stiffness(self, at: At) -> Sequence[Scalar]:
        """The largest curvature, of each tensor, of a penalty whose term joins the gradient; 0 where that has none, or it is not known."""
        return [0.0] * len(at.p)

    def value(self, at: At) -> Tensor | float:
        """λR(p), for logging; NaN says that a class does not tell it."""
        return float("nan")


def needs_root(owner: str, reason: str, preconditioner: Preconditioner) -> None:
    """Raise ValueError where a preconditioner states M alone."""
    if not preconditioner.states_root:
        raise ValueError(
            f"{owner}: {reason} depends on the root P of M = P Pᵀ, and {type(preconditioner).__name__} states no root; "
            "use space='p', or a preconditioner with a stated root (diagonal, BNP, Cholesky, Fixed(Dense(P)))"
        )


def needs_inverse(owner: str, reason: str, preconditioner: Preconditioner) -> None:
    """Raise ValueError where z = P⁻¹p does not exist."""
    if not preconditioner.invertible:
        raise ValueError(
            f"{owner}: {reason} needs z = P⁻¹p, and the map of {type(preconditioner).__name__} is singular; use space='p'"
        )
