"""Eigenvectors of the factors of a matrix's sides, all of them or those that lead, and how they follow the gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.maps.eigen import in_general_position, leading_pairs
from precond.preconditioners.kronecker import fold
from precond.preconditioners.roots import decomposed, drift, eigenbasis, power_step


class Basis(ABC):
    """Of one side of a matrix, ``"left"`` or ``"right"``: S, a running mean of GGᵀ or GᵀG, and an orthonormal basis in force.

    The state holds the basis under the side's name with ``_basis``; it is the identity, or the identity's first columns, until it is chosen.
    """

    @abstractmethod
    def fresh(self, side: str, n: int, like: Tensor) -> dict[str, Tensor]:
        """The state of S = 0, (n, n), in the dtype and on the device of ``like``."""

    @abstractmethod
    def fold(self, state: Mapping[str, Tensor], side: str, G: Tensor, keep: float) -> None:
        """S ← keep·S + (1 − keep)·GGᵀ, or GᵀG."""

    @abstractmethod
    def times(self, state: Mapping[str, Tensor], side: str) -> Callable[[Tensor], Tensor]:
        """Q ↦ S Q."""

    @abstractmethod
    def first(self, state: Mapping[str, Tensor], side: str) -> Tensor | None:
        """The basis of the eigenvectors, or None where that fails."""

    @abstractmethod
    def next(self, state: Mapping[str, Tensor], side: str) -> tuple[Tensor, Tensor | None] | None:
        """(a basis that has followed S, the order in which it took the columns of the one before, or None: as they were)."""

    def seen(self, state: Mapping[str, Tensor], side: str) -> bool:
        """Whether S is not 0."""
        return bool(state[side].any())

    def drift(self, state: Mapping[str, Tensor], side: str, first: int) -> float:
        """How far the basis in force is from eigenvectors; see :func:`precond.preconditioners.roots.drift`."""
        return drift(self.times(state, side), state[f"{side}_basis"], first)


class Whole(Basis):
    """S (n, n) itself, and all eigenvectors, which follow by orthogonal iteration."""

    def fresh(self, side: str, n: int, like: Tensor) -> dict[str, Tensor]:
        return {side: like.new_zeros(n, n), f"{side}_basis": torch.eye(n).to(like)}

    def fold(self, state: Mapping[str, Tensor], side: str, G: Tensor, keep: float) -> None:
        fold(state[side], G, side == "right", keep, 1 - keep)

    def times(self, state: Mapping[str, Tensor], side: str) -> Callable[[Tensor], Tensor]:
        return state[side].__matmul__

    def first(self, state: Mapping[str, Tensor], side: str) -> Tensor | None:
        found = eigenbasis(state[side])
        return None if found is None else found[1]

    def next(self, state: Mapping[str, Tensor], side: str) -> tuple[Tensor, Tensor | None] | None:
        return power_step(state[side], state[f"{side}_basis"])


@dataclass(frozen=True)
class Leading(Basis):
    r"""S ≈ V·diag(λ)·Vᵀ of rank r, in which each new GGᵀ is followed by a step of orthogonal iteration from where V was.

    Never is there a matrix of n² entries: a fold takes 8nmr operations for a gradient of nm entries.

    Args:
        rank: r < n.
    """

    rank: int

    def fresh(self, side: str, n: int, like: Tensor) -> dict[str, Tensor]:
        eye = torch.eye(n, self.rank).to(like)
        return {side: like.new_zeros(self.rank), f"{side}_vectors": eye, f"{side}_basis": eye.clone()}

    def fold(self, state: Mapping[str, Tensor], side: str, G: Tensor, keep: float) -> None:
        X, V, old = G.T if side == "right" else G, state[f"{side}_vectors"], self.times(state, side)
        start, steps = (V, 1) if self.seen(state, side) else (in_general_position(V.shape[0], V.shape[1], V), 3)
        new = lambda Q: torch.add(keep * old(Q), X @ (X.T @ Q), alpha=1 - keep)  # noqa: E731
        if (found := decomposed(G, lambda _: leading_pairs(new, start, steps))) is not None:
            state[side].copy_(found[0].flip(0))
            V.copy_(found[1].flip(1))

    def times(self, state: Mapping[str, Tensor], side: str) -> Callable[[Tensor], Tensor]:
        values, V = state[side], state[f"{side}_vectors"]
        return lambda Q: V @ (values[:, None] * (V.T @ Q))

    def first(self, state: Mapping[str, Tensor], side: str) -> Tensor | None:
        return state[f"{side}_vectors"].clone()

    def next(self, state: Mapping[str, Tensor], side: str) -> tuple[Tensor, Tensor | None] | None:
        return state[f"{side}_vectors"].clone(), None


WHOLE = Whole()


def basis_of(state: Mapping[str, Tensor], side: str) -> Basis | None:
    """How the basis of a side is kept in a state; None where that side has none."""
    if side not in state:
        return None
    return WHOLE if state[side].ndim == 2 else Leading(len(state[side]))
