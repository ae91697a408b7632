"""Scratch memory that the kernels of a thread share: fresh temporaries cost more than the arithmetic on them."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


class Workspace(threading.local):
    """One buffer per dtype, as long as the longest request so far; what is taken is valid until the next request."""

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._views: dict[tuple[torch.dtype, tuple[tuple[int, ...], ...]], list[Tensor]] = {}

    def take(self, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Uninitialized tensors side by side."""
        found = self._views.get((dtype, shapes))  # made once: for a small layer that costs as much as its products
        if found is not None:
            return found
        sizes = [-(-math.prod(shape) // 32) * 32 for shape in shapes]  # each at a multiple of 64 bytes
        buffer = self._buffers.get(dtype)
        if buffer is None or buffer.numel() < sum(sizes):
            buffer = self._buffers[dtype] = torch.empty(sum(sizes), dtype=dtype)
            self._views = {key: views for key, views in self._views.items() if key[0] != dtype}
        parts = buffer[: sum(sizes)].split(sizes)
        views = [part[: math.prod(shape)].view(shape) for part, shape in zip(parts, shapes, strict=True)]
        self._views[dtype, shapes] = views
        return views


WORKSPACE = Workspace()
