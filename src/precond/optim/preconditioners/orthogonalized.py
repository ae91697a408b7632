"""The polar factor of another preconditioner's step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from precond.algebra.maps import LinearMap, Secant, augmented, parted
from precond.algebra.vec import Vec
from precond.optim.blocks import Block, Leaf, Rule, Stack, State, is_hidden, matches
from precond.optim.checking.arguments import settle
from precond.optim.inputs import Request
from precond.optim.preconditioners.base import Preconditioner
from precond.optim.preconditioners.each import on
from precond.optim.preconditioners.muon import Muon
from precond.optim.preconditioners.parts import Needs, Part
from precond.optim.preconditioners.polar import Polar
from precond.optim.preconditioners.schatten import Schatten
from precond.optim.preconditioners.seen import Seen

if TYPE_CHECKING:
    from precond.optim.momentum import Momentum


_MATRICES = Polar(max_dim=2**62)  # what is a layer's matrix, of any size


@dataclass(frozen=True)
class Orthogonalized(Preconditioner):
    r"""M m = γUVᵀ of the step M₁m = UΣVᵀ of another preconditioner's M₁, for the momentum m: ``Orthogonalized(SOAP())``.

    ``P₁ @ Polar()`` is another method, P₁·polar(P₁ᵀm): there the factor is taken half way, and the outer root of M₁ comes after it. Here
    it comes before: with ``Whitening(power=p)`` the direction is polar(mK^(−p)), with SOAP polar(Q(Qᵀm/√r)). A symmetric positive M with
    M m = d exists where ⟨m, d⟩ > 0; of all of them this is the nearest to M₁, a change of rank one of its root
    (:class:`~precond.algebra.maps.Secant`), so that penalties act in p and in z as elsewhere. Where ⟨m, d⟩ ≤ 0 the polar factor ascends, and the
    step is M₁m, as long as it would have been.

    A layer that ``of`` takes with its bias is the matrix [W b]. What is no matrix, or not chosen, takes the step of ``of``. The momentum
    is kept in p.

    Args:
        of: what makes M₁, which must have an inverse and not be made of the momentum.
        by: the polar factor, its γ, and the average of these parameters; or :class:`~precond.Schatten`, γUΣˢVᵀ.
        where: which matrices; hidden ones by default.

    Raises:
        ValueError: for a preconditioner that is made of the momentum already, or has no inverse.

    Example:
        >>> import torch, precond
        >>> W = torch.nn.Parameter(torch.tensor([[0.0, 0.0], [0.0, 0.0]]))
        >>> P = precond.Orthogonalized(precond.RMS(decay=0.0, eps=0.0), precond.Muon("eigh"), where=None)
        >>> optimizer = precond.PreconditionedGD([W], lr=1.0, preconditioner=P)
        >>> W.grad = torch.tensor([[3.0, 4.0], [2.0, -5.0]]); _ = optimizer.step()
        >>> expected = torch.tensor([[-1.0, -1.0], [-1.0, 1.0]]) / 2**0.5  # of the polar factor of sign(g)
        >>> torch.testing.assert_close(W.data, expected, atol=1e-4, rtol=0)

    References:
        Records of modded-nanogpt (2026), pull requests 278 and 321, for SOAP followed by Muon; Jordan et al. (2024), Muon.
    """

    of: Preconditioner
    by: Muon | Schatten = Muon()
    where: Rule | None = is_hidden

    uses_momentum = True

    def __post_init__(self) -> None:
        settle(self)
        if self.of.uses_momentum or not self.of.invertible:
            raise ValueError(
                f"Orthogonalized: the step of {type(self.of).__name__} is "
                f"{'made of the momentum already' if self.of.uses_momentum else 'that of a singular map'}; take SOAP, Shampoo, "
                "Whitening, BNP, RMS, or a composition of them"
            )

    @property
    def entrywise(self) -> bool:  # type: ignore[override]
        return False

    @property
    def states_root(self) -> bool:  # type: ignore[override]
        return self.of.states_root

    @property
    def needs(self) -> Needs:
        return "block"

    @property
    def requests(self) -> frozenset[Request]:
        return self.of.requests

    @property
    def constituents(self) -> tuple[Preconditioner, ...]:
        return (self.of,)

    @property
    def momentum(self) -> Momentum | None:  # type: ignore[override]
        return self.by.momentum

    def lr_scale(self, leaf: Leaf) -> float:
        return self.of.lr_scale(leaf)

    def partition(self, leaves: Sequence[Leaf]) -> list[Part]:
        out: list[Part] = []
        for part in self.of.partition(leaves):
            mine = replace(self, of=part.preconditioner)
            if not part.preconditioner.entrywise:
                chosen = mine.handles(Block(tuple(leaves[i] for i in part.index)))
                out.append(Part(part.index, mine) if chosen else part)
                continue
            matrices = [i for i in part.index if mine.handles(Block((leaves[i],)))]
            rest = tuple(i for i in part.index if i not in matrices)
            out += [Part((i,), mine) for i in matrices] + ([Part(rest, part.preconditioner)] if rest else [])
        return out

    def handles(self, block: Block) -> bool:
        return _MATRICES.handles(block) and matches(self.where, block.leaves[0]) and self.of.handles(block)

    def kind(self, block: Block) -> Any:
        return self.of.kind(block)

    def init(self, block: Block) -> dict[str, Any]:
        return {"of": State(block, self.of.init(block)), "descended": block.zeros()}

    def observe(self, state: State, seen: Seen) -> None:
        on(state.block, self.of).observe(state["of"], Seen(seen.gradient, seen.inputs, position=seen.position))
        for kept, m in zip(state["descended"], seen.gradient if seen.momentum is None else seen.momentum, strict=True):
            kept.copy_(m)

    def descend(self, state: State, seen: Seen) -> Vec:
        self.observe(state, seen)
        return self._step(state, on(state.block, self.of).map(state["of"]))

    def _step(self, state: State, first: LinearMap) -> Vec:
        """d of the momentum seen."""
        stacked, m = isinstance(state.block, Stack), state["descended"]
        u, turned = first.gram(m), Polar.is_turned(state.block)
        X = augmented(u, turned, stacked)
        if not stacked:
            X = X[None]
        D = self.by.shaped(X)
        down = (augmented(m, turned, stacked) * D).flatten(1).sum(1) > 0
        instead = torch.linalg.vector_norm(D, 2, (-2, -1)) / torch.linalg.vector_norm(X, 2, (-2, -1))
        D = torch.where(down[:, None, None], D, instead.nan_to_num_(0.0, 0.0)[:, None, None] * X)
        return parted(D if stacked else D[0], u, turned)

    def map(self, state: State) -> LinearMap:
        first = on(state.block, self.of).map(state["of"])
        return Secant(first, state["descended"], self._step(state, first), isinstance(state.block, Stack))

    def wanted(self, state: State) -> Iterable[tuple[str, Request, Tensor | None]]:
        return on(state.block, self.of).wanted(state["of"])

    def refresh(self, state: State, carried: Sequence[Vec] = ()) -> None:
        on(state.block, self.of).refresh(state["of"])
