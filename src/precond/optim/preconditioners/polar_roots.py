"""Roots L^(−1/2) that :class:`~precond.Polar` keeps: the whole of them, or their leading part with one number for the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from precond.algebra.maps import Layout, LinearMap, SideBySide, Spiked, SymmetricKronecker
from precond.algebra.maps.eigen import followed, in_general_position
from precond.algebra.precision import rounding
from precond.optim.preconditioners.eigenbases import at_hand
from precond.optim.preconditioners.rational import renew
from precond.optim.preconditioners.roots import damped_pairs, leading_inverse_root
from precond.optim.preconditioners.square_roots import by_products, inverse_square_roots


class Root(ABC):
    """How L^(−1/2) of a symmetric positive L (n, n) is kept and found.

    Attributes:
        whole: whether it has all eigenvalues of L, so that where L is mmᵀ it makes m's polar factor.
    """

    whole: bool

    @abstractmethod
    def fresh(self, L: Tensor) -> dict[str, Tensor]:
        """The state of L^(−1/2) = I, for an L (n, n)."""

    @abstractmethod
    def renew(self, state: Mapping[str, Tensor], L: Tensor, damping: float) -> Tensor:
        """Find it anew, of L (n, n) with a trace about 1 or 0, or of several side by side (k, n, n); where that fails it stays.

        Returns:
            tr L(L + ε λ₁I)⁻¹, the number of directions in which L is not small, of each.
        """

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

    def renew(self, state: Mapping[str, Tensor], L: Tensor, damping: float) -> Tensor:
        root = state["root"]
        if not at_hand(L):
            renew([root], [L], 0.5, damping)
            return (L @ root).mul_(root).sum((-2, -1))
        found = renew_whole(list(root) if L.ndim == 3 else [root], list(L) if L.ndim == 3 else [L], damping)
        return torch.stack(found) if L.ndim == 3 else found[0]

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

    def renew(self, state: Mapping[str, Tensor], L: Tensor, damping: float) -> Tensor:
        self._renew(state, L, damping)
        return self._directions(state, L.shape[-1], damping)

    def _renew(self, state: Mapping[str, Tensor], L: Tensor, damping: float) -> None:
        names = ("basis", "leading", "rest")
        if not at_hand(L):
            for name, value in zip(names, self._followed(state, L, damping), strict=True):
                state[name].copy_(value)
            return
        each = [{name: state[name][i] for name in names} for i in range(len(L))] if L.ndim == 3 else [state]
        for S, mine in zip(L if L.ndim == 3 else [L], each, strict=True):
            known = mine["basis"] if bool((mine["leading"] - 1).any()) else None  # fresh, or of L = 0
            if (found := leading_inverse_root(S, 0.5, damping, known, self.rank)) is not None:
                for name, value in zip(names, found, strict=True):
                    mine[name].copy_(value)

    def _followed(self, state: Mapping[str, Tensor], L: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
        """The same of (k, n, n) by orthogonal iteration from where the basis was, without a look at the numbers."""
        n, r = L.shape[-1], self.rank
        fresh = (state["leading"] == 1).all(-1)[:, None, None]
        start = torch.where(fresh, in_general_position(n, r, L), state["basis"])
        values, U = followed(lambda Q: L @ Q, start, 4)
        rest = (L.diagonal(dim1=-2, dim2=-1).sum(-1) - values.sum(-1)) / (n - r)
        top = values.amax(-1, keepdim=True)
        both = torch.cat([values, rest[:, None]], 1).clamp_min(0) + max(damping, rounding(n, L.dtype)) * top
        both = torch.where(top > 0, both.rsqrt(), 1.0)
        return U, both[:, :r], both[:, r]

    def _directions(self, state: Mapping[str, Tensor], n: int, damping: float) -> Tensor:
        # The roots are 1/√(λ + ελ₁), with a damping that is never below rounding; what is no more than rounding is no direction.
        s, a = state["leading"].square(), state["rest"].square()
        zero = rounding(n, s.dtype)
        least = max(damping, zero)
        damped = (1 + least) * s.amin(-1, keepdim=True) / torch.cat([s, a[..., None]], -1)  # (λ + ελ₁)/λ₁
        shares = (damped - least - zero).clamp_min(0) / damped
        return shares[..., :-1].sum(-1) + (n - s.shape[-1]) * shares[..., -1]

    def times(self, state: Mapping[str, Tensor], X: Tensor) -> Tensor:
        U, s, a = state["basis"], state["leading"], state["rest"]
        return (a[..., None, None] * X).add_((U * (s - a[..., None])[..., None, :]) @ (U.mT @ X))

    def matrix(self, state: Mapping[str, Tensor]) -> Tensor:
        U = state["basis"]
        return self.times(state, torch.eye(len(U)).to(U))

    def map(self, state: Mapping[str, Tensor], matrix: Tensor) -> LinearMap:
        U, s, a, layout = state["basis"], state["leading"].sqrt(), state["rest"].sqrt(), Layout(transposed=_is_wide(matrix))
        if matrix.ndim == 3:
            return Spiked(U, s, a, (matrix,), SideBySide.all(layout, len(matrix)))
        return Spiked(U[None], s[None], a[None], (matrix,), layout)


def _is_wide(matrix: Tensor) -> bool:
    return matrix.shape[-2] <= matrix.shape[-1]


WHOLE = Whole()


def fold_all(states: Sequence[Mapping[str, Tensor]], grams: Sequence[Tensor], shares: Sequence[float], damping: float) -> None:
    """Fold Gram matrices (n, n) of layers into their L, with a share each, and take the roots anew, on a processor."""
    Ls = [state["gram"] for state in states]
    torch._foreach_lerp_(Ls, list(grams), list(shares))
    increment_version(Ls)  # below a dispatch mode multi-tensor operations leave it as it is
    whole = [state for state in states if root_of(state).whole]
    ranks = renew_whole([state["root"] for state in whole], [state["gram"] for state in whole], damping)
    for state, rank in zip(whole, ranks, strict=True):
        state["rank"].copy_(rank)
    for state in states:
        if not (root := root_of(state)).whole:
            state["rank"].copy_(root.renew(state, state["gram"], damping))


def renew_whole(roots: Sequence[Tensor], Ls: Sequence[Tensor], damping: float) -> list[Tensor]:
    """Several L^(−1/2) (n, n) of any sizes on a processor, in place; what :meth:`Root.renew` returns of each."""
    by_them = all(by_products(L, damping) for L in Ls)
    known = inverse_square_roots(Ls, damping) if by_them else [None] * len(Ls)
    return [_renewed(*each, damping) for each in zip(roots, Ls, known, strict=True)]


def _renewed(root: Tensor, L: Tensor, known: tuple[Tensor, Tensor] | None, damping: float) -> Tensor:
    if known is not None:
        root.copy_(known[0])
        return known[1]
    if (pairs := damped_pairs(L, damping)) is None:
        return (L @ root).mul_(root).sum()
    values, damped, V = pairs
    s = damped.rsqrt_()
    torch.mm(V * s, V.T, out=root)
    return torch.dot(values.clamp_min_(0), s.square_())


def root_of(state: Mapping[str, Tensor]) -> Root:
    """The root that a state of :class:`~precond.Polar` holds."""
    return WHOLE if "root" in state else Leading(state["basis"].shape[-1])
