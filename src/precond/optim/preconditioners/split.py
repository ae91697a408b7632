"""Several preconditioners on the parts of one block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from precond.algebra.maps import BlockDiagonal, Identity, LinearMap
from precond.algebra.vec import Vec
from precond.optim.blocks import Block, State
from precond.optim.inputs import Request
from precond.optim.preconditioners.base import Preconditioner
from precond.optim.preconditioners.each import on
from precond.optim.preconditioners.parts import Needs, Part, strictest
from precond.optim.preconditioners.seen import Seen


@dataclass(frozen=True)
class Split(Preconditioner):
    """Parts of a block, each with its own preconditioner: what :func:`over` makes where a block joins several.

    Args:
        parts: positions of leaves in the block, and what acts on them.

    Example:
        >>> import precond
        >>> split = Split((Part((0,), precond.AdaGrad()), Part((1, 2), precond.Whitening())))
        >>> split.diagonal, split.needs
        (False, 'row')

    References:
        docs/design.md, "Blocks of a composition".
    """

    parts: tuple[Part, ...]

    @property
    def needs(self) -> Needs:
        return strictest(p.preconditioner for p in self.parts)

    @property
    def requests(self) -> frozenset[Request]:
        return frozenset().union(*(p.preconditioner.requests for p in self.parts))

    @property
    def diagonal(self) -> bool:
        return all(p.preconditioner.diagonal for p in self.parts)

    @property
    def states_root(self) -> bool:  # type: ignore[override]
        return all(p.preconditioner.states_root for p in self.parts)

    @property
    def invertible(self) -> bool:  # type: ignore[override]
        return all(p.preconditioner.invertible for p in self.parts)

    @property
    def constituents(self) -> tuple[Preconditioner, ...]:
        return tuple(part.preconditioner for part in self.parts)

    def kind(self, block: Block) -> Any:
        subs = ((part.preconditioner, block.subset(part.index)) for part in self.parts)
        return tuple(P.kind(sub) if P.handles(sub) else None for P, sub in subs)

    @property
    def timeless(self) -> bool:  # type: ignore[override]
        return all(part.timeless for part in self.constituents)

    @property
    def uses_momentum(self) -> bool:  # type: ignore[override]
        return any(p.preconditioner.uses_momentum for p in self.parts)

    @property
    def momentum(self):  # type: ignore[override]
        return next((p.preconditioner.momentum for p in self.parts if p.preconditioner.momentum is not None), None)

    @property
    def advised_damping(self) -> float:  # type: ignore[override]
        return max(p.preconditioner.advised_damping for p in self.parts)

    def init(self, block: Block) -> dict:
        out = {}
        for k, part in enumerate(self.parts):
            sub = block.subset(part.index)
            out[f"#{k}"] = State(sub, part.preconditioner.init(sub)) if part.preconditioner.handles(sub) else State(sub)
        return out

    def _each(self, state: State):
        for k, part in enumerate(self.parts):
            sub = state[f"#{k}"]
            if part.preconditioner.handles(sub.block):
                yield part, sub

    def observe(self, state: State, seen: Seen) -> None:
        for part, sub in self._each(state):
            on(sub.block, part.preconditioner).observe(sub, _seen(part, seen))

    def descend(self, state: State, seen: Seen) -> Vec:
        out = list(seen.gradient if seen.momentum is None else seen.momentum)
        for part, sub in self._each(state):
            self._put(part, out, on(sub.block, part.preconditioner).descend(sub, _seen(part, seen)))
        return tuple(out)

    def pull(self, state: State, seen: Seen) -> Vec:
        out = list(seen.gradient)
        for part, sub in self._each(state):
            self._put(part, out, on(sub.block, part.preconditioner).pull(sub, _seen(part, seen)))
        return tuple(out)

    def push(self, state: State, y: Vec) -> Vec:
        out = list(y)
        for part, sub in self._each(state):
            self._put(part, out, on(sub.block, part.preconditioner).push(sub, tuple(y[i] for i in part.index)))
        return tuple(out)

    @staticmethod
    def _put(part: Part, out: list[Tensor], own: Vec) -> None:
        for i, t in zip(part.index, own, strict=True):
            out[i] = t

    def map(self, state: State) -> LinearMap:
        return BlockDiagonal(
            [(p.index, on(sub.block, p.preconditioner).map(sub)) for p, sub in self._each(state)], state.block.tensors
        )

    def factors(self, state: State) -> tuple[LinearMap, LinearMap]:
        pairs = [(p.index, *on(sub.block, p.preconditioner).factors(sub)) for p, sub in self._each(state)]
        F, N = ([(pair[0], pair[k]) for pair in pairs] for k in (1, 2))
        like = state.block.tensors
        return (Identity() if all(isinstance(m, Identity) for _, m in F) else BlockDiagonal(F, like)), BlockDiagonal(N, like)

    def wanted(self, state: State) -> Iterable[tuple[str, Request, Tensor | None]]:
        for part, sub in self._each(state):
            yield from on(sub.block, part.preconditioner).wanted(sub)

    def refresh(self, state: State, carried: Sequence[Vec] = ()) -> None:
        for part, sub in self._each(state):
            on(sub.block, part.preconditioner).refresh(sub, [tuple(v[i] for i in part.index) for v in carried])


def _seen(part: Part, seen: Seen) -> Seen:
    """What was seen of a part."""
    own = tuple(seen.gradient[i] for i in part.index)
    average = None if seen.momentum is None else tuple(seen.momentum[i] for i in part.index)
    z, p = _of(seen.position, part.index), _of(seen.parameters, part.index)
    return Seen(own, seen.inputs, average, seen.stride, z, seen.ready, p)


def _of(position: Callable[[], Vec] | None, index: tuple[int, ...]) -> Callable[[], Vec] | None:
    return None if position is None else lambda: tuple(position()[i] for i in index)


def over(index: tuple[int, ...], parts: Sequence[Part]) -> Preconditioner:
    """The preconditioner that a partition puts on the leaves ``index``: its only one there, or a :class:`Split`."""
    place = {leaf: i for i, leaf in enumerate(index)}
    inside = [p for p in parts if any(i in place for i in p.index)]
    distinct = {id(p.preconditioner): p.preconditioner for p in inside}
    if len(distinct) == 1:
        (only,) = distinct.values()
        if only.entrywise or (len(inside) == 1 and inside[0].index == index):
            return only
    return Split(tuple(Part(tuple(place[i] for i in p.index if i in place), p.preconditioner) for p in inside))
