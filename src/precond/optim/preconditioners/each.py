"""How blocks are taken by any preconditioner: side by side where it takes stacks, or by ``torch.vmap`` what is written for one block."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from precond.algebra.maps import Identity, LinearMap
from precond.algebra.maps.stacked import Vectorized
from precond.algebra.vec import Vec
from precond.optim.blocks import COUNTS, Block, Leaf, Stack, State
from precond.optim.inputs import Request
from precond.optim.preconditioners.base import Preconditioner
from precond.optim.preconditioners.parts import Needs
from precond.optim.preconditioners.seen import Seen
from precond.optim.preconditioners.stacked import Stacked


def stackable(preconditioner: Preconditioner) -> bool:
    """Whether blocks alike can be taken side by side by a preconditioner."""
    if isinstance(preconditioner, Stacked) or preconditioner.entrywise:
        return True
    if preconditioner.constituents:
        return all(map(stackable, preconditioner.constituents))
    own_refresh = type(preconditioner).refresh is not Preconditioner.refresh
    return not (preconditioner.alone or own_refresh or preconditioner.requests or _asks_for_turns(type(preconditioner)))


_TURNS = {"due", "turn", "turns", "until_renewed"}


@cache
def _asks_for_turns(kind: type) -> bool:
    """Whether methods of a class ask whose turn it is: that differs among members, which ``torch.vmap`` takes by the same code."""
    classes = [c for c in kind.__mro__ if issubclass(c, Preconditioner) and c is not Preconditioner]
    functions = [inspect.unwrap(f) for c in classes for f in vars(c).values() if inspect.isfunction(f)]
    return any(_names(f.__code__) & _TURNS for f in functions)


def _names(code: CodeType) -> set[str]:
    """The names in a function and in those within it."""
    inside = [_names(c) for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*inside)


def takes_stacks(preconditioner: Preconditioner) -> bool:
    """Whether it is, or holds, one whose methods take nothing but stacks, also of a single block."""
    return isinstance(preconditioner, Stacked) or any(map(takes_stacks, preconditioner.constituents))


def on(block: Block, preconditioner: Preconditioner) -> Preconditioner:
    """A preconditioner's methods as a block, or a stack of blocks, takes them."""
    if not isinstance(block, Stack):
        return preconditioner.singly
    itself = isinstance(preconditioner, Stacked) or preconditioner.entrywise or preconditioner.constituents
    return preconditioner if itself else Each(preconditioner)


@dataclass(frozen=True)
class Each(Stacked):
    """A preconditioner that is written for one block, on each block of a stack at once, by ``torch.vmap``."""

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
        def one(state: State, gradient: Vec, momentum: Vec) -> Vec:
            at = None if seen.position is None else lambda: state.block.params
            self.of.observe(state, Seen(gradient, seen.inputs, None if seen.momentum is None else momentum, at))
            return ()

        _run(one, state, seen.gradient, () if seen.momentum is None else seen.momentum)

    def map(self, state: State) -> LinearMap:
        return self._vectorized(state, self.of.map)

    def factors(self, state: State) -> tuple[LinearMap, LinearMap]:
        if type(self.of).factors is Preconditioner.factors:
            return Identity(), self.map(state)
        return self._vectorized(state, lambda s: self.of.factors(s)[0]), self._vectorized(
            state, lambda s: self.of.factors(s)[1]
        )

    def _vectorized(self, state: State, map: Callable[[State], LinearMap]) -> LinearMap:
        def run(f: Callable[..., Vec], v: Vec) -> Vec:
            return _run(lambda state, v: f(map(state), v), state, v)

        return Vectorized(run, state.block.tensors, self.states_root, self.diagonal)

    def wanted(self, state: State) -> Iterable[tuple[str, Request, Tensor | None]]:
        return self.of.wanted(state)


def _run(f: Callable[..., Vec], state: State, *vectors: Vec) -> Vec:
    """f(state, …) of every member at once."""

    def one(values: dict[str, Any], params: Vec, *vectors: Vec) -> Vec:
        return f(_member(state, values, params), *vectors)

    stack = state.block
    assert isinstance(stack, Stack)
    with _Elementary(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        return torch.vmap(one)(_values(state), stack.gathered(stack.all_tensors), *vectors)


def _values(state: State) -> dict[str, Any]:
    return {k: _values(v) if isinstance(v, State) else v for k, v in state.items() if k not in COUNTS}


def _member(state: State, values: Mapping[str, Any], params: Vec) -> State:
    """A state with the values of one member, in the terms of a block alone."""
    stack = state.block
    assert isinstance(stack, Stack)
    block = _Member(stack.members[0].leaves, params, tuple(stack.turns))
    place = {leaf: p for leaf, p in zip(block.leaves, params, strict=True)}
    out = State(block)
    for key, value in values.items():
        inside = state[key]
        mine = tuple(place[leaf] for leaf in inside.block.leaves) if isinstance(inside, State) else ()
        out[key] = _member(inside, value, mine) if isinstance(inside, State) else value
    out |= {key: state[key][: len(block.leaves)] for key in COUNTS if key in state}
    return out


@dataclass(frozen=True, eq=False)
class _Member(Block):
    values: Vec = ()
    of_all: tuple[int, ...] = ()

    @cached_property
    def params(self) -> Vec:
        return self.values

    @property
    def tensors(self) -> Vec:
        return self.values

    @cached_property
    def turns(self) -> list[int]:
        if len(set(self.of_all)) > 1:
            raise TypeError(
                "blocks alike are taken side by side here, and their turns in periodic work differ: set `alone = True` in the "
                "preconditioner, or derive it from precond.Stacked, whose state.due() says whose turn it is"
            )
        return list(self.of_all[:1])


class _Elementary(TorchFunctionMode):
    """Operations that ``torch.vmap`` knows none of, or takes member by member, in terms of those that it takes at once.

    They are ``lerp`` with a number, and multi-tensor operations.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name.startswith("_foreach_"):
            return _one_by_one(name.removeprefix("_foreach_"), args, kwargs)
        if name in ("lerp", "lerp_") and "out" not in kwargs:
            return _lerp(name, *args, *kwargs.values())
        return func(*args, **kwargs)


def _one_by_one(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor] | None:
    """A multi-tensor operation, a tensor after the other."""
    each = zip(*(a if isinstance(a, list | tuple) else [a] * len(args[0]) for a in args), strict=True)
    if name == "norm":
        return [torch.linalg.vector_norm(*one, **kwargs) for one in each]
    if name in ("lerp", "lerp_"):
        return [_lerp(name, *one, *kwargs.values()) for one in each]
    return [getattr(torch.Tensor, name)(*one, **kwargs) for one in each]


def _lerp(name: str, start: Tensor, end: Tensor, weight: float | Tensor) -> Tensor:
    step = (end - start) * weight
    return start.add_(step) if name == "lerp_" else start + step
