"""What an author writes is checked where it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from precond.algebra.maps import Diagonal, LinearMap
from precond.algebra.vec import Vec
from precond.optim import blocks
from precond.optim.blocks import Block, Leaf, State
from precond.optim.checking import contracts
from precond.optim.preconditioners.parts import Part

if TYPE_CHECKING:
    from precond.optim.preconditioners.base import Preconditioner
    from precond.optim.preconditioners.seen import Seen


class Checked:
    """A class of which what subclasses write is checked."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        own = cls.__dict__.get("refresh")
        if own is not None and len(signature(own).parameters) == 2:
            cls.refresh = carrying(own)  # type: ignore[attr-defined]
        contracts.checked(cls, CHECKS)

    def __new__(cls, *args: Any, **more: Any) -> Self:
        contracts.whole(cls, SIGNATURES)
        return super().__new__(cls)


def _check_init(self: Preconditioner, returned: Any, block: Block) -> None:
    who = f"{type(self).__name__}.init"
    what = "a dict of statistics: a tuple with one tensor for each parameter of the block, or one tensor"
    if not isinstance(returned, dict):
        raise TypeError(f"{who} returned {type(returned).__name__}; return {what}")
    for key, value in returned.items():
        tensors = value if isinstance(value, tuple) else (value,)
        if not isinstance(value, State) and not all(isinstance(t, Tensor) for t in tensors):
            got = f"a tuple with {value!r}" if isinstance(value, tuple) else f"{type(value).__name__} {value!r}"
            raise TypeError(f"{who}: {key!r} is {got}; return {what} (torch.zeros(()) holds a number)")
        if key in blocks.COUNTS:
            raise ValueError(f"{who}: {key!r} is the optimizer's count of steps, state.steps; give it another name")
        if isinstance(value, tuple) and len(value) != len(block.leaves):
            raise ValueError(
                f"{who}: {key!r} has {len(value)} tensors, the block {len(block.leaves)} parameters; return {what}"
            )
        if not isinstance(value, State):
            for leaf, t in zip(block.leaves, tensors, strict=False):
                on_host = key.partition(".")[0] in self.counts and t.device.type == "cpu"
                if t.device != leaf.param.device and not on_host:
                    raise ValueError(
                        f"{who}: {key!r} is on {t.device}, {leaf.name!r} on {leaf.param.device}; make it with device=p.device"
                    )
                # A map's dtype is its statistics': narrower ones cannot take a gradient in.
                wide = blocks.state_dtype(leaf.param.dtype)
                if t.is_floating_point() and not on_host and t.element_size() < wide.itemsize:
                    raise ValueError(
                        f"{who}: {key!r} is {t.dtype}, gradients of {leaf.name!r} come in {wide}; make it of block.zeros(), which has "
                        "their dtype and device: z.new_zeros(shape) for z in block.zeros()"
                    )


def _check_observe(self: Preconditioner, returned: Any, state: State, seen: Seen) -> None:
    if returned is not None:
        raise TypeError(
            f"{type(self).__name__}.observe returned {type(returned).__name__}; it writes into the tensors of state, in place "
            "(r.lerp_(new, 0.1), r.copy_(new)), and returns nothing"
        )


def _check_map(self: Preconditioner, returned: Any, state: State) -> None:
    who = f"{type(self).__name__}.map"
    if not isinstance(returned, LinearMap):
        raise TypeError(
            f"{who} returned {type(returned).__name__}; return a LinearMap, such as InverseRoot(denominators) or Identity()"
        )
    if isinstance(returned, Diagonal) and returned.like is not None:
        contracts.shapes(who, returned.like, state.block.tensors)


def _check_refresh(self: Preconditioner, returned: Any, state: State, carried: Sequence[Vec] = ()) -> None:
    if returned is not None:
        raise TypeError(
            f"{type(self).__name__}.refresh returned {type(returned).__name__}; return nothing: it writes into the tensors of state "
            "in place. Where it takes state alone, it may return the LinearMap that carries the momentum along"
        )


def carrying(refresh: Callable[..., LinearMap | None]) -> Callable[..., Any]:
    """A ``refresh(self, state)`` that returns what carries averages along, as one that carries them."""

    @wraps(refresh)
    def call(self: Preconditioner, state: State, carried: Sequence[Vec] = ()) -> Any:
        change = refresh(self, state)
        if not isinstance(change, LinearMap):
            return change
        for average in carried:
            for kept, moved in zip(average, change.mv(average), strict=True):
                kept.copy_(moved)
        return None

    return call


def _check_partition(self: Preconditioner, returned: Any, leaves: Sequence[Leaf]) -> None:
    who = f"{type(self).__name__}.partition"
    what = "a list of Part(index, preconditioner), whose indices are the leaves' positions, each once"
    if not isinstance(returned, list) or not all(isinstance(part, Part) for part in returned):
        raise TypeError(f"{who} returned {returned!r}; return {what}")
    index = [i for part in returned for i in part.index]
    if sorted(index) != list(range(len(leaves))):
        raise ValueError(f"{who} returned the positions {index} of {len(leaves)} leaves; return {what}")


CHECKS: dict[str, Callable[..., None]] = {
    "init": _check_init,
    "observe": _check_observe,
    "map": _check_map,
    "refresh": _check_refresh,
    "partition": _check_partition,
}


SIGNATURES = {
    "init": "init(self, block), which returns a dict of tensors, the statistics",
    "observe": "observe(self, state, seen), which writes what was seen into state's tensors",
    "map": "map(self, state), which returns P, a LinearMap",
}
