"""Shampoo: inverse roots of the two sides' second moments."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from precond.algebra import checks
from precond.algebra.maps import LinearMap, Scaled, SymmetricKronecker, Tiled
from precond.optim.blocks import Block, Leaf, State, state_dtype
from precond.optim.checking.arguments import settle
from precond.optim.preconditioners.adagrad import AdaGrad
from precond.optim.preconditioners.eigenbases import begin
from precond.optim.preconditioners.iteration import follow
from precond.optim.preconditioners.kronecker import SIDES, Sides, as_matrices, as_matrix, fold, norms, sides_of, split
from precond.optim.preconditioners.parts import Part
from precond.optim.preconditioners.rational import renew
from precond.optim.preconditioners.rms import RMS
from precond.optim.preconditioners.seen import Seen
from precond.optim.preconditioners.stacked import Stacked

Tile = tuple[slice, slice]


@dataclass(frozen=True)
class Shampoo(Stacked):
    r"""M = L^(−e) ⊗ R^(−e) with L = Σ GGᵀ, R = Σ GᵀG of each weight G as a matrix (out, rest): vec(G) ↦ vec(L^(−e) G R^(−e)).

    The statistics hold the gradient of the step in progress; roots are renewed at step 1 and at each step that ``every`` divides. P is
    the symmetric root of M, exponents −e/2. What has no side to precondition takes ``AdaGrad`` (sums) or ``RMS`` (means).

    Args:
        power: e; None: 1/4 with two sides, 1/2 with one.
        decay: None: sums, as published; ρ in [0, 1): means L ← ρL + (1−ρ)GGᵀ, their bias corrected.
        initial: L₀ = R₀ = initial·I.
        damping: ε ≥ 0, added relative to the largest eigenvalue.
        every: steps between roots; matrices of other shapes than the first one, and of one shape where they are
            many, take their turns in the steps before.
        method: ``"eigh"``; ``"newton"``, the coupled iteration for L^(−1/p), p = 1/e whole; or ``"qr"``, eigenvectors followed by
            one step of orthogonal iteration. On an accelerator, which is not to be waited for, ``"eigh"`` and ``"newton"`` are both a sum of
            inverses of shifted matrices, to 1e-5.
        sides: ``"both"``; ``"smaller"``, the shorter one alone; ``"left"`` or ``"right"``.
        max_dim: longer sides are left alone.
        block: longer sides are cut into tiles of at most this length, each with factors of its own.
        graft: the length of the step: ``"none"``, M's own; or M is scaled so that ‖M g‖ is that of ``"sgd"``, ‖g‖,
            ``"adagrad"`` or ``"rms"``.
        graft_decay, graft_eps: ρ and ε of those.

    Raises:
        ValueError: for a power above 1, or one whose inverse is not whole with ``method="newton"``.

    Example:
        >>> import torch, precond
        >>> W = torch.nn.Parameter(torch.tensor([[0.0, 0.0], [0.0, 0.0]]))
        >>> optimizer = precond.PreconditionedGD([W], lr=1.0, preconditioner=precond.Shampoo(damping=0.0))
        >>> W.grad = torch.tensor([[16.0, 0.0], [0.0, -1.0]]); _ = optimizer.step()
        >>> expected = torch.diag(torch.tensor([-1.0, 1.0]))  # −L^(−1/4) G R^(−1/4), which is −UVᵀ of a first gradient
        >>> torch.testing.assert_close(W.data, expected, atol=1e-4, rtol=0)

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

    advised_damping = 0.1
    second_moments = frozenset({"r"})

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

    def looks(self, step: int) -> bool:
        return False

    def init(self, block: Block) -> dict:
        (leaf,), (p,) = block.leaves, block.tensors
        W, sides, dtype = as_matrix(p), self._sides(leaf), state_dtype(p.dtype)
        state: dict = {}
        for k, tile in enumerate(self._tiles(W.shape, sides)):
            for name, length, has in zip(SIDES, W[tile].shape, sides, strict=True):
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

    def program(self, block: Block, step: int) -> Hashable:
        return step if step == 1 else block.due(step, self.every)

    def observe(self, state: State, seen: Seen) -> None:
        (g,), t = seen.gradient, state.steps[0]
        keep, add = (1.0, 1.0) if self.decay is None else (self.decay, 1 - self.decay)
        for tile, k in self._numbered(state):
            for name in SIDES:
                if (S := state.get(f"{name}.{k}")) is not None:
                    fold(S, as_matrices(g)[:, *tile], name == "right", keep, add)
        for some in [slice(0, len(g))] if t == 1 else state.due(self.every):
            self._renew(state.span(some))
        if self.graft != "none":
            self._measure(state, g)

    def _numbered(self, state: State) -> list[tuple[Tile, int]]:
        (leaf,), (p,) = state.block.leaves, state.block.tensors
        return [(tile, k) for k, tile in enumerate(self._tiles(as_matrices(p).shape[1:], self._sides(leaf)))]

    def _renew(self, state: State) -> None:
        """The inverse roots of all factors, those of one size at once; where one fails, the one before stays."""
        power, (t,) = self.power if self.power is not None else 0.5 / sum(self._sides(state.block.leaves[0])), state.steps
        factors = [(name, k) for _, k in self._numbered(state) for name in SIDES if f"{name}.{k}" in state]
        for n in dict.fromkeys(state[f"{name}.{k}"].shape[-1] for name, k in factors):
            of_size = [(name, k) for name, k in factors if state[f"{name}.{k}"].shape[-1] == n]
            S, roots, bases = ([state[f"{name}{kind}.{k}"] for name, k in of_size] for kind in ("", "_root", self._basis))
            if self.method == "qr":
                for matrices, basis in zip(S, bases, strict=True):
                    begin(matrices, basis) if t == 1 else follow(matrices, basis)
            scale = 1.0 if self.decay is None else state.unbiased(self.decay)[0]
            scratch = 4 * sum(t.numel() * t.element_size() for t in state.block.tensors)  # as much as a step takes
            renew(roots, S, power, self.damping, self.method, bases if self.method == "qr" else (), scale, scratch)

    @property
    def _basis(self) -> str:
        """What names of state entries say that hold bases; where there are none those of the factors serve."""
        return "_basis" if self.method == "qr" else ""

    def _measure(self, state: State, g: Tensor) -> None:
        """The factors that give M g the grafted lengths; a gradient of zero leaves its as it is."""
        wanted = norms(g) if self.graft == "sgd" else self._adaptive(state, g)
        (own,) = self._raw(state).gram((g,))
        size = norms(own)
        torch.where(size > 0, wanted.div_(size), state["length"], out=state["length"])

    def _adaptive(self, state: State, g: Tensor) -> Tensor:
        """‖g/(√r + ε)‖ of each; r knows of g then."""
        (r,) = state["r"]
        if self.graft == "adagrad":
            h = r.addcmul_(g, g).sqrt()
        else:
            (weight,) = state.unbiased(self.graft_decay)
            h = r.mul_(self.graft_decay).addcmul_(g, g, value=1 - self.graft_decay).div(weight).sqrt_()
        return torch.linalg.vector_norm(torch.div(g, h.add_(self.graft_eps), out=h).flatten(1), dim=1)

    def _raw(self, state: State) -> LinearMap:
        like, maps = state.block.tensors, []
        for tile, k in self._numbered(state):
            A, B = state.get(f"left_root.{k}"), state.get(f"right_root.{k}")
            maps.append((*tile, SymmetricKronecker(A, B, (as_matrices(like[0])[:, *tile],))))
        if len(maps) == 1:
            return SymmetricKronecker(A, B, like)
        return Tiled(maps, like, stacked=True)

    def map(self, state: State) -> LinearMap:
        raw = self._raw(state)
        if self.graft == "none":
            return raw
        return Scaled(raw, square=state["length"].view(-1, *(1,) * (state.block.tensors[0].ndim - 1)))
