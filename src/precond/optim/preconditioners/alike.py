"""Blocks alike, by code that is written for one: all at once by ``torch.vmap``, or one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from precond.algebra.vec import Vec
from precond.optim.blocks import COUNTS, Block, Leaf, Stack, State


def at_once(f: Callable[..., Vec], state: State, *vectors: Vec) -> Vec:
    """f(None, state, …) of all members of a stack by ``torch.vmap``: it finds what they have in common, and the tensors of each.

    Raises:
        ToldApartError: where it asks for what tells them apart.
        RuntimeError: for what ``torch.vmap`` cannot.
    """
    stack = state.block
    assert isinstance(stack, Stack)
    alike = list(zip(*(member.leaves for member in stack.members), strict=True))

    def one(values: dict[str, Any], tensors: Vec, *vectors: Vec) -> Vec:
        leaves: dict[Leaf, Any] = {own[0]: _LeafOfAll(own, t) for own, t in zip(alike, tensors, strict=True)}
        shown = lambda block: _BlockOfAll(tuple(leaves[leaf] for leaf in block.leaves))  # noqa: E731
        return f(None, _member(state, 0, values, shown), *vectors)

    with _Elementary(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        return torch.vmap(one)(_values(state), stack.gathered(stack.all_tensors), *vectors)


def members(state: State) -> list[State]:
    """The states of the members of a stack, each of a block alone; the tensors are the same."""
    assert isinstance(state.block, Stack)
    return [_member(state, k, _values(state, lambda t, k=k: t[k])) for k in range(len(state.block.members))]  # type: ignore[misc]


def _values(state: State, of: Callable[[Tensor], Tensor] = lambda t: t) -> dict[str, Any]:
    def value(v: Any) -> Any:
        return _values(v, of) if isinstance(v, State) else tuple(map(of, v)) if isinstance(v, tuple) else of(v)

    return {key: value(v) for key, v in state.items() if key not in COUNTS}


def _member(state: State, k: int, values: Mapping[str, Any], shown: Callable[[Block], Block] = lambda block: block) -> State:
    """The state of a member, with these values, in the terms of a block alone."""
    stack = state.block
    assert isinstance(stack, Stack)
    out, m = State(shown(stack.members[k])), len(stack.leaves)
    for key, value in values.items():
        inside = state[key]
        out[key] = _member(inside, k, value, shown) if isinstance(inside, State) else value
    out |= {key: state[key][k * m : (k + 1) * m] for key in COUNTS if key in state}
    return out.seal()


class ToldApartError(Exception):
    """What members of a stack do not share was asked for by code that takes them all at once."""


class _LeafOfAll:
    """A leaf of each member of a stack: what these have in common, and the tensor of each."""

    def __init__(self, leaves: Sequence[Leaf], tensor: Tensor):
        self._leaves, self.tensor, self.shape, self.ndim = leaves, tensor, leaves[0].shape, leaves[0].ndim

    def __getattr__(self, name: str) -> Any:
        first, *others = (getattr(leaf, name) for leaf in self._leaves)
        if not all(x is first or (isinstance(first, str | int | tuple) and x == first) for x in others):
            raise ToldApartError(name)
        return first

    def __eq__(self, other: object) -> bool:
        raise ToldApartError("which leaf it is")

    def __hash__(self) -> int:
        raise ToldApartError("which leaf it is")

    def __repr__(self) -> str:
        raise ToldApartError("which leaf it is")


class _BlockOfAll(Block):
    """A block of each member of a stack, of such leaves."""

    def subset(self, index: Sequence[int]) -> Block:
        return _BlockOfAll(tuple(self.leaves[i] for i in index))

    @property
    def derived(self) -> dict[Any, Any]:
        raise ToldApartError("what is kept with a block")

    def __hash__(self) -> int:
        raise ToldApartError("which block it is")


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
