"""Adam in Shampoo's eigenbasis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from precond import checks
from precond.blocks import Block, Leaf, State, state_dtype
from precond.maps import InverseRoot, Kronecker, LinearMap
from precond.preconditioners.base import Part, Preconditioner, Seen
from precond.preconditioners.kronecker import SIDES, Sides, as_matrix, fold, sides_of, split
from precond.preconditioners.rms import RMS
from precond.preconditioners.roots import drift, eigenbasis, power_step

_BASES = ("left_basis", "right_basis")


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

    advised_damping = 0.1

    def __post_init__(self) -> None:
        checks.fraction("SOAP", decay=self.decay)
        checks.non_negative("SOAP", eps=self.eps)
        checks.one_of("SOAP", "sides", self.sides, SIDES)
        checks.whole("SOAP", every=self.every, factor_every=self.factor_every, max_dim=self.max_dim)
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
        for name, length, has in zip(("left", "right"), as_matrix(p).shape, self._sides(leaf), strict=True):
            if has:
                state[name] = torch.zeros(length, length, dtype=state_dtype(p.dtype), device=p.device)
                state[f"{name}_basis"] = torch.eye(length, dtype=state_dtype(p.dtype), device=p.device)
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
        for name in ("left", "right"):
            if name in state:
                fold(state[name], as_matrix(gradient), name == "right", keep, 1 - keep)

    def basis(self, state: State) -> Kronecker:
        """Q_A ⊗ Q_B."""
        return Kronecker(state.get("left_basis"), state.get("right_basis"), state.block.tensors)

    def rotates(self, state: State) -> bool:
        """Whether bases are chosen. Only the first steps look: each look waits for the device."""
        (t,) = state.steps
        return t > self.every or all(_chosen(state[basis]) for basis in _BASES if basis in state)

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
        for axis, (name, basis) in enumerate(zip(("left", "right"), _BASES, strict=True)):
            if name not in state:
                continue
            S, Q = state[name], state[basis]
            fresh = not _chosen(Q)
            if fresh and bool(S.diagonal().amax() == 0):
                continue
            if fresh and (found := eigenbasis(S)) is not None:
                new[basis] = found[1]
                turned = (new[basis].T @ Q).square()
                r = turned @ r if axis == 0 else r @ turned.T
            elif regular and (fresh or self._turned(S, Q, t)) and (step := power_step(S, Q)) is not None:
                new[basis], order = step
                r = r.index_select(axis, order)
        if not new:
            return None
        old = {name: state[name].clone() for name in new}
        for name, Q in new.items():
            state[name].copy_(Q)
        state["r"][0].copy_(r.reshape(state["r"][0].shape))
        left, right = _BASES
        return Kronecker(new.get(left), new.get(right)).T @ Kronecker(old.get(left), old.get(right))

    def _turned(self, S: Tensor, Q: Tensor, step: float) -> bool:
        """Whether a basis is to be renewed."""
        return self.drift is None or drift(S, Q, int(step) // self.every) > self.drift


def _chosen(Q: Tensor) -> bool:
    """Whether a basis is no longer the identity."""
    return bool((Q.diagonal() != 1).any())
