"""Shampoo: inverse roots of the two sides' second moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from precond import checks
from precond.arguments import settle
from precond.blocks import Block, Leaf, State, state_dtype
from precond.maps import LinearMap, Scaled, SymmetricKronecker, Tiled
from precond.preconditioners.adagrad import AdaGrad
from precond.preconditioners.base import Part, Preconditioner, Seen
from precond.preconditioners.kronecker import Sides, as_matrix, fold, norm, sides_of, split
from precond.preconditioners.rms import RMS
from precond.preconditioners.roots import eigenbasis, inverse_root, power_step

Tile = tuple[slice, slice]


@dataclass(frozen=True)
class Shampoo(Preconditioner):
    r"""M = L^(−e) ⊗ R^(−e) with L = Σ GGᵀ, R = Σ GᵀG of each weight G as a matrix (out, rest): vec(G) ↦ vec(L^(−e) G R^(−e)).

    The statistics hold the gradient of the step in progress; roots are renewed at step 1 and at each step that ``every`` divides. P is
    the symmetric root of M, exponents −e/2. What has no side to precondition takes ``AdaGrad`` (sums) or ``RMS`` (means).

    Args:
        power: e; None: 1/4 with two sides, 1/2 with one.
        decay: None: sums, as published; ρ in [0, 1): means L ← ρL + (1−ρ)GGᵀ, their bias corrected.
        initial: L₀ = R₀ = initial·I.
        damping: ε ≥ 0, added relative to the largest eigenvalue.
        every: steps between roots.
        method: ``"eigh"``; ``"newton"``, the coupled iteration for L^(−1/p), p = 1/e whole; or ``"qr"``, eigenvectors followed by
            one step of orthogonal iteration.
        sides: ``"both"``; ``"smaller"``, the shorter one alone; ``"left"`` or ``"right"``.
        max_dim: longer sides are left alone.
        block: longer sides are cut into tiles of at most this length, each with factors of its own.
        graft: the length of the step: ``"none"``, M's own; or M is scaled so that ‖M g‖ is that of ``"sgd"``, ‖g‖,
            ``"adagrad"`` or ``"rms"``.
        graft_decay, graft_eps: ρ and ε of those.

    References:
        Gupta, Koren & Singer (2018), Algorithm 1; Anil et al. (2020) for blocks, grafting and the iteration; Shi et al. (2023).
    """

    power: float | None = None
    decay: float | None = None
    initial: float = 0.0
    damping: float = 1e-6
    every: int = 10
    method: Literal["eigh", "newton", "qr"] = "eigh"
    sides: Sides = "both"
    max_dim: int = 8192
    block: int = 1024
    graft: Literal["none", "sgd", "adagrad", "rms"] = "none"
    graft_decay: float = 0.999
    graft_eps: float = 1e-8

    alone = True
    advised_damping = 0.1

    def __post_init__(self) -> None:
        settle(self)
        checks.non_negative("Shampoo", initial=self.initial, damping=self.damping)
        checks.whole("Shampoo", every=self.every, max_dim=self.max_dim, block=self.block)
        checks.positive("Shampoo", graft_eps=self.graft_eps)
        checks.fraction("Shampoo", graft_decay=self.graft_decay)
        if self.decay is not None:
            checks.fraction("Shampoo", decay=self.decay)
        if self.power is not None:
            checks.positive("Shampoo", power=self.power)
            if self.power > 1:
                raise ValueError(f"Shampoo: power must be <= 1 (an inverse per side), got {self.power!r}; 0.25 is usual")
        if self.method == "newton" and self.power is not None and abs(1 / self.power - round(1 / self.power)) > 1e-6:
            raise ValueError(f"Shampoo: method='newton' needs a whole 1/power, got power={self.power!r}; use method='eigh'")

    def partition(self, leaves: Sequence[Leaf]) -> list[Part]:
        """Each matrix by itself; what has no side to precondition by a diagonal."""
        others = AdaGrad(self.graft_eps) if self.decay is None else RMS(self.graft_decay, self.graft_eps)
        return split(leaves, self, [any(self._sides(leaf)) for leaf in leaves], others)

    def handles(self, block: Block) -> bool:
        return all(any(self._sides(leaf)) for leaf in block.leaves)

    def _sides(self, leaf: Leaf) -> tuple[bool, bool]:
        return sides_of(leaf.shape, self.sides, self.max_dim)

    def _tiles(self, shape: Sequence[int], sides: tuple[bool, bool]) -> list[Tile]:
        """Pieces of a matrix; a side without a factor is not cut."""
        cuts = []
        for length, has in zip(shape, sides, strict=True):
            pieces = -(-length // int(self.block)) if has else 1
            size = -(-length // pieces)
            cuts.append([slice(i, min(i + size, length)) for i in range(0, length, size)])
        return [(rows, columns) for rows in cuts[0] for columns in cuts[1]]

    def init(self, block: Block) -> dict:
        (leaf,), (p,) = block.leaves, block.tensors
        W, sides, dtype = as_matrix(p), self._sides(leaf), state_dtype(p.dtype)
        state: dict = {}
        for k, tile in enumerate(self._tiles(W.shape, sides)):
            for name, length, has in zip(("left", "right"), W[tile].shape, sides, strict=True):
                if has:
                    eye = torch.eye(length, dtype=dtype, device=p.device)
                    state |= {f"{name}.{k}": self.initial * eye, f"{name}_root.{k}": eye.clone()}
                    if self.method == "qr":
                        state[f"{name}_basis.{k}"] = eye.clone()
        if self.graft != "none":
            state["length"] = torch.ones((), dtype=dtype, device=p.device)
        if self.graft in ("adagrad", "rms"):
            state["r"] = block.zeros()
        return state

    def observe(self, state: State, seen: Seen) -> None:
        (g,), (t,) = seen.gradient, state.steps
        for tile, k in self._numbered(state):
            for name in ("left", "right"):
                if (S := state.get(f"{name}.{k}")) is not None:
                    keep, add = (1.0, 1.0) if self.decay is None else (self.decay, 1 - self.decay)
                    fold(S, as_matrix(g)[tile], name == "right", keep, add)
                    if t == 1 or t % self.every == 0:
                        self._renew(state, name, k, t)
        if self.graft != "none":
            self._measure(state, g, t)

    def _numbered(self, state: State) -> list[tuple[Tile, int]]:
        (leaf,), (p,) = state.block.leaves, state.block.tensors
        return [(tile, k) for k, tile in enumerate(self._tiles(as_matrix(p).shape, self._sides(leaf)))]

    def _renew(self, state: State, name: str, k: int, t: float) -> None:
        """The inverse root of one factor; where it fails, the one before stays."""
        S = state[f"{name}.{k}"] if self.decay is None else state[f"{name}.{k}"] / (1 - self.decay**t)
        basis = state.get(f"{name}_basis.{k}")
        if basis is not None:
            found = eigenbasis(S) if t == 1 else power_step(S, basis)
            if found is None:
                return
            basis.copy_(found[1] if t == 1 else found[0])
        power = self.power if self.power is not None else 0.5 / sum(self._sides(state.block.leaves[0]))
        root = inverse_root(S, power, self.damping, "basis" if basis is not None else self.method, basis)
        if root is not None:
            state[f"{name}_root.{k}"].copy_(root)

    def _measure(self, state: State, g: Tensor, t: float) -> None:
        """The factor that gives M g the grafted length; a gradient of zero leaves it as it is."""
        wanted = g
        if "r" in state:
            (r,) = state["r"]
            r.mul_(1.0 if self.graft == "adagrad" else self.graft_decay)
            r.addcmul_(g, g, value=1.0 if self.graft == "adagrad" else 1 - self.graft_decay)
            r = r if self.graft == "adagrad" else r / (1 - self.graft_decay**t)
            wanted = g / (r.sqrt() + self.graft_eps)
        (own,) = self._raw(state).gram((g,))
        size = norm(own)
        state["length"].copy_(torch.where(size > 0, norm(wanted) / size, state["length"]))

    def _raw(self, state: State) -> LinearMap:
        like, maps = state.block.tensors, []
        for tile, k in self._numbered(state):
            A, B = state.get(f"left_root.{k}"), state.get(f"right_root.{k}")
            maps.append((*tile, SymmetricKronecker(A, B, (as_matrix(like[0])[tile],))))
        if len(maps) == 1:
            return SymmetricKronecker(A, B, like)
        return Tiled(maps, like)

    def map(self, state: State) -> LinearMap:
        raw = self._raw(state)
        return raw if self.graft == "none" else Scaled(raw, state["length"].sqrt())
