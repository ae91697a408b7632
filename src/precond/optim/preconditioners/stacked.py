"""Preconditioners whose methods take blocks alike side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from precond.algebra.maps import Identity, LinearMap
from precond.algebra.maps.stacked import OfMembers
from precond.algebra.vec import Vec
from precond.optim.blocks import Block, Stack, State
from precond.optim.inputs import Request
from precond.optim.preconditioners.base import Preconditioner
from precond.optim.preconditioners.seen import Seen


class Stacked(Preconditioner):
    """A preconditioner whose ``observe``, ``map`` and ``refresh`` take stacks of k blocks alike: their tensors are (k, …).

    ``init`` makes the state of one block, k being absent. Products are batched ones; numbers that differ among members are tensors
    (k,). A block alone comes as a stack of one. Members take turns in periodic work: ``state.due(every)`` says whose turn it is, as slices
    of the stack, and ``state.span(some)`` is their state, the tensors being the same.

    Example:
        >>> import torch, precond
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class RowsAlike(precond.Stacked):  # M = 1/tr L on each matrix, L the mean of G Gᵀ
        ...     def init(self, block):
        ...         return {"trace": block.zeros()[0].new_zeros(())}
        ...
        ...     def observe(self, state, seen):
        ...         state["trace"].lerp_(seen.gradient[0].square().sum((1, 2)), 0.5)  # (k,) of (k, A, B)
        ...
        ...     def map(self, state):
        ...         return precond.InverseRoot(tuple(state["trace"].view(-1, 1, 1).expand_as(p) for p in state.block.tensors))
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(3, 3, bias=False) for _ in range(4)))
        >>> optimizer = precond.PreconditionedGD(model, lr=0.1, preconditioner=RowsAlike())
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step(), [layer.weight.grad.isfinite().all().item() for layer in model]
        (None, [True, True, True, True])
    """

    @cached_property
    def singly(self) -> Preconditioner:
        return _Singly(self)


@dataclass(frozen=True)
class _Singly(Preconditioner):
    """A preconditioner that takes stacks, on a block alone."""

    of: Stacked

    def init(self, block: Block) -> State | dict[str, Any]:
        return self.of.init(block)

    def observe(self, state: State, seen: Seen) -> None:
        self.of.observe(state.as_stack(), self._seen(seen))

    def map(self, state: State) -> LinearMap:
        return self._apart(self.of.map(state.as_stack()), state)

    def factors(self, state: State) -> tuple[LinearMap, LinearMap]:
        F, N = self.of.factors(state.as_stack())
        return F if isinstance(F, Identity) else self._apart(F, state), self._apart(N, state)

    def _seen(self, seen: Seen) -> Seen:
        momentum, z, p = seen.momentum, seen.position, seen.parameters
        stride = None if seen.stride is None else seen.stride.reshape(1)
        return Seen(
            _one(seen.gradient),
            seen.inputs,
            momentum and _one(momentum),
            stride,
            z and (lambda: _one(z())),
            parameters=p and (lambda: _one(p())),
        )

    def descend(self, state: State, seen: Seen) -> Vec:
        return tuple(t[0] for t in self.of.descend(state.as_stack(), self._seen(seen)))

    def pull(self, state: State, seen: Seen) -> Vec:
        return tuple(t[0] for t in self.of.pull(state.as_stack(), self._seen(seen)))

    def push(self, state: State, y: Vec) -> Vec:
        return tuple(t[0] for t in self.of.push(state.as_stack(), _one(y)))

    def wanted(self, state: State) -> Iterable[tuple[str, Request, Tensor | None]]:
        return self.of.wanted(state.as_stack())

    def refresh(self, state: State, carried: Sequence[Vec] = ()) -> None:
        self.of.refresh(state.as_stack(), [_one(v) for v in carried])

    @staticmethod
    def _apart(P: LinearMap, state: State) -> LinearMap:
        return OfMembers(P, Stack.of([state.block]))


def _one(v: Vec) -> Vec:
    return tuple(t[None] for t in v)
