r"""Symmetric maps that act on each layer's weight and bias as a Kronecker product, or in the eigenbasis of one; and all functions of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from precond.algebra.maps import Layout, LinearMap
from precond.algebra.maps.eigen import eigenpairs
from precond.algebra.vec import Vec
from precond.analysis.curvature.errors import Singular
from precond.analysis.curvature.symmetric import Block, SymmetricMap


@dataclass(frozen=True)
class Place:
    """Where a layer's weight and bias stand in a vector, and how they are one matrix [W b] (groups, rows, n + 1).

    Attributes:
        weight, bias: positions, or None where they are not among the tensors.
        layout: how the weight is seen as (groups, rows, n).
    """

    weight: int | None
    bias: int | None
    layout: Layout

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(i for i in (self.weight, self.bias) if i is not None)

    def matrix(self, v: Vec) -> Tensor:
        """[W b] of a vector."""
        parts = []
        if self.weight is not None:
            parts.append(self.layout.view(v[self.weight]))
        if self.bias is not None:
            parts.append(self.layout.column(v[self.bias]))
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def parted(self, X: Tensor, like: Vec) -> dict[int, Tensor]:
        """The tensors of a matrix, by position."""
        out = {}
        if self.weight is not None:
            n = X.shape[-1] - (self.bias is not None)
            out[self.weight] = self.layout.back(X[..., :n], like[self.weight])
        if self.bias is not None:
            out[self.bias] = self.layout.back(X[..., -1:], like[self.bias])
        return out


class Factor(ABC):
    """A symmetric map X ↦ … of matrices (…, groups, rows, n), Q diag(S) Qᵀ with Q = U ⊗ V."""

    @property
    @abstractmethod
    def basis(self) -> tuple[Tensor, Tensor]:
        """U (groups, rows, rows) and V (groups, n, n), orthogonal."""

    @property
    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """S, (groups, rows, n)."""

    @abstractmethod
    def product(self, X: Tensor) -> Tensor:
        """Applied to matrices."""

    def of(self, f: Callable[[Tensor], Tensor]) -> Factor:
        """Q diag(f(S)) Qᵀ."""
        return InBasis(*self.basis, f(self.eigenvalues))


@dataclass(frozen=True, eq=False)
class Pair(Factor):
    """B ⊗ A: X ↦ B X A.

    Attributes:
        B: of a layer's outputs, (groups, rows, rows).
        A: of its inputs, (groups, n, n).

    Example:
        >>> import torch
        >>> pair = Pair(torch.tensor([[[2.0]]]), torch.diag(torch.tensor([1.0, 3.0]))[None])
        >>> pair.product(torch.ones(1, 1, 2)), pair.eigenvalues
        (tensor([[[2., 6.]]]), tensor([[[2., 6.]]]))
    """

    B: Tensor
    A: Tensor

    @cached_property
    def _eigen(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return eigenpairs(self.B), eigenpairs(self.A)

    @property
    def basis(self) -> tuple[Tensor, Tensor]:
        (_, U), (_, V) = self._eigen
        return U, V

    @property
    def eigenvalues(self) -> Tensor:
        (b, _), (a, _) = self._eigen
        return b.clamp_min(0)[..., :, None] * a.clamp_min(0)[..., None, :]

    def product(self, X: Tensor) -> Tensor:
        return self.B @ X @ self.A

    def damped_apart(self, delta: float) -> Factor:
        """(B + √δ/π I) ⊗ (A + π√δ I), π² the quotient of the mean eigenvalues of A and B (Martens & Grosse, section 6.3)."""
        (b, U), (a, V) = self._eigen
        means = a.mean(-1, keepdim=True) / b.mean(-1, keepdim=True)
        pi = torch.where(means.isfinite() & (means > 0), means, 1.0).sqrt()
        b, a = b.clamp_min(0) + delta**0.5 / pi, a.clamp_min(0) + delta**0.5 * pi
        return InBasis(U, V, b[..., :, None] * a[..., None, :])


@dataclass(frozen=True, eq=False)
class InBasis(Factor):
    """(U ⊗ V) diag(S) (U ⊗ V)ᵀ: X ↦ U (S ⊙ UᵀX V) Vᵀ.

    Attributes:
        U: of a layer's outputs, (groups, rows, rows), orthogonal.
        V: of its inputs, (groups, n, n), orthogonal.
        S: eigenvalues, (groups, rows, n).

    Example:
        >>> import torch
        >>> InBasis(torch.eye(1)[None], torch.eye(2)[None], torch.tensor([[[2.0, 6.0]]])).product(torch.ones(1, 1, 2))
        tensor([[[2., 6.]]])
    """

    U: Tensor
    V: Tensor
    S: Tensor

    @property
    def basis(self) -> tuple[Tensor, Tensor]:
        return self.U, self.V

    @property
    def eigenvalues(self) -> Tensor:
        return self.S

    def product(self, X: Tensor) -> Tensor:
        return self.U @ ((self.U.mT @ X @ self.V) * self.S) @ self.V.mT


class LayerwiseMap(SymmetricMap):
    r"""A symmetric map K, block-diagonal over layers, of which all eigenvalues are known, and with them all functions f(K).

    ``mv`` is K v, ``solve`` K⁻¹v; ``inverse(damping)``, ``preconditioner(damping)`` and ``shifted(s)`` are such maps again.

    Attributes:
        like: an example of the vectors that it acts on.
        layers: names of the layers.
        places: of each layer, where its weight and bias stand.
        factors: of each layer, as :class:`Factor`: ``B`` and ``A`` of a Kronecker product, ``U``, ``V`` and ``S`` in a basis.
    """

    like: Vec

    def __init__(self, places: Mapping[str, Place], factors: Mapping[str, Factor], like: Vec):
        self.places, self.factors, self.like = dict(places), dict(factors), like

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.places)

    @property
    def eigenvalues(self) -> Tensor:
        """All of them, layer by layer, shape (n,). Their sum is the trace, the sum of their logarithms that of the determinant."""
        return torch.cat([factor.eigenvalues.flatten() for factor in self.factors.values()])

    def mv(self, v: Vec) -> Vec:
        return self._each(v, lambda place: place.matrix, lambda place: place.parted, self.like)

    def mm(self, block: Block) -> Block:
        split = lambda place: torch.vmap(place.matrix)  # noqa: E731
        join = lambda place: torch.vmap(place.parted, in_dims=(0, None))  # noqa: E731
        return self._each(block, split, join, self.like)

    def _each(self, v: Sequence[Tensor], split: Callable, join: Callable, like: Vec) -> Vec:
        out: dict[int, Tensor] = {}
        for name, place in self.places.items():
            X = split(place)(tuple(v))
            out |= join(place)(self.factors[name].product(X.to(torch.promote_types(X.dtype, torch.float32))), like)
        return tuple(out[i].to(t.dtype) for i, t in enumerate(like))

    def of(self, f: Callable[[Tensor], Tensor]) -> LayerwiseMap:
        """f(K): the same eigenvectors, f of the eigenvalues, given as (groups, rows, n) of each layer."""
        return LayerwiseMap(self.places, {name: factor.of(f) for name, factor in self.factors.items()}, self.like)

    def shifted(self, s: float) -> LayerwiseMap:
        """K + sI."""
        return self.of(lambda S: S + s)

    def inverse(self, damping: float = 0.0, how: Literal["whole", "apart"] = "whole") -> LayerwiseMap:
        r"""(K + δI)⁻¹.

        Args:
            damping: δ ≥ 0.
            how: ``"whole"``; or ``"apart"``, of Kronecker products alone: (B + √δ/π I)⁻¹ ⊗ (A + π√δ I)⁻¹.

        Raises:
            Singular: where an eigenvalue is null and δ = 0.
        """
        return self._damped("inverse", damping, how).of(torch.reciprocal)

    def preconditioner(self, damping: float = 0.0, how: Literal["whole", "apart"] = "whole") -> LayerwiseMap:
        r"""P = (K + δI)^(−1/2), the preconditioner with P Pᵀ = (K + δI)⁻¹: gradient descent in its z is the natural gradient's.

        ``PreconditionedGD(model, lr=…, preconditioner=Fixed(P))`` steps by it, ``P.T @ hessian(objective) @ P`` shows what it does to κ.

        Args:
            damping, how: as of :meth:`inverse`.

        Raises:
            Singular: where an eigenvalue is null and δ = 0.
        """
        return self._damped("preconditioner", damping, how).of(torch.rsqrt)

    def _damped(self, caller: str, damping: float, how: str) -> LayerwiseMap:
        if not damping >= 0:
            raise ValueError(f"{caller}: damping must be >= 0, got {damping!r}")
        if how not in ("whole", "apart"):
            raise ValueError(f"{caller}: how must be 'whole' or 'apart', got {how!r}")
        if how == "apart":
            if not all(isinstance(factor, Pair) for factor in self.factors.values()):
                raise ValueError(
                    f"{caller}: how='apart' is for Kronecker products, kfac(…); its factors are known no longer here"
                )
            apart = {name: factor.damped_apart(damping) for name, factor in self.factors.items() if isinstance(factor, Pair)}
            found = LayerwiseMap(self.places, apart, self.like)
        else:
            found = self.shifted(damping) if damping else self
        for name, factor in found.factors.items():
            S = factor.eigenvalues
            if S.numel() and bool(S.min() <= 16 * torch.finfo(S.dtype).eps * S.max() * (damping == 0)):
                raise Singular(
                    f"{caller}: the block of layer {name!r} is singular; give a damping > 0, such as 1e-3 of its mean eigenvalue"
                )
        return found

    @cached_property
    def _inverse(self) -> LayerwiseMap:
        return self.inverse()

    @cached_property
    def _square(self) -> LayerwiseMap:
        return self.of(torch.square)

    def solve(self, v: Vec) -> Vec:
        return self._inverse.mv(v)

    rsolve = solve

    def gram(self, v: Vec) -> Vec:
        return self._square.mv(v)

    def damped(self, delta: float) -> LinearMap:
        # Block by block, as of every map of blocks.
        return self if delta == 0 else self.of(lambda S: S * (1 + delta * S.square().reciprocal().mean() * S.square()).rsqrt())
