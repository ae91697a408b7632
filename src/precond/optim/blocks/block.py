"""Leaves that one map acts on jointly, and stacks of such blocks alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from precond.algebra.sharding import Sums, sums
from precond.algebra.vec import Vec
from precond.optim.blocks.leaf import Leaf, state_dtype
from precond.optim.blocks.turns import is_due


@dataclass(frozen=True, eq=False)
class Block:
    """Leaves that one map acts on jointly, in this order.

    Attributes:
        leaves: the parameters, one or several.
    """

    leaves: tuple[Leaf, ...]

    @property
    def name(self) -> str:
        """Its leaf's, or those of its first and last."""
        return self.leaves[0].name if len(self.leaves) == 1 else f"{self.leaves[0].name} … {self.leaves[-1].name}"

    @cached_property
    def params(self) -> Vec:
        """The parameters themselves, each of its whole shape."""
        return tuple(leaf.param for leaf in self.leaves)

    @cached_property
    def groups(self) -> dict[int, Leaf]:
        """A leaf of each parameter group."""
        return {leaf.group: leaf for leaf in self.all_leaves}

    @cached_property
    def derived(self) -> dict[Any, Any]:
        """What others have made of it, by keys of their own: it stays as it is, and what is asked for in each step is made once."""
        return {}

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``derived`` has, made where it is asked for first."""
        if key not in self.derived:
            self.derived[key] = make()
        return self.derived[key]

    @cached_property
    def sharded(self) -> bool:
        """Whether other processes hold parts of it."""
        return any(leaf.shard is not None for leaf in self.leaves)

    @property
    def tensors(self) -> Vec:
        """What this process holds of the parameters: the tensors that are stepped."""
        return self.params if self._holds_params else tuple(leaf.tensor for leaf in self.leaves)

    @cached_property
    def _holds_params(self) -> bool:
        return all(type(leaf) is Leaf and leaf.shard is None for leaf in self.all_leaves)

    @property
    def known(self) -> bool:
        """Whether the values of all its parameters are known here."""
        return self._holds_params or all(leaf.known for leaf in self.all_leaves)

    @cached_property
    def dtypes(self) -> list[torch.dtype]:
        """Of the tensors of all leaves; a block whose parameters are converted is made anew."""
        return [leaf.param.dtype for leaf in self.all_leaves]

    def local(self, v: Sequence[Tensor]) -> list[Tensor]:
        """What this process holds of tensors of all leaves."""
        return [leaf.local(t) for leaf, t in zip(self.all_leaves, v, strict=True)]

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
        """Of some of its leaves, by position."""
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
        """What this process holds of all leaves."""
        return self.tensors

    def position(self) -> Vec:
        """The values of its parameters, as the block's own tensors, in float32 for 16-bit parameters."""
        return self.gathered(tuple(t.detach().to(state_dtype(t.dtype)) for t in self.all_tensors))

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

    @cached_property
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
