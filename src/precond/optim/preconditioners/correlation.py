"""Roots of the inverse of a correlation matrix K: of the whole of it, or of its leading part with one number for the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from precond.algebra.maps import Layout, LinearMap, RowMatrix, Spiked
from precond.algebra.maps.eigen import eigenpairs, followed, in_general_position, leading_pairs
from precond.algebra.precision import rounding
from precond.algebra.vec import Vec
from precond.optim.inputs.moments import variances
from precond.optim.preconditioners.eigenbases import at_hand
from precond.optim.preconditioners.rational import inverse_roots


@dataclass(frozen=True)
class Correlation:
    """K = (1 − γ)D⁻¹CD⁻¹ + γI of groups of features: (groups, n, n), with ones on its diagonal.

    Attributes:
        covariance: C, about the mean.
        mean: what C becomes E[hhᵀ] by, or None where it is to stay about the mean.
        std: D (groups, n).
        shrunk: 1/(1 − γ): a number, or a column of one a group.
    """

    covariance: Tensor
    mean: Tensor | None
    std: Tensor
    shrunk: float | Tensor

    @classmethod
    def joined(cls, some: Sequence[Correlation]) -> Correlation:
        """Of several layers with as many features, one after the other; all of them about the mean, or none."""
        if len(some) == 1:
            return some[0]
        means = [K.mean for K in some if K.mean is not None]
        numbers = [K.shrunk if isinstance(K.shrunk, Tensor) else K.std.new_full((len(K.std), 1), K.shrunk) for K in some]
        joined = torch.cat
        return cls(
            joined([K.covariance for K in some]),
            joined(means) if means else None,
            joined([K.std for K in some]),
            joined(numbers),
        )

    def whole(self) -> Tensor:
        """K."""
        m = self.mean
        C = self.covariance if m is None else torch.baddbmm(self.covariance, m[..., :, None], m[..., None, :])
        K = (C / self.std[..., :, None]).div_((self.shrunk * self.std)[..., None, :])
        K.diagonal(dim1=-2, dim2=-1).fill_(1.0)  # also of inputs that were always zero
        return K

    def unshrunk(self, Q: Tensor) -> Tensor:
        """D⁻¹CD⁻¹Q, without that matrix."""
        X = Q / self.std[..., None]
        square = variances(self.covariance, self.std)
        Y = self.covariance @ X
        if self.mean is not None:
            square = square + self.mean.square()
            Y += self.mean[..., None] * (self.mean[..., None, :] @ X)
        return Y / self.std[..., None] + Q * (1 - square / self.std.square())[..., None]


class Root(ABC):
    """How R with R Rᵀ = K^(−p) is kept and found."""

    @abstractmethod
    def fresh(self, mean: Tensor) -> dict[str, Tensor]:
        """The state of R = I, for a mean of the features (groups, n)."""

    @abstractmethod
    def renew(self, states: Sequence[dict[str, Tensor]], of: Sequence[Correlation]) -> None:
        """Find R anew, of each of some layers with its K."""

    @abstractmethod
    def map(self, state: dict[str, Tensor], like: Vec, layout: Layout) -> LinearMap:
        """R on the rows of a layer's weight."""


@dataclass(frozen=True)
class Whole(Root):
    """``"symmetric"``, K^(−p/2), or with p = 1 ``"cholesky"``, L⁻ᵀ with K = LLᵀ."""

    kind: Literal["symmetric", "cholesky"]
    power: float = 1.0

    def fresh(self, mean: Tensor) -> dict[str, Tensor]:
        return {"factor": _eyes(mean, mean.shape[-1])}

    def renew(self, states: Sequence[dict[str, Tensor]], of: Sequence[Correlation]) -> None:
        alike: dict[tuple[int, bool], list[int]] = {}
        for i, K in enumerate(of):
            alike.setdefault((K.std.shape[-1], K.mean is None), []).append(i)
        for some in alike.values():
            R = inverse_root(Correlation.joined([of[i] for i in some]).whole(), self.kind, self.power)
            for i, own in zip(some, R.split([len(of[i].std) for i in some]), strict=True):
                states[i]["factor"].copy_(own)

    def map(self, state: dict[str, Tensor], like: Vec, layout: Layout) -> LinearMap:
        return RowMatrix(state["factor"], like, layout)


@dataclass(frozen=True)
class Leading(Root):
    r"""K^(−p/2) with K ≈ λ̄I + U(Λ − λ̄)Uᵀ: r leading eigenvalues Λ and their eigenvectors U, and the mean λ̄ of all others.

    Of all matrices of this form it is the likeliest given K (Tipping & Bishop, 1999, eq. 7, 8). U moves by orthogonal iteration with
    the new K from where it was, n²r operations; at first by some steps from columns in general position.
    """

    rank: int
    power: float = 1.0

    def fresh(self, mean: Tensor) -> dict[str, Tensor]:
        groups = len(mean)
        return {"basis": _eyes(mean, self.rank), "leading": mean.new_ones(groups, self.rank), "rest": mean.new_ones(groups)}

    def renew(self, states: Sequence[dict[str, Tensor]], of: Sequence[Correlation]) -> None:
        for state, K in zip(states, of, strict=True):
            self._renew(state, K)

    def _renew(self, state: dict[str, Tensor], K: Correlation) -> None:
        Q = state["basis"]
        n = Q.shape[-2]
        fresh = (state["leading"] == 1).all(-1)[:, None, None]
        Q = torch.where(fresh, in_general_position(n, self.rank, Q), Q)
        # Not of K itself, whose eigenvectors are the same but nearer to each other in eigenvalues.
        if not at_hand(Q):
            values, U = followed(K.unshrunk, Q, 4)
        else:
            values, U = leading_pairs(K.unshrunk, Q, 3 if bool(fresh.any()) else 1)
        values = (values + (K.shrunk - 1)) / K.shrunk
        # The trace of K is n.
        rest = (n - values.sum(-1)) / (n - self.rank)
        floor = values.amax(-1) * rounding(n, Q.dtype)
        state["basis"].copy_(U)
        state["leading"].copy_(torch.maximum(values, floor[..., None]).pow_(-self.power / 2))
        state["rest"].copy_(torch.maximum(rest, floor).pow_(-self.power / 2))

    def map(self, state: dict[str, Tensor], like: Vec, layout: Layout) -> LinearMap:
        return Spiked(state["basis"], state["leading"], state["rest"], like, layout)


def _eyes(mean: Tensor, columns: int) -> Tensor:
    """The first columns of the identity, for each group."""
    groups, n = mean.shape
    return torch.eye(n, columns, dtype=mean.dtype, device=mean.device).repeat(groups, 1, 1)


def inverse_root(K: Tensor, root: str, power: float = 1.0) -> Tensor:
    """R with R Rᵀ = K^(−p) for symmetric positive definite K (…, n, n), which may be written over: K^(−p/2), or with p = 1 L⁻ᵀ with K = LLᵀ."""
    least = rounding(K.shape[-1], K.dtype)
    if power == 0:
        return torch.eye(K.shape[-1]).to(K).expand_as(K)
    if root == "cholesky":
        L, info = torch.linalg.cholesky_ex(K)
        if not at_hand(K):
            return torch.where((info == 0)[..., None, None], inverse_of_triangular(L).mT, inverse_roots(K, 0.5, least))
        if not bool(info.any()):
            return inverse_of_triangular(L).mT
        if K.ndim > 2 and len(K) > 1:  # one that has none takes it from no other
            return torch.cat([inverse_root(own[None], root, power) for own in K])
    if not at_hand(K):
        return inverse_roots(K, power / 2, least)
    values, V = eigenpairs(K)
    floor = values.amax(-1, keepdim=True) * least
    scaled = V * torch.maximum(values, floor).pow(-power / 2)[..., None, :]
    return scaled @ V.mT


def inverse_of_triangular(L: Tensor) -> Tensor:
    """L⁻¹ of a lower triangular L (…, n, n); of a large one by halves: products are twice as fast as a triangular solve for the identity."""
    n = L.shape[-1]
    if n <= 512:
        return torch.linalg.solve_triangular(L, torch.eye(n, dtype=L.dtype, device=L.device), upper=False)
    k, found = n // 2, torch.zeros_like(L)
    A, C = inverse_of_triangular(L[..., :k, :k]), inverse_of_triangular(L[..., k:, k:])
    found[..., :k, :k], found[..., k:, k:] = A, C
    found[..., k:, :k] = -(C @ (L[..., k:, :k] @ A))
    return found
