"""The tensors that a block keeps between steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from precond.optim.blocks.block import Block, Stack
from precond.optim.blocks.leaf import Leaf
from precond.optim.blocks.turns import next_renewal

COUNTS = ("step", "clock")
"""What a state calls its counts of steps: the host's, and the device's where that counts."""


class Counts(tuple[Tensor, ...]):
    """Counts of steps that are the entries of one tensor: what they are is read where that has changed."""

    _read: tuple[int, list[int]] = (-1, [])

    def numbers(self) -> list[int]:
        """As integers."""
        if self._read[0] != (version := self[0]._version):
            self._read = version, whole_numbers(self)
        return self._read[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return Counts, (tuple(self),)


class State(dict[str, Any]):
    """Tensors of a block: a tuple holds one tensor per leaf, a lone tensor belongs to the first leaf, a State to a part.

    ``"step"``, one count per leaf, is put in by the optimizer and counts the step in progress. Where the host is not to know whether
    a step is taken (it may be skipped unread, or replayed), ``"clock"`` counts on the device those that are.

    Attributes:
        block: whose tensors these are.
    """

    def __init__(self, block: Block, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.block = block
        self._made: dict[str, tuple[Any, Any]] = {}
        self._sealed = False

    def kept(self, name: str, of: Any, make: Callable[[], Any]) -> Any:
        """What was made of the state last, until that of which it is made (versions of tensors, say) is another."""
        known = self._made.get(name)
        if known is None or known[0] != of:
            known = self._made[name] = of, make()
        return known[1]

    def seal(self) -> State:
        """From now on its tensors are written into, not replaced: those of the optimizer's state are the same."""
        self._sealed = True
        for value in self.values():
            if isinstance(value, State):
                value.seal()
        return self

    def __setitem__(self, key: str, value: Any) -> None:
        if self._sealed:
            raise TypeError(
                f"state[{key!r}] = … would put another tensor where the optimizer does not see it: write into the one that is "
                f"there, state[{key!r}].copy_(new), or for a tuple t.copy_(new) for each t, and make all tensors in init"
            )
        super().__setitem__(key, value)

    def __ior__(self, other: Any) -> State:  # type: ignore[override, misc]
        self.update(other)
        return self

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def written(self) -> Iterator[Tensor]:
        """All its tensors but the counts of steps."""
        for key, value in self.items():
            if isinstance(value, State):
                yield from value.written()
            elif key not in COUNTS:
                yield from value if isinstance(value, tuple) else (value,)

    @property
    def steps(self) -> list[int]:
        """The number of the step in progress for each leaf, from 1: what decides which work a step does."""
        counts, n = self["step"], len(self.block.leaves)
        known = counts.numbers() if isinstance(counts, Counts) else whole_numbers(counts[:n])
        return known if len(known) == n else known[:n]

    @property
    def times(self) -> Sequence[Any]:
        """The same as formulas take them: where the device counts, tensors of it (float64), one by one."""
        return self.steps if "clock" not in self else self._clock.unbind()

    @property
    def _clock(self) -> Tensor:
        return counted_together(self["clock"][: len(self.block.leaves)]).double()

    def unbiased(self, decay: float) -> Sequence[Any]:
        """1 − ρᵗ of each leaf: the sum of the weights in an average that started at 0, by which it is divided."""
        if "clock" not in self:
            return [1 - decay**t for t in self.steps]
        return (1 - decay**self._clock).unbind()

    def ahead(self) -> State:
        """A copy with tensors of its own and the step counts one ahead: what the statistics would become."""
        return self.copied(1)

    def copied(self, steps: int = 0) -> State:
        """A copy with tensors of its own, its step counts so many ahead."""
        out = State(self.block)
        for key, value in self.items():
            if isinstance(value, State):
                out[key] = value.copied(steps)
            elif key in COUNTS:
                out[key] = tuple(t + steps for t in value)
            else:
                out[key] = tuple(t.clone() for t in value) if isinstance(value, tuple) else value.clone()
        return out

    def merged(self, other: State, keep: Sequence[bool]) -> State:
        """Its own tensors of some leaves, another's of the rest and of what is no leaf's alone."""
        out = State(self.block)
        for key, value in self.items():
            if isinstance(value, State):
                out[key] = value.merged(other[key], keep)
            elif isinstance(value, tuple):
                out[key] = tuple(a if own else b for a, b, own in zip(value, other[key], keep, strict=True))
            else:
                out[key] = other[key]
        return out

    def hollow(self) -> State:
        """Its names, shapes and dtypes, and the step counts, with memory for one number of each tensor."""
        out = State(self.block)
        hollow = lambda t: t.new_zeros(()).expand(t.shape)  # noqa: E731
        for key, value in self.items():
            if isinstance(value, State):
                out[key] = value.hollow()
            elif key == "step":
                out[key] = value
            else:
                out[key] = tuple(map(hollow, value)) if isinstance(value, tuple) else hollow(value)
        return out

    def member(self, k: int) -> State:
        """The state of the k-th member of a stack, as a stack of one; the tensors are the same."""
        return self.span(slice(k, k + 1))

    def span(self, some: slice) -> State:
        """The state of some members of a stack, one beside the other; the tensors are the same.

        Raises:
            TypeError: of a block that stands alone.
        """
        stack = self.block
        if not isinstance(stack, Stack):
            raise TypeError(
                "span and due are of stacks, which methods of precond.Stacked are given; this block stands alone: ask "
                "state.block.due(state.steps[0], every)[0]"
            )
        if some == slice(0, len(stack.members)):
            return self
        out, m = State(stack.span(some)), len(stack.leaves)
        for key, value in self.items():
            if isinstance(value, State):
                out[key] = value.span(some)
            elif key in COUNTS:
                out[key] = value[some.start * m : some.stop * m]
            else:
                out[key] = tuple(t[some] for t in value) if isinstance(value, tuple) else value[some]
        return out

    def due(self, every: float) -> list[slice]:
        """The members of a stack for which the step in progress is one of a period's, as spans of them; a block alone is the only one.

        Turns are spread over the period, so that no step does the work of all; small matrices of one shape share one, and which is whose follows
        from shapes and their order within one optimizer. The first step is none of them.
        """
        return spans(self.block.due(self.steps[0], every))

    def until_renewed(self, every: float, ahead: int = 0) -> list[int]:
        """How many steps each member is away, at the step in progress or later, from one of 1, 2, 4, 8, … and then every so many."""
        t = min(self.steps) + ahead
        return [next_renewal(t, every, turn) - t for turn in self.block.turns]

    def as_stack(self) -> State:
        """The state of a block alone, as that of a stack of one; the tensors are the same.

        While these are not replaced it is one object, so that what is made of it is kept with it.
        """
        return self.kept("as stack", None, lambda: self._as_stack().seal()) if self._sealed else self._as_stack()

    def _as_stack(self) -> State:
        out = State(Stack.of([self.block]))
        for key, value in self.items():
            if isinstance(value, State):
                out[key] = value._as_stack()
            elif key in COUNTS:
                out[key] = value
            else:
                out[key] = tuple(t[None] for t in value) if isinstance(value, tuple) else value[None]
        return out

    def restricted(self, index: Sequence[int]) -> State:
        """The part that belongs to some leaves; the tensors are the same."""
        out = State(self.block.subset(index))
        for key, value in self.items():
            if isinstance(value, State):
                out[key] = value.restricted(index)
            else:
                out[key] = tuple(value[i] for i in index) if isinstance(value, tuple) else value
        return out.seal() if self._sealed else out

    def entries(self, prefix: str = "") -> Iterable[tuple[Leaf, str, Tensor]]:
        """(leaf, key, tensor) of everything but the step counts; parts add their name and a dot to the key (:func:`within`).

        Of a divided parameter the tensors of its shape are divided like it.
        """
        for key, value in self.items():
            if isinstance(value, State):
                yield from value.entries(prefix + within(key))
            elif key not in COUNTS:
                if isinstance(value, tuple):
                    for leaf, tensor in zip(self.block.all_leaves, self.block.scattered(value), strict=True):
                        yield leaf, prefix + key, leaf.whole(tensor)
                elif isinstance(self.block, Stack):
                    for member, tensor in zip(self.block.members, value.unbind(0), strict=True):
                        yield member.leaves[0], prefix + key, tensor
                else:
                    yield self.block.leaves[0], prefix + key, value


def whole_numbers(counts: Sequence[Tensor]) -> list[int]:
    """Counts of the host as integers."""
    # Of few, one by one: an operation costs more.
    return list(map(int, map(Tensor.item, counts) if len(counts) < 8 else counted_together(counts).tolist()))


def counted_together(counts: Sequence[Tensor]) -> Tensor:
    """(n,): the tensor whose entries these counts are, all of them in order; where they are only some, a new one."""
    base = counts[0]._base
    return base if base is not None and base.shape == (len(counts),) else torch.stack(list(counts))


def spans(chosen: Sequence[bool], longest: float = math.inf) -> list[slice]:
    """Where runs of True stand, those longer than the ``longest`` in pieces."""
    out: list[slice] = []
    for k, c in enumerate(chosen):
        if c and out and out[-1].stop == k and k - out[-1].start < longest:
            out[-1] = slice(out[-1].start, k + 1)
        elif c:
            out.append(slice(k, k + 1))
    return out


def within(key: str) -> str:
    """What the keys of a part's tensors begin with; numbered parts (``#0``) hold different leaves and add nothing."""
    return "" if key.startswith("#") else f"{key}."
