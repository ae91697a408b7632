"""How blocks are taken by any preconditioner: side by side where it takes stacks, or by ``torch.vmap`` what is written for one block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from precond.algebra.maps import Identity, LinearMap
from precond.algebra.maps.stacked import Vectorized
from precond.algebra.vec import Vec
from precond.optim.blocks import Block, Leaf, Stack, State
from precond.optim.checking import contracts
from precond.optim.inputs import Request
from precond.optim.preconditioners.alike import ToldApartError, at_once, members
from precond.optim.preconditioners.base import Preconditioner
from precond.optim.preconditioners.parts import Needs
from precond.optim.preconditioners.seen import Seen
from precond.optim.preconditioners.stacked import Stacked


def stackable(preconditioner: Preconditioner) -> bool:
    """Whether blocks alike can be taken side by side by a preconditioner."""
    if isinstance(preconditioner, Stacked) or _takes_any(preconditioner):
        return True
    if preconditioner.constituents:
        return all(map(stackable, preconditioner.constituents))
    return not (preconditioner.alone or preconditioner.requests or any(_overrides(preconditioner, name) for name in _OF_ONE))


_OF_ONE = ("refresh", "ready", "settled", "findings", "program")
"""Methods that are of one block, and that :class:`Each` does not take for several."""


def _overrides(preconditioner: Preconditioner, method: str) -> bool:
    return getattr(type(preconditioner), method) is not getattr(Preconditioner, method)


def _takes_any(preconditioner: Preconditioner) -> bool:
    """Whether it acts entry by entry and alike on all tensors, which of an author's class is not known."""
    return preconditioner.entrywise and contracts.of_library(type(preconditioner))


def takes_stacks(preconditioner: Preconditioner) -> bool:
    """Whether it is, or holds, one whose methods take nothing but stacks, also of a single block."""
    return isinstance(preconditioner, Stacked) or any(map(takes_stacks, preconditioner.constituents))


def on(block: Block, preconditioner: Preconditioner) -> Preconditioner:
    """A preconditioner's methods as a block, or a stack of blocks, takes them."""
    if not isinstance(block, Stack):
        return preconditioner.singly
    itself = isinstance(preconditioner, Stacked) or _takes_any(preconditioner) or preconditioner.constituents
    return preconditioner if itself else Each(preconditioner)


@dataclass(frozen=True)
class Each(Stacked):
    """A preconditioner that is written for one block, on each block of a stack at once, by ``torch.vmap``.

    Its methods are shown what members have in common, and the tensors of each. Where they ask for what tells members apart (a name, a
    group, the parameter itself), or do what ``torch.vmap`` cannot (read numbers, draw random ones), the blocks of the stack are taken one
    by one from then on.
    """

    of: Preconditioner

    entrywise = property(lambda self: False)
    states_root = property(lambda self: self.of.states_root)
    invertible = property(lambda self: self.of.invertible)
    uses_momentum = property(lambda self: self.of.uses_momentum)
    momentum = property(lambda self: self.of.momentum)
    advised_damping = property(lambda self: self.of.advised_damping)

    @property
    def diagonal(self) -> bool:
        return self.of.diagonal

    @property
    def needs(self) -> Needs:
        return self.of.needs

    @property
    def requests(self) -> frozenset[Request]:
        return self.of.requests

    def lr_scale(self, leaf: Leaf) -> float:
        return self.of.lr_scale(leaf)

    def handles(self, block: Block) -> bool:
        return self.of.handles(block)

    def init(self, block: Block) -> State | dict[str, Any]:
        return self.of.init(block)

    def observe(self, state: State, seen: Seen) -> None:
        def one(k: int | None, state: State, gradient: Vec, momentum: Vec) -> Vec:
            self.of.observe(state, _Part(seen, k, gradient, None if seen.momentum is None else momentum))
            return ()

        self._run("observe", one, state, seen.gradient, () if seen.momentum is None else seen.momentum)

    def map(self, state: State) -> LinearMap:
        return self._vectorized("map", state, self.of.map)

    def factors(self, state: State) -> tuple[LinearMap, LinearMap]:
        if not _overrides(self.of, "factors"):
            return Identity(), self.map(state)
        F, N = (self._vectorized("factors", state, lambda s, k=k: self.of.factors(s)[k]) for k in (0, 1))  # type: ignore[misc]
        return F, N

    def _vectorized(self, method: str, state: State, map: Callable[[State], LinearMap]) -> LinearMap:
        def run(f: Callable[..., Vec], v: Vec) -> Vec:
            return self._run(method, lambda k, state, v: f(map(state), v), state, v)

        return Vectorized(run, state.block.tensors, self.states_root, self.diagonal)

    def wanted(self, state: State) -> Iterable[tuple[str, Request, Tensor | None]]:
        return self.of.wanted(state)

    def _run(self, method: str, f: Callable[..., Vec], state: State, *vectors: Vec) -> Vec:
        """f(k, state, …) of every member, the k-th by itself or, k being None, all at once."""
        stack = state.block
        assert isinstance(stack, Stack)
        alone: set[type] = stack.derived.get(Each, set())
        if len(stack.members) > 1 and type(self.of) not in alone:
            written = [*state.written(), *(t for v in vectors for t in v)]
            before = [t.clone() for t in written]
            try:
                return at_once(f, state, *vectors)
            except Exception:  # of vmap, or the method's own, which is raised again below
                for t, was in zip(written, before, strict=True):
                    t.copy_(was)
        out = []
        for k, member in enumerate(members(state)):
            try:
                out.append(f(k, member, *(tuple(t[k] for t in v) for v in vectors)))
            except Exception as error:
                error.add_note(f"raised by {type(self.of).__name__}.{method} of {member.block.name!r}")
                raise
        stack.derived[Each] = {*alone, type(self.of)}
        return tuple(torch.stack(t) for t in zip(*out, strict=True))


class _Part(Seen):
    """What was seen of the k-th member of a stack; k being None, of all."""

    def __init__(self, of: Seen, k: int | None, gradient: Vec, momentum: Vec | None):
        self.__dict__ |= {"_of": of, "_k": k, "gradient": gradient, "momentum": momentum, "ready": of.ready}

    @property
    def inputs(self) -> Any:
        return self._own(self.__dict__["_of"].inputs)

    @property
    def position(self) -> Callable[[], Vec] | None:
        whole, k = self.__dict__["_of"].position, self.__dict__["_k"]
        return self._own(None if whole is None else lambda: tuple(t[k] for t in whole()))

    def _own(self, known: Any) -> Any:
        if known is not None and self.__dict__["_k"] is None:
            raise ToldApartError("what is seen of each")
        return known
