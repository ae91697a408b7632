"""Adam in Shampoo's eigenbasis."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.algebra import checks
from precond.algebra.maps import InverseRoot, LinearMap, Orthogonal, Rotation, completed
from precond.algebra.maps.diagonal import mean_of
from precond.algebra.vec import Vec, is_captured
from precond.optim.blocks import Block, Leaf, State, spans, state_dtype
from precond.optim.checking.arguments import settle
from precond.optim.preconditioners.bases import WHOLE, Leading, basis_of, turned
from precond.optim.preconditioners.eigenbases import WARM_UP, at_hand
from precond.optim.preconditioners.kronecker import SIDES, Sides, as_matrices, as_matrix, sides_of, split
from precond.optim.preconditioners.parts import Part
from precond.optim.preconditioners.rms import RMS
from precond.optim.preconditioners.seen import Seen
from precond.optim.preconditioners.stacked import Stacked

BASES = ("left_basis", "right_basis")


@dataclass(frozen=True)
class SOAP(Stacked):
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
        every: steps between refreshes: after the first gradient and then after each step that ``every`` divides. Matrices of other shapes
            than the first one, and of one shape where they are many, take their turns in the steps before, so that no step refreshes all.
        drift: None, or refresh a basis only where it has turned from the eigenvectors by more than this (in [0, 1): the share of ‖Lq‖
            orthogonal to q, over a sample of columns q); it is measured where ``every`` allows a refresh.
        factor_every: steps between updates of L and R.
        sides: ``"both"``; ``"smaller"``, the shorter one alone; ``"left"`` or ``"right"``.
        max_dim: longer sides are not rotated.
        rank: r ≥ 1; of sides longer than 4r only r leading eigenvectors U are followed, and Q is the orthogonal matrix of r reflections
            whose first columns they are, [U, U⊥]: the other coordinates stay near entries of the gradient. Nothing has n² entries then; a
            rotation takes 4nr operations a column in place of 2n². None: all eigenvectors.

    Example:
        >>> import torch, precond
        >>> W = torch.nn.Parameter(torch.tensor([[0.0, 0.0], [0.0, 0.0]]))
        >>> optimizer = precond.PreconditionedGD([W], lr=1.0, preconditioner=precond.SOAP(eps=0.0))
        >>> W.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]]); _ = optimizer.step()
        >>> torch.testing.assert_close(W.data, -torch.diag(torch.tensor([0.6, 0.8])))  # −G/‖G‖: the first step, before there are bases

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

    advised_damping = 0.1
    second_moments = frozenset({"r"})

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
            checks.fraction("SOAP", "0.1 to 0.3", drift=self.drift)

    def partition(self, leaves: Sequence[Leaf]) -> list[Part]:
        """Each matrix by itself; what has no side to rotate by RMS."""
        rotated = [any(self._sides(leaf)) for leaf in leaves]
        return split(leaves, self, rotated, RMS(self.decay, self.eps))

    def handles(self, block: Block) -> bool:
        return all(any(self._sides(leaf)) for leaf in block.leaves)

    def _sides(self, leaf: Leaf) -> tuple[bool, bool]:
        return sides_of(leaf.shape, self.sides, self.max_dim)

    def looks(self, step: int) -> bool:
        return False

    def init(self, block: Block) -> dict:
        (leaf,), (p,) = block.leaves, block.tensors
        state: dict = {"r": block.zeros()}
        like = torch.empty(0, dtype=state_dtype(p.dtype), device=p.device)
        for side, n, has in zip(SIDES, as_matrix(p).shape, self._sides(leaf), strict=True):
            if has:
                basis = WHOLE if self.rank is None or n <= 4 * self.rank else Leading(self.rank)
                state |= basis.fresh(side, n, like)
        return state

    def observe(self, state: State, seen: Seen) -> None:
        self._observed(state, seen, self.basis(state))

    def pull(self, state: State, seen: Seen) -> Vec:
        return self._observed(state, seen, self.basis(state))

    def _observed(self, state: State, seen: Seen, F: Rotation) -> Vec:
        """Fᵀg; the statistics know of g then."""
        rotated = F.rmv(seen.gradient)
        state["r"][0].mul_(self.decay).addcmul_(rotated[0], rotated[0], value=1 - self.decay)
        self.fold(state, seen.gradient[0])
        return rotated

    @property
    def rms(self) -> RMS:
        return RMS(self.decay, self.eps)

    def coordinates(self, state: State, seen: Seen) -> tuple[LinearMap, State] | None:
        if (chosen := self.chosen(state)) is not None and not bool(chosen.all()):
            return None
        self.fold(state, seen.gradient[0])
        return self.basis(state), state

    def program(self, block: Block, step: int) -> Hashable:
        # With a bound on the drift, refreshes look at one column after the other.
        if step <= max(self.every, WARM_UP) or self.drift is not None:
            return step
        return (step - 1) % self.factor_every == 0, block.due(step, self.every)

    def fold(self, state: State, gradient: Tensor) -> None:
        """Fold gradients (k, …) into L and R, where their step is one of those that do."""
        t = int(state.steps[0])
        if (t - 1) % self.factor_every:
            return
        keep = self.decay if self.factor_decay is None else self.factor_decay
        for side in SIDES:
            if (basis := basis_of(state, side)) is not None:
                basis.fold(state, side, as_matrices(gradient), keep, t <= max(self.every, WARM_UP))

    def basis(self, state: State) -> Rotation:
        """Q_A ⊗ Q_B."""
        A, B = (_orthogonal(state, name) for name in BASES)
        return Rotation(A, B, state.block.tensors)

    def chosen(self, state: State) -> Tensor | None:
        """Whether bases are chosen (k,); None: all are. Only the first steps look."""
        if state.steps[0] > self.every:
            return None
        known = [basis.chosen(state, side) for side in SIDES if (basis := basis_of(state, side)) is not None]
        return known[0] if len(known) == 1 else known[0] & known[1]

    def map(self, state: State) -> LinearMap:
        return self.basis(state) @ self._scale(state)

    def factors(self, state: State) -> tuple[LinearMap, LinearMap]:
        return self.basis(state), self._scale(state)

    def _scale(self, state: State) -> LinearMap:
        """diag((√r̂ + ε)^(−1/2)), or where no bases are chosen (‖Ĝ‖ + ε)^(−1/2)."""
        (r,), (weight,) = state["r"], state.unbiased(self.decay)
        h = r / weight
        if (chosen := self.chosen(state)) is None:
            h.sqrt_()
        else:
            apart = (-1,) + (1,) * (h.ndim - 1)
            h = torch.where(chosen.view(apart), h.sqrt(), h.flatten(1).sum(1).sqrt_().view(apart))
        h.add_(self.eps)
        if self.eps == 0:
            h = torch.where(h == 0, torch.inf, h)
        return InverseRoot((h,), holes=self.eps == 0, means=lambda v: [mean_of(x, self.eps == 0) for x in v])

    def refresh(self, state: State, carried: Sequence[Vec] = ()) -> None:
        t, due = state.steps[0], state.due(self.every)
        if t <= WARM_UP or (at_hand(state["r"][0]) and (due or t <= self.every)):
            self._begin(state, carried)
        for some in due if t > 1 else ():
            self._follow(state.span(some), [(m[some],) for (m,) in carried])

    def _begin(self, state: State, carried: Sequence[Vec]) -> None:
        """Choose the bases of matrices that were seen and have none."""
        for side, name in zip(SIDES, BASES, strict=True):
            if (basis := basis_of(state, side)) is None:
                continue
            new = basis.seen(state, side) & ~basis.chosen(state, side)
            for some in spans(new.cpu().tolist()):
                part = state.span(some)
                found = basis.begin(part, side)[:, None, None]
                Q = completed(part[name])  # of the identity before
                (r,), n = part["r"], part[name].shape[-2]
                squares = (Q if isinstance(Q, Tensor) else Q @ torch.eye(n).to(r).expand(len(r), n, n)).square()
                for t, by in [(m[some], Q) for (m,) in carried] + [(r, squares)]:
                    X = as_matrices(t)
                    t.copy_(torch.where(found, turned(X, by, side, back=False), X).reshape(t.shape))

    def _follow(self, state: State, carried: Sequence[Vec]) -> None:
        """Let bases follow the statistics."""
        (r,) = state["r"]
        sides = [(side, basis) for side in SIDES if (basis := basis_of(state, side)) is not None]
        may: list[Tensor | None] = [None] * len(sides)
        if self.drift is not None:
            which = int(state.steps[0]) // self.every
            may = [~basis.chosen(state, side) | (basis.drift(state, side, which) > self.drift) for side, basis in sides]
            if at_hand(r):
                turned = [k for k, m in enumerate(may) if m is not None and bool(m.any())]
                sides, may = [sides[k] for k in turned], [may[k] for k in turned]
        self._carry(state, carried, [side for side, _ in sides], back=True)
        for (side, basis), chosen in zip(sides, may, strict=True):
            if (order := basis.follow(state, side, chosen)) is not None:
                R = as_matrices(r)
                index = order[:, :, None] if side == "left" else order[:, None]
                r.copy_(R.gather(1 if side == "left" else 2, index.expand(R.shape)).view(r.shape))
        self._carry(state, carried, [side for side, _ in sides], back=False)

    def _carry(self, state: State, carried: Sequence[Vec], sides: Sequence[str], back: bool) -> None:
        """Vectors into the coordinates of some sides' bases, or back."""
        for (m,) in carried if sides else ():
            X = as_matrices(m)
            for side in sides:
                X = turned(X, _orthogonal(state, f"{side}_basis"), side, back)
            m.copy_(X.reshape(m.shape))


def _orthogonal(state: State, name: str) -> Orthogonal | None:
    """The orthogonal matrices of the bases of a side, which are made once until they change; None where there are none."""
    if (U := state.get(name)) is None or U.shape[-2] == U.shape[-1]:
        return U
    if is_captured(U):  # a graph would repeat with the basis of now
        return completed(U)
    known, version, made = state.block.derived.get(name, (None, 0, None))
    if known is not U or version != U._version:
        made = completed(U)
        state.block.derived[name] = (U, U._version, made)
    return made
