"""Composition P = P₁P₂."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from torch import Tensor

from precond.algebra.maps import Identity, LinearMap
from precond.algebra.vec import Vec
from precond.optim import blocks
from precond.optim.blocks import Block, Leaf, State
from precond.optim.inputs import Request
from precond.optim.preconditioners.base import Preconditioner
from precond.optim.preconditioners.each import on
from precond.optim.preconditioners.fixed import Fixed
from precond.optim.preconditioners.parts import Needs, Part, strictest
from precond.optim.preconditioners.rms import RMS
from precond.optim.preconditioners.seen import Seen
from precond.optim.preconditioners.split import over


@dataclass(frozen=True)
class Composition(Preconditioner):
    """p = P₁z₁, z₁ = P₂z₂: the inner one adapts to the gradient in the outer one's coordinates, P₁ᵀg.

    ``outer @ inner`` makes it. What the outer one does not handle it leaves as it is, and the inner one takes over.

    The inner method lives in z₁ altogether: its statistics and the momentum of cotangents are averages of y = P₁ᵀg, each y with the
    P₁ of its step, and forget at their own rates where P₁ moves. So what Adam divides and what it divides by have the same history
    in the same coordinates, and its step in z₁ is bounded as it always is; a momentum in p, mapped by the newest P₁, would meet
    entries of r that know nothing of it.

    Args:
        outer: what makes P₁.
        inner: what makes P₂, from what it sees in z₁.

    Raises:
        ValueError: for an outer one that states M₁ = P₁P₁ᵀ alone (:class:`~precond.Muon`): z₁ are the coordinates of a root.

    Example:
        >>> import torch, precond
        >>> p = torch.nn.Parameter(torch.tensor([0.0, 0.0]))
        >>> P1 = precond.Fixed(precond.Diagonal((torch.tensor([1.0, 10.0]),)))
        >>> optimizer = precond.PreconditionedGD([p], lr=1.0, preconditioner=P1 @ precond.RMS(decay=0.0, eps=0.0))
        >>> p.grad = torch.tensor([3.0, -7.0]); _ = optimizer.step(); p.tolist()  # −P₁ sign(P₁ᵀg): P₁ is kept
        [-1.0, 10.0]

    References:
        Ye, eq. (4), twice; docs/design.md, "The inner method of a composition", for what lives in z₁.
    """

    outer: Preconditioner
    inner: Preconditioner

    def __post_init__(self) -> None:
        if isinstance(self.outer, Preconditioner) and not self.outer.states_root:
            outer, inner = type(self.outer).__name__, type(self.inner).__name__
            raise ValueError(
                f"Composition: the outer one, {outer}, states M = P Pᵀ and no root P, in whose coordinates the inner one, {inner}, could "
                f"live; it may be the inner one, as in RMS() @ {outer}(…)"
            )

    @property
    def entrywise(self) -> bool:  # type: ignore[override]
        return self.outer.entrywise and self.inner.entrywise

    @property
    def needs(self) -> Needs:
        return strictest((self.outer, self.inner))

    @property
    def requests(self) -> frozenset[Request]:
        return self.outer.requests | self.inner.requests

    @property
    def diagonal(self) -> bool:
        return self.outer.diagonal and self.inner.diagonal

    @property
    def states_root(self) -> bool:  # type: ignore[override]
        return self.inner.states_root

    @property
    def invertible(self) -> bool:  # type: ignore[override]
        return self.outer.invertible and self.inner.invertible

    @property
    def constituents(self) -> tuple[Preconditioner, ...]:
        return self.outer, self.inner

    @property
    def timeless(self) -> bool:  # type: ignore[override]
        return all(part.timeless for part in self.constituents)

    @property
    def uses_momentum(self) -> bool:  # type: ignore[override]
        return self.outer.uses_momentum or self.inner.uses_momentum

    @property
    def momentum(self):  # type: ignore[override]
        return self.outer.momentum if self.inner.momentum is None else self.inner.momentum

    @property
    def advised_damping(self) -> float:  # type: ignore[override]
        return self.inner.advised_damping

    def settled(self, state: State) -> bool:
        parts = zip(self.constituents, (state["outer"], state["inner"]), strict=True)
        return all(not part.looks(1) or not part.handles(of.block) or part.settled(of) for part, of in parts)

    def idle(self, step: int, turns: Iterable[int]) -> bool:
        return self.outer.idle(step, turns) and self.inner.idle(step, turns)

    def lr_scale(self, leaf: Leaf) -> float:
        return self.outer.lr_scale(leaf) * self.inner.lr_scale(leaf)

    def partition(self, leaves: Sequence[Leaf]) -> list[Part]:
        a, b = (_partition(part, leaves) for part in self.constituents)
        # A part that acts entry by entry takes any block: the others decide, and what is left goes together.
        fine = blocks.join(*([p.index for p in parts if not p.preconditioner.entrywise] for parts in (a, b)))
        joined = {i for index in fine for i in index}
        loose: dict[tuple[int, int], list[int]] = {}
        for (j, x), (k, y) in product(enumerate(a), enumerate(b)):
            loose[j, k] = sorted(set(x.index) & set(y.index) - joined)
        fine += [tuple(i) for i in loose.values() if i]
        return [Part(i, Composition(over(i, a), over(i, b))) for i in fine]

    def handles(self, block: Block) -> bool:
        return self.outer.handles(block) or self.inner.handles(block)

    def kind(self, block: Block) -> Any:
        return tuple(part.kind(block) if part.handles(block) else None for part in self.constituents)

    def init(self, block: Block) -> dict:
        return {
            name: State(block, part.init(block)) if part.handles(block) else State(block)
            for name, part in (("outer", self.outer), ("inner", self.inner))
        }

    def _outer(self, state: State) -> LinearMap:
        of = state["outer"]
        return on(of.block, self.outer).map(of) if self.outer.handles(of.block) else Identity(of.block.tensors)

    def observe(self, state: State, seen: Seen) -> None:
        if self.inner.handles(state["inner"].block):
            on(state["inner"].block, self.inner).observe(state["inner"], self._inside(state, seen))
        elif self.outer.handles(state["outer"].block):
            on(state["outer"].block, self.outer).observe(state["outer"], seen)

    def _inside(self, state: State, seen: Seen) -> _Inside:
        """What was seen, in z₁, after the outer one has observed it."""
        if self.outer.handles(state["outer"].block):
            on(state["outer"].block, self.outer).observe(state["outer"], seen)
        return _Inside(seen, self._outer(state), self.outer.invertible, lambda: self._is_outer_ready(state))

    def _is_outer_ready(self, state: State) -> bool:
        return not self.outer.handles(state["outer"].block) or self.outer.ready(state["outer"])

    def descend(self, state: State, seen: Seen) -> Vec:
        if not self.inner.handles(state["inner"].block):
            return super().descend(state, seen)
        inside = self._inside(state, seen)
        return inside.P1.mv(on(state["inner"].block, self.inner).descend(state["inner"], inside))

    def pull(self, state: State, seen: Seen) -> Vec:
        if self.uses_momentum or not self.inner.handles(state["inner"].block):
            return super().pull(state, seen)
        return on(state["inner"].block, self.inner).pull(state["inner"], self._inside(state, seen))

    def push(self, state: State, y: Vec) -> Vec:
        if self.uses_momentum or not self.inner.handles(state["inner"].block):
            return super().push(state, y)
        return self._outer(state).mv(on(state["inner"].block, self.inner).push(state["inner"], y))

    @property
    def rms(self) -> RMS | None:
        return self.inner if isinstance(self.inner, RMS) else None

    def coordinates(self, state: State, seen: Seen) -> tuple[LinearMap, State]:
        if self.outer.handles(state["outer"].block):
            on(state["outer"].block, self.outer).observe(state["outer"], seen)
        return self._outer(state), state["inner"]

    def map(self, state: State) -> LinearMap:
        of = state["inner"]
        inner = on(of.block, self.inner).map(of) if self.inner.handles(of.block) else Identity(of.block.tensors)
        return self._outer(state) @ inner

    def factors(self, state: State) -> tuple[LinearMap, LinearMap]:
        # A map that is made of the momentum takes it in the coordinates of the step in progress.
        if self.uses_momentum or not self.inner.handles(state["inner"].block):
            return super().factors(state)
        F, N = on(state["inner"].block, self.inner).factors(state["inner"])
        return self._outer(state) @ F, N

    def ready(self, state: State) -> bool:
        return self._is_outer_ready(state) and (
            not self.inner.handles(state["inner"].block) or self.inner.ready(state["inner"])
        )

    def findings(self, state: State) -> Sequence[str]:
        return self.inner.findings(state["inner"]) if "inner" in state else ()

    def wanted(self, state: State) -> Iterable[tuple[str, Request, Tensor | None]]:
        for name, part in (("outer", self.outer), ("inner", self.inner)):
            if part.requests and part.handles(state[name].block):
                yield from on(state[name].block, part).wanted(state[name])

    def refresh(self, state: State, carried: Sequence[Vec] = ()) -> None:
        if self.outer.handles(state["outer"].block):
            on(state["outer"].block, self.outer).refresh(state["outer"])
        if self.inner.handles(state["inner"].block):
            on(state["inner"].block, self.inner).refresh(state["inner"], () if self.uses_momentum else carried)


class _Inside(Seen):
    """What was seen, in the coordinates of a map P₁; the gradient where it is asked for: a map that is made of the momentum does not."""

    P1: LinearMap
    _outside: Seen

    def __init__(self, seen: Seen, P1: LinearMap, invertible: bool, ready: Callable[[], bool]):
        position = seen.position
        self.__dict__ |= {
            "P1": P1,
            "_outside": seen,
            "inputs": seen.inputs,
            "momentum": None if seen.momentum is None else P1.rmv(seen.momentum),
            "stride": seen.stride,
            "position": None if position is None or not invertible else lambda: P1.solve(position()),
            "ready": lambda: ready() and seen.ready(),
            "parameters": seen.parameters or position,
        }

    @cached_property
    def gradient(self) -> Vec:
        return self.P1.rmv(self._outside.gradient)


def _partition(preconditioner: Preconditioner, leaves: Sequence[Leaf]) -> list[Part]:
    """Its partition; what it leaves as it is joins nothing."""
    parts = preconditioner.partition(leaves)
    idle = [p for p in parts if not p.preconditioner.handles(Block(tuple(leaves[i] for i in p.index)))]
    rest = [i for p in idle for i in p.index]
    return [p for p in parts if p not in idle] + ([Part(tuple(rest), Fixed())] if rest else [])
