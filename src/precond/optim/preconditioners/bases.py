"""Eigenvectors of the factors of a matrix's sides, all of them or those that lead, and how they follow the gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.algebra.maps import Orthogonal
from precond.algebra.maps.eigen import in_general_position
from precond.algebra.maps.rotation import from_right, transposed
from precond.optim.preconditioners.eigenbases import at_hand, begin, decomposed_together, drift, least, orthonormal
from precond.optim.preconditioners.iteration import follow
from precond.optim.preconditioners.kronecker import fold
from precond.optim.preconditioners.roots import kept

Values = Mapping[str, Tensor]


class Basis(ABC):
    """Of one side, ``"left"`` or ``"right"``, of k matrices: S, running means of GGᵀ or GᵀG, and an orthonormal basis in force of each.

    The state holds the bases under the side's name with ``_basis``; one is the identity, or the identity's first columns, until it is
    chosen.
    """

    @abstractmethod
    def fresh(self, side: str, n: int, like: Tensor) -> dict[str, Tensor]:
        """The state of one S = 0, (n, n), in the dtype and on the device of ``like``."""

    @abstractmethod
    def fold(self, state: Values, side: str, G: Tensor, keep: float, early: bool) -> None:
        """S ← keep·S + (1 − keep)·GGᵀ, or GᵀG.

        Args:
            early: some G may be the first that is not zero.
        """

    @abstractmethod
    def times(self, state: Values, side: str) -> Callable[[Tensor], Tensor]:
        """Q ↦ S Q."""

    @abstractmethod
    def begin(self, state: Values, side: str) -> Tensor:
        """Choose bases of eigenvectors, where they are found (k,)."""

    @abstractmethod
    def follow(self, state: Values, side: str, may: Tensor | None) -> Tensor | None:
        """Let bases follow S, those that ``may`` (k,).

        Returns:
            The order in which the columns before were taken (k, n), or None: as they were.
        """

    def seen(self, state: Values, side: str) -> Tensor:
        """Whether S is not 0 (k,)."""
        return state[side].flatten(1).any(1)

    def chosen(self, state: Values, side: str) -> Tensor:
        """Whether the basis is no longer the identity (k,)."""
        return (state[f"{side}_basis"].diagonal(dim1=-2, dim2=-1) != 1).any(-1)

    def drift(self, state: Values, side: str, first: int) -> Tensor:
        """How far the basis in force is from eigenvectors; see :func:`precond.optim.preconditioners.eigenbases.drift`."""
        return drift(self.times(state, side), state[f"{side}_basis"], first)


class Whole(Basis):
    """S (n, n) itself, and all eigenvectors, which follow by orthogonal iteration."""

    def fresh(self, side: str, n: int, like: Tensor) -> dict[str, Tensor]:
        return {side: like.new_zeros(n, n), f"{side}_basis": torch.eye(n).to(like)}

    def fold(self, state: Values, side: str, G: Tensor, keep: float, early: bool) -> None:
        fold(state[side], G, side == "right", keep, 1 - keep)

    def times(self, state: Values, side: str) -> Callable[[Tensor], Tensor]:
        return state[side].__matmul__

    def begin(self, state: Values, side: str) -> Tensor:
        return begin(state[side], state[f"{side}_basis"])

    def follow(self, state: Values, side: str, may: Tensor | None) -> Tensor | None:
        return follow(state[side], state[f"{side}_basis"], may, 4 * state["r"][0].nbytes)  # a step takes as much


@dataclass(frozen=True)
class Leading(Basis):
    r"""S ≈ V·diag(λ)·Vᵀ of rank r, in which each new GGᵀ is followed by a step of orthogonal iteration from where V was.

    Columns of V have length 1 and are near the eigenvectors of S, which are taken when a basis is chosen or follows.
    Never is there a matrix of n² entries: a fold takes 8nmr operations for a gradient of nm entries.

    Args:
        rank: r < n.
    """

    rank: int

    def fresh(self, side: str, n: int, like: Tensor) -> dict[str, Tensor]:
        start = orthonormal(in_general_position(n, self.rank, like))
        return {side: like.new_zeros(self.rank), f"{side}_vectors": start, f"{side}_basis": torch.eye(n, self.rank).to(like)}

    def fold(self, state: Values, side: str, G: Tensor, keep: float, early: bool) -> None:
        X, values, V = G.mT if side == "right" else G, state[side], state[f"{side}_vectors"]
        A = X.new_empty(*X.shape[:-1], self.rank + X.shape[-1])  # the new S is a multiple of A Aᵀ
        scale = keep if keep else 1.0
        torch.mul(V, values.sqrt()[:, None] if keep else 0.0, out=A[..., : self.rank])
        torch.mul(X, ((1 - keep) / scale) ** 0.5, out=A[..., self.rank :])
        step = lambda Q: torch.linalg.qr(A @ (A.mT @ Q)).Q  # noqa: E731
        start, known = V, self.seen(state, side) if early else None
        if known is not None and not (at_hand(V) and bool(known.all())):  # V is in general position yet where S is 0
            start = torch.where(known[:, None, None], V, step(step(V)))
        Q = step(start)
        R = torch.linalg.qr(A.mT @ Q, mode="r").R
        L = torch.baddbmm(Q, Q, R.mT, beta=0, alpha=scale**0.5)  # S = L Lᵀ now
        sizes = torch.linalg.vector_norm(L, dim=-2)
        squares = sizes.square()
        # Columns of rounding are left out: those of V stay, which no rounding decides. So does all where something is not finite.
        some = squares > least(L.shape[-2], L.dtype) * squares.amax(-1, keepdim=True)
        if at_hand(L) and not bool(sizes.isfinite().all()):
            kept(L)
        torch.mul(squares.nan_to_num_(0.0, 0.0), some, out=values)
        torch.where(some[:, None], L.div_(sizes[:, None]), V, out=V)

    def times(self, state: Values, side: str) -> Callable[[Tensor], Tensor]:
        values, V = state[side], state[f"{side}_vectors"]
        return lambda Q: V @ (values[..., None] * (V.mT @ Q))

    def begin(self, state: Values, side: str) -> Tensor:
        return self._choose(state, side, None, exactly=True)

    def follow(self, state: Values, side: str, may: Tensor | None) -> Tensor | None:
        self._choose(state, side, may, exactly=at_hand(state[side]))
        return None

    def _choose(self, state: Values, side: str, may: Tensor | None, exactly: bool) -> Tensor:
        """Bases of the eigenvectors of S, where it is not 0; which they are (k,)."""
        values, V, basis = state[side], state[f"{side}_vectors"], state[f"{side}_basis"]
        top = values.amax(-1, keepdim=True)
        moves = (top > 0)[:, 0] if may is None else may & (top > 0)[:, 0]
        L = V * (values / top).sqrt_()[:, None]
        C = L.mT @ L
        if exactly:
            _, W, found = decomposed_together(torch.where(moves[:, None, None], C, 0.0))
            W, moves = W.flip(-1), moves & found
        else:
            W = torch.linalg.qr(C).Q  # a step for a matrix near a diagonal one; each fold is a step of this kind, too
        torch.where(moves[:, None, None], orthonormal(L @ W), basis, out=basis)
        return moves


WHOLE = Whole()


def basis_of(state: Values, side: str) -> Basis | None:
    """How the bases of a side are kept in a state (of a stack); None where that side has none."""
    if side not in state:
        return None
    return WHOLE if state[side].ndim == 3 else Leading(state[side].shape[-1])


def turned(X: Tensor, Q: Orthogonal | None, side: str, back: bool) -> Tensor:
    """QᵀX, or X Q, of matrices X; or back."""
    if Q is None:
        return X
    if side == "left":
        return (Q if back else transposed(Q)) @ X
    return from_right(transposed(Q) if back else Q, X)
