"""Memory that is taken again and again."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from precond.algebra.vec import Vec


class Memory:
    """Memory for one purpose at a time, kept on processors: what is freed there goes back to the system, which clears each page anew
    (about three times the cost of a copy). Accelerators' allocators keep it themselves, for all who want some."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Tensor] = {}

    def numbers(self, purpose: Hashable, n: int, like: Tensor) -> Tensor:
        """n numbers of any values, which are this purpose's until it asks again."""
        if like.device.type != "cpu":
            return like.new_empty(n)
        kept = self._kept.get(purpose)
        if kept is None or kept.numel() < n or kept.dtype != like.dtype:
            kept = self._kept[purpose] = like.new_empty(n)
        return kept[:n]

    def zeros(self, purpose: Hashable, like: Vec) -> Vec:
        """Zeros of the shapes of some tensors, one after the other."""
        sizes = [t.numel() for t in like]
        flat = self.numbers(purpose, sum(sizes), like[0]).zero_()
        return tuple(part.view(t.shape) for part, t in zip(flat.split_with_sizes(sizes), like, strict=True))


class Fresh(Memory):
    """Memory of its own for each who asks."""

    def numbers(self, purpose: Hashable, n: int, like: Tensor) -> Tensor:
        return like.new_empty(n)


FRESH = Fresh()


def joined(parts: list[Tensor], memory: Memory, purpose: Hashable, like: Tensor) -> Tensor:
    """Flat tensors one after the other."""
    return torch.cat(parts, out=memory.numbers(purpose, sum(t.numel() for t in parts), like)) if parts else like.new_empty(0)
