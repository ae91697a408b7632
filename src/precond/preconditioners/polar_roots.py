"""Roots L^(−1/2) that :class:`~precond.Polar` keeps: the whole of them, or their leading part with one number for the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.maps import Layout, LinearMap, Spiked, SymmetricKronecker
from precond.preconditioners.roots import inverse_root, leading_inverse_root


class Root(ABC):
    """How L^(−1/2) of a symmetric positive L (n, n) is kept and found.

    Attributes:
        whole: whether it has all eigenvalues of L, so that where L is mmᵀ it makes m's polar factor.
    """

    whole: bool

    @abstractmethod
    def fresh(self, L: Tensor) -> dict[str, Tensor]:
        """The state of L^(−1/2) = I, for an L of this shape."""

    @abstractmethod
    def renew(self, state: Mapping[str, Tensor], L: Tensor, damping: float) -> None:
        """Find it anew; where that fails it stays."""

    @abstractmethod
    def times(self, state: Mapping[str, Tensor], X: Tensor) -> Tensor:
        """L^(−1/2)X."""

    @abstractmethod
    def matrix(self, state: Mapping[str, Tensor]) -> Tensor:
        """It, (n, n)."""

    @abstractmethod
    def map(self, state: Mapping[str, Tensor], matrix: Tensor) -> LinearMap:
        """P with P Pᵀm = L^(−1/2)m, or m L^(−1/2) where m, as the example ``matrix``, is tall."""


class Whole(Root):
    """A matrix."""

    whole = True

    def fresh(self, L: Tensor) -> dict[str, Tensor]:
        return {"root": torch.eye(len(L)).to(L)}

    def renew(self, state: Mapping[str, Tensor], L: Tensor, damping: float) -> None:
        if (root := inverse_root(L, 0.5, damping)) is not None:
            state["root"].copy_(root)

    def times(self, state: Mapping[str, Tensor], X: Tensor) -> Tensor:
        return state["root"] @ X

    def matrix(self, state: Mapping[str, Tensor]) -> Tensor:
        return state["root"]

    def map(self, state: Mapping[str, Tensor], matrix: Tensor) -> LinearMap:
        Q = state["root"]
        return SymmetricKronecker(Q, None, (matrix,)) if _is_wide(matrix) else SymmetricKronecker(None, Q, (matrix,))


@dataclass(frozen=True)
class Leading(Root):
    """aI + U·diag(s − a)·Uᵀ, with the leading eigenvalues of L and the mean of all others.

    Args:
        rank: how many.
    """

    rank: int
    whole = False

    def fresh(self, L: Tensor) -> dict[str, Tensor]:
        return {"basis": torch.eye(len(L), self.rank).to(L), "leading": L.new_ones(self.rank), "rest": L.new_ones(())}

    def renew(self, state: Mapping[str, Tensor], L: Tensor, damping: float) -> None:
        known = state["basis"] if bool((state["leading"] - 1).any()) else None  # fresh, or of L = 0
        if (found := leading_inverse_root(L, 0.5, damping, known, self.rank)) is not None:
            for name, value in zip(("basis", "leading", "rest"), found, strict=True):
                state[name].copy_(value)

    def times(self, state: Mapping[str, Tensor], X: Tensor) -> Tensor:
        U, a = state["basis"], state["rest"]
        return a * X + (U * (state["leading"] - a)) @ (U.T @ X)

    def matrix(self, state: Mapping[str, Tensor]) -> Tensor:
        U = state["basis"]
        return self.times(state, torch.eye(len(U)).to(U))

    def map(self, state: Mapping[str, Tensor], matrix: Tensor) -> LinearMap:
        root = (state["basis"][None], state["leading"].sqrt()[None], state["rest"].sqrt()[None])
        return Spiked(*root, (matrix,), Layout(transposed=_is_wide(matrix)))


def _is_wide(matrix: Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


WHOLE = Whole()


def root_of(state: Mapping[str, Tensor]) -> Root:
    """The root that a state of :class:`~precond.Polar` holds."""
    return WHOLE if "root" in state else Leading(state["basis"].shape[1])
