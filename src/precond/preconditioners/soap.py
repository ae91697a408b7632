"""Adam in Shampoo's eigenbasis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from precond import checks
from precond.arguments import settle
from precond.blocks import Block, Leaf, State, state_dtype
from precond.maps import InverseRoot, LinearMap, Rotation, completed
from precond.preconditioners.base import Part, Preconditioner, Seen
from precond.preconditioners.bases import WHOLE, Basis, Leading, basis_of
from precond.preconditioners.kronecker import Sides, as_matrix, sides_of, split
from precond.preconditioners.rms import RMS
from precond.vec import Vec

_SIDES = ("left", "right")
BASES = ("left_basis", "right_basis")


@dataclass(frozen=True)
class SOAP(Preconditioner):
    r"""P = (Q_A ⊗ Q_B)·diag((√r̂ + ε)^(−1/2)): RMS in the eigenbases of L = mean of GGᵀ and R = mean of GᵀG.

    Each matrix G (a tensor as (out, rest)) is rotated, G′ = Q_AᵀGQ_B, and r ← ρr + (1−ρ)G′². Between refreshes the bases stand; a
    refresh is one step of orthogonal iteration, Q ← qr(LQ), in which r follows the order of the eigenvectors. The momentum is kept
    in the rotated coordinates, where it costs nothing, and carried along exactly. What has no side to rotate takes ``RMS``.

    Until a first gradient has chosen the bases, by an eigendecomposition, they are the identity and P² = 1/(‖Ĝ‖ + ε): a step along the
    gradient, of length α at most. Adam's step there, all signs alike where a gradient has low rank, can be √(mn) times as long: it
    saturated the units of a deep tanh network for good. When the bases are chosen, r goes over by the squares of the rotation,
    r ← (R∘R)r.

    Args:
        decay: ρ of r in [0, 1).
        eps: ε ≥ 0.
        factor_decay: ρ of L and R; None: ``decay``.
        every: steps between refreshes: after the first gradient and then after each step that ``every`` divides.
        drift: None, or refresh a basis only where it has turned from the eigenvectors by more than this (in [0, 1): the share of ‖Lq‖
            orthogonal to q, over a sample of columns q); it is measured where ``every`` allows a refresh.
        factor_every: steps between updates of L and R.
        sides: ``"both"``; ``"smaller"``, the shorter one alone; ``"left"`` or ``"right"``.
        max_dim: longer sides are not rotated.
        rank: r ≥ 1; of sides longer than 4r only r leading eigenvectors U are followed, and Q is the orthogonal matrix of r reflections
            whose first columns they are, [U, U⊥]: the other coordinates stay near entries of the gradient. Nothing has n² entries then; a
            rotation takes 4nr operations a column in place of 2n². None: all eigenvectors.

    References:
        Vyas et al. (2025), SOAP; George et al. (2018), EKFAC; Anil et al. (2020) for one-sided factors.
    """

    decay: float = 0.95
    eps: float = 1e-8
    factor_decay: float | None = None
    every: int = 10
    drift: float | None = None
    factor_every: int = 1
    sides: Sides = "both"
    max_dim: int = 10000
    rank: int | None = None

    alone = True
    advised_damping = 0.1

    def __post_init__(self) -> None:
        settle(self)
        checks.fraction("SOAP", decay=self.decay)
        checks.non_negative("SOAP", eps=self.eps)
        checks.whole("SOAP", every=self.every, factor_every=self.factor_every, max_dim=self.max_dim)
        if self.rank is not None:
            checks.whole("SOAP", rank=self.rank)
        if self.factor_decay is not None:
            checks.fraction("SOAP", factor_decay=self.factor_decay)
        if self.drift is not None:
            checks.fraction("SOAP", drift=self.drift)

    def partition(self, leaves: Sequence[Leaf]) -> list[Part]:
        """Each matrix by itself; what has no side to rotate by RMS."""
        rotated = [any(self._sides(leaf)) for leaf in leaves]
        return split(leaves, self, rotated, RMS(self.decay, self.eps))

    def handles(self, block: Block) -> bool:
        return all(any(self._sides(leaf)) for leaf in block.leaves)

    def _sides(self, leaf: Leaf) -> tuple[bool, bool]:
        return sides_of(leaf.shape, self.sides, self.max_dim)

    def init(self, block: Block) -> dict:
        (leaf,), (p,) = block.leaves, block.tensors
        state: dict = {"r": block.zeros()}
        like = torch.empty(0, dtype=state_dtype(p.dtype), device=p.device)
        for side, n, has in zip(_SIDES, as_matrix(p).shape, self._sides(leaf), strict=True):
            if has:
                basis = WHOLE if self.rank is None or n <= 4 * self.rank else Leading(self.rank)
                state |= basis.fresh(side, n, like)
        return state

    def observe(self, state: State, seen: Seen) -> None:
        (rotated,) = self.basis(state).rmv(seen.gradient)
        state["r"][0].mul_(self.decay).addcmul_(rotated, rotated, value=1 - self.decay)
        self.fold(state, seen.gradient[0])

    def fold(self, state: State, gradient: Tensor) -> None:
        """Fold a gradient into L and R, where its step is one of those that do."""
        if (int(state.steps[0]) - 1) % self.factor_every:
            return
        keep = self.decay if self.factor_decay is None else self.factor_decay
        for side in _SIDES:
            if (basis := basis_of(state, side)) is not None:
                basis.fold(state, side, as_matrix(gradient), keep)

    def basis(self, state: State) -> Rotation:
        """Q_A ⊗ Q_B."""
        return _rotation(state, state.block.tensors)

    def rotates(self, state: State) -> bool:
        """Whether bases are chosen. Only the first steps look: each look waits for the device."""
        (t,) = state.steps
        return t > self.every or all(_chosen(state[basis]) for basis in BASES if basis in state)

    def map(self, state: State) -> LinearMap:
        Q, D = self.factors(state)
        return Q @ D

    def factors(self, state: State) -> tuple[LinearMap, LinearMap]:
        (r,), (t,) = state["r"], state.steps
        h = r / (1 - self.decay**t)
        h = (h.sqrt_() if self.rotates(state) else h.sum().sqrt().expand_as(h).clone()).add_(self.eps)  # else ‖Ĝ‖ everywhere
        if self.eps == 0:
            h = torch.where(h == 0, torch.inf, h)
        return self.basis(state), InverseRoot((h,), holes=self.eps == 0)

    def refresh(self, state: State) -> LinearMap | None:
        (t,) = state.steps
        regular = t % self.every == 0
        if not regular and self.rotates(state):
            return None
        r, new = as_matrix(state["r"][0]), dict[str, Tensor]()
        for axis, (side, name) in enumerate(zip(_SIDES, BASES, strict=True)):
            basis = basis_of(state, side)
            if basis is None or not basis.seen(state, side):
                continue
            fresh = not _chosen(state[name])
            if fresh and (found := basis.first(state, side)) is not None:
                new[name] = found
                # Of bases that are the identity yet.
                turned = (completed(found).T @ torch.eye(len(found)).to(found)).square()
                r = turned @ r if axis == 0 else r @ turned.T
            elif regular and (fresh or self._turned(basis, state, side)) and (step := basis.next(state, side)) is not None:
                new[name], order = step
                r = r if order is None else r.index_select(axis, order)
        if not new:
            return None
        old = _rotation({name: state[name].clone() for name in new})
        for name, Q in new.items():
            state[name].copy_(Q)
        state["r"][0].copy_(r.reshape(state["r"][0].shape))
        return _rotation(new).T @ old

    def _turned(self, basis: Basis, state: State, side: str) -> bool:
        """Whether a basis is to be renewed."""
        return self.drift is None or basis.drift(state, side, int(state.steps[0]) // self.every) > self.drift


def _rotation(bases: Mapping[str, Tensor], like: Vec | None = None) -> Rotation:
    """Q_A ⊗ Q_B; the identity on a side that has none."""
    A, B = (completed(bases[name]) if name in bases else None for name in BASES)
    return Rotation(A, B, like)


def _chosen(Q: Tensor) -> bool:
    """Whether a basis is no longer the identity."""
    return bool((Q.diagonal() != 1).any())
