"""Leaves (parameters with what is known of them) and blocks (leaves that one map acts on jointly)."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from precond.exchange import Pieces, held_by
from precond.sharding import Shard, Sums, local, sums
from precond.turns import is_due, next_renewal
from precond.vec import Vec

COUNTS = ("step", "clock")
"""What a state calls its counts of steps: the host's, and the device's where that counts."""

_OUTPUTS = {"head", "heads", "lm_head", "classifier", "output", "readout", "unembed", "logits"}


@dataclass(frozen=True, eq=False)
class Leaf:
    """One parameter.

    Attributes:
        name: its qualified name, ``param_3`` where no names are known.
        param: the parameter.
        kind: ``"weight"``, ``"bias"``, ``"norm"``, ``"embedding"``, or ``"vector"`` (one-dimensional, its module unknown).
        layer: qualified name of the module that owns it; its own name where none is known.
        module: that module, or None.
        attribute: what the module calls it, or nothing.
        group: the number of its parameter group.
        sites: where the inputs of the layer are observed, for which it is the weight or the bias.
        inputs_first: whether its first dimension counts the inputs of its layer, as in transposed convolutions.
        turn: which of the steps of a period its periodic work falls on (:mod:`precond.turns`).
        replicas: the processes that hold copies of it, as under DistributedDataParallel; None where none are known.
        shared: whether several modules hold it, as where a head's weight is the table of embeddings.
    """

    name: str
    param: Tensor = field(repr=False)
    kind: str = "weight"
    layer: str = ""
    module: nn.Module | None = field(default=None, repr=False)
    group: int = 0
    sites: tuple[Any, ...] = field(default=(), repr=False)
    inputs_first: bool = False
    attribute: str = field(default="", repr=False)
    turn: int = 0
    replicas: Any = field(default=None, repr=False)
    shared: bool = False

    @property
    def shape(self) -> torch.Size:
        return self.param.shape

    @property
    def ndim(self) -> int:
        return self.param.ndim

    @cached_property
    def shard(self) -> Shard | None:
        """How it is divided among processes; None where this one holds all of it."""
        return Shard.of(self.param)

    @cached_property
    def pieces(self) -> Pieces | None:
        """Who holds what of it; None where this process alone is known to hold it."""
        return held_by(self.param, self.replicas)

    def span(self, dim: int) -> range | None:
        """The positions along ``dim`` that this process holds; None where it is divided along another dimension."""
        if self.pieces is None:
            return range(self.shape[dim])
        box = self.pieces.boxes[self.pieces.rank]
        if any(s != slice(0, n) for d, (s, n) in enumerate(zip(box, self.shape, strict=True)) if d != dim):
            return None
        return range(box[dim].start, box[dim].stop)

    @property
    def tensor(self) -> Tensor:
        """The memory that this process holds of it."""
        return self.local(self.param)

    @property
    def known(self) -> bool:
        """Whether its values are those of ``tensor``."""
        return True

    def local(self, t: Tensor) -> Tensor:
        """This process's part of a tensor that is divided like the parameter."""
        return t if self.shard is None else local(t)

    def whole(self, part: Tensor) -> Tensor:
        """The inverse of :meth:`local`."""
        return part if self.shard is None else self.shard.whole(part)


@dataclass(frozen=True, eq=False)
class Gathered(Leaf):
    """A parameter of which processes hold parts, where one of them steps all of it: its gradient comes, and its values stay away.

    Attributes:
        zeros: what ``tensor`` is, of its whole shape, unless values are shown.
        shown: its values, for as long as they are shown.
    """

    zeros: Tensor = field(default_factory=lambda: torch.zeros(()), repr=False)
    shown: list[Tensor] = field(default_factory=list, repr=False)
    shard = None

    @property
    def tensor(self) -> Tensor:
        return self.shown[-1] if self.shown else self.zeros

    @property
    def known(self) -> bool:
        return bool(self.shown)


Rule = Callable[[Leaf], bool] | str
"""Which parameters: a predicate of a leaf, or a pattern for its name (``"*.bias"``)."""


def matches(rule: Rule | None, leaf: Leaf) -> bool:
    """Whether a rule holds for a leaf; None holds for all."""
    if rule is None:
        return True
    if isinstance(rule, str):
        return fnmatch.fnmatchcase(leaf.name, rule)
    try:
        return bool(rule(leaf))
    except Exception as error:
        error.add_note(f"raised by the rule (where=) {rule!r} for the parameter {leaf.name!r}; a rule takes a precond.Leaf")
        raise


def is_decayed(leaf: Leaf) -> bool:
    """Not a bias, a normalization layer's parameter or an embedding: what weight decay is usually meant for."""
    return leaf.kind == "weight"


def is_matrix(leaf: Leaf) -> bool:
    """A weight with at least two dimensions that is no embedding."""
    return leaf.kind == "weight" and leaf.ndim >= 2


def is_hidden(leaf: Leaf) -> bool:
    """A matrix between layers: not an embedding, and by its name not the layer that makes the outputs."""
    return is_matrix(leaf) and _OUTPUTS.isdisjoint(leaf.name.split("."))


@dataclass(frozen=True, eq=False)
class Block:
    """Leaves that one map acts on jointly, in this order."""

    leaves: tuple[Leaf, ...]

    @property
    def name(self) -> str:
        return self.leaves[0].name if len(self.leaves) == 1 else f"{self.leaves[0].name} … {self.leaves[-1].name}"

    @cached_property
    def params(self) -> Vec:
        return tuple(leaf.param for leaf in self.leaves)

    @cached_property
    def groups(self) -> dict[int, Leaf]:
        """A leaf of each parameter group."""
        return {leaf.group: leaf for leaf in self.leaves}

    @cached_property
    def derived(self) -> dict[Any, Any]:
        """What others have made of it, by keys of their own: it stays as it is, and what is asked for in each step is made once."""
        return {}

    @cached_property
    def sharded(self) -> bool:
        """Whether other processes hold parts of it."""
        return any(leaf.shard is not None for leaf in self.leaves)

    @property
    def tensors(self) -> Vec:
        """What this process holds of the parameters: the tensors that are stepped."""
        return tuple(leaf.tensor for leaf in self.leaves)

    @property
    def known(self) -> bool:
        """Whether the values of all its parameters are known here."""
        return all(leaf.known for leaf in self.all_leaves)

    @cached_property
    def dtypes(self) -> list[torch.dtype]:
        """Of the tensors; a block whose parameters are converted is made anew."""
        return [t.dtype for t in self.tensors]

    @property
    def gradients(self) -> list[Tensor | None]:
        """What ``.grad`` holds of all leaves, or None."""
        if not self.sharded:
            return [leaf.param.grad for leaf in self.all_leaves]
        return [None if leaf.param.grad is None else leaf.local(leaf.param.grad) for leaf in self.all_leaves]

    @cached_property
    def sums(self) -> Sums:
        """Sums over vectors of the block, whoever holds them."""
        return sums([leaf.shard for leaf in self.leaves])

    @property
    def means(self) -> Callable[[Vec], Sequence[Tensor]] | None:
        """The mean over the entries of each tensor, where other processes hold some of them."""
        return self.sums.means if self.sharded else None

    def zeros(self, fill: float = 0.0) -> Vec:
        """State of the parameters' shapes: in their dtype, in float32 for 16-bit parameters."""
        return tuple(torch.full_like(p, fill, dtype=state_dtype(p.dtype), requires_grad=False) for p in self.tensors)

    def subset(self, index: Sequence[int]) -> Block:
        return Block(tuple(self.leaves[i] for i in index))

    def due(self, step: int, every: float) -> tuple[bool, ...]:
        """Whether a step is one of a period's; of a stack, for each member."""
        return tuple(is_due(step, every, turn) for turn in self.turns)

    @property
    def all_leaves(self) -> tuple[Leaf, ...]:
        """The leaves of all members of a stack; of a block alone its own."""
        return self.leaves

    @property
    def all_tensors(self) -> Vec:
        return self.tensors

    @cached_property
    def turns(self) -> list[int]:
        """The turn of each member of a stack, that of its first leaf; of a block alone its own."""
        return [self.leaves[0].turn]

    def gathered(self, v: Sequence[Tensor]) -> Vec:
        """Tensors of the leaves as the block's own."""
        return tuple(v)

    def scattered(self, v: Vec) -> Vec:
        """The inverse of :meth:`gathered`."""
        return v


@dataclass(frozen=True, eq=False)
class Stack(Block):
    """Blocks alike, as one: each of its tensors holds those of all members side by side, (k, …); its leaves are the first one's."""

    members: tuple[Block, ...] = ()

    @classmethod
    def of(cls, members: Sequence[Block]) -> Stack:
        """The stack of some blocks, in their order."""
        return cls(members[0].leaves, tuple(members))

    @property
    def name(self) -> str:
        return ", ".join(member.name for member in self.members)

    @property
    def all_leaves(self) -> tuple[Leaf, ...]:
        return tuple(leaf for member in self.members for leaf in member.leaves)

    @cached_property
    def turns(self) -> list[int]:
        return [member.leaves[0].turn for member in self.members]

    @cached_property
    def params(self) -> Vec:
        """Examples of the stacked parameters, of their shapes; the values are the first member's."""
        return tuple(t.detach()[None].expand(len(self.members), *t.shape) for t in self.members[0].tensors)

    @property
    def tensors(self) -> Vec:
        return self.params

    @property
    def all_tensors(self) -> Vec:
        """What this process holds of all leaves."""
        return tuple(leaf.tensor.detach() for leaf in self.all_leaves)

    @property
    def means(self) -> Callable[[Vec], Sequence[Tensor]]:
        """The mean of the finite entries of each member's tensors, (k, 1, …)."""
        return lambda v: [_means(t) for t in v]

    def gathered(self, v: Sequence[Tensor]) -> Vec:
        """Tensors of all leaves, member after member, as stacked ones."""
        m = len(self.leaves)
        if len(self.members) == 1:
            return tuple(t[None] for t in v)
        return tuple(torch.stack(v[j::m]) for j in range(m))  # type: ignore[arg-type]

    def scattered(self, v: Vec) -> Vec:
        """The inverse of :meth:`gathered`; nothing is copied."""
        return tuple(t for member in zip(*(t.unbind(0) for t in v), strict=True) for t in member)

    def member(self, k: int) -> Stack:
        """The k-th block, as a stack of one."""
        return self.span(slice(k, k + 1))

    def span(self, some: slice) -> Stack:
        """Some of its blocks."""
        return Stack.of(self.members[some])

    def subset(self, index: Sequence[int]) -> Stack:
        return Stack.of([member.subset(index) for member in self.members])


def _means(t: Tensor) -> Tensor:
    flat = t.flatten(1) if t.ndim > 1 else t[:, None]
    finite = flat.isfinite()
    mean = torch.where(finite, flat, 0).sum(1) / finite.sum(1).clamp_min(1)
    return mean.view(-1, *[1] * (t.ndim - 1))


class State(dict[str, Any]):
    """Tensors of a block: a tuple holds one tensor per leaf, a lone tensor belongs to the first leaf, a State to a part.

    ``"step"``, one count per leaf, is put in by the optimizer and counts the step in progress. Where the host is not to know whether
    a step is taken (it may be skipped unread, or replayed), ``"clock"`` counts on the device those that are.
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
        return whole_numbers(self["step"][: len(self.block.leaves)])

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
        """The state of some members of a stack, one beside the other; the tensors are the same."""
        stack = self.block
        assert isinstance(stack, Stack)
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
        """The members of a stack for which the step in progress is one of a period's, as spans of them."""
        return spans(self.block.due(self.steps[0], every))

    def until_renewed(self, every: float, ahead: int = 0) -> list[int]:
        """How many steps each member is away, at the step in progress or later, from one of 1, 2, 4, 8, … and then every so many."""
        t = min(self.steps) + ahead
        return [next_renewal(t, every, turn) - t for turn in self.block.turns]

    def as_stack(self) -> State:
        """The state of a block alone, as that of a stack of one; the tensors are the same."""
        out = State(Stack.of([self.block]))
        for key, value in self.items():
            if isinstance(value, State):
                out[key] = value.as_stack()
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
    return [int(t.item()) for t in counts] if len(counts) < 8 else [int(t) for t in counted_together(counts).tolist()]


def counted_together(counts: Sequence[Tensor]) -> Tensor:
    """(n,): the tensor whose entries these counts are, all of them in order; where they are only some, a new one."""
    base = counts[0]._base
    return base if base is not None and base.shape == (len(counts),) else torch.stack(list(counts))


def spans(chosen: Sequence[bool]) -> list[slice]:
    """Where runs of True stand."""
    out: list[slice] = []
    for k, c in enumerate(chosen):
        if c and out and out[-1].stop == k:
            out[-1] = slice(out[-1].start, k + 1)
        elif c:
            out.append(slice(k, k + 1))
    return out


def within(key: str) -> str:
    """What the keys of a part's tensors begin with; numbered parts (``#0``) hold different leaves and add nothing."""
    return "" if key.startswith("#") else f"{key}."


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for 16-bit floats, the dtype itself otherwise."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def by_tensor(leaves: Sequence[Leaf]) -> list[tuple[int, ...]]:
    """One block per tensor."""
    return [(i,) for i in range(len(leaves))]


def by_layer(leaves: Sequence[Leaf]) -> list[tuple[int, ...]]:
    """One block per layer: a module's own parameters, the weight first."""
    layers: dict[str, list[int]] = {}
    for i, leaf in enumerate(leaves):
        layers.setdefault(leaf.layer, []).append(i)
    return [tuple(sorted(i, key=lambda j: leaves[j].kind == "bias")) for i in layers.values()]


def together(leaves: Sequence[Leaf]) -> list[tuple[int, ...]]:
    """One block of everything."""
    return [tuple(range(len(leaves)))] if leaves else []


def by_group(leaves: Sequence[Leaf]) -> list[tuple[int, ...]]:
    """One block per parameter group: for maps that act entry by entry, which are fastest on many tensors at once."""
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        groups.setdefault((leaf.group, leaf.param.device, state_dtype(leaf.param.dtype)), []).append(i)
    return [tuple(i) for i in groups.values()]


def join(a: Sequence[tuple[int, ...]], b: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The finest partition that both refine (a ∨ b); within a block, the order of a's blocks."""
    owner: dict[int, list[int]] = {}
    for part in [*a, *b]:
        merged: list[int] = []
        for block in {id(owner[i]): owner[i] for i in part if i in owner}.values():
            merged += block
        merged += [i for i in part if i not in owner]
        for i in merged:
            owner[i] = merged
    return [tuple(block) for block in {id(block): block for block in owner.values()}.values()]
