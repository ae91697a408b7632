"""Scratch memory that the kernels of a thread share: fresh temporaries cost more than the arithmetic on them."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor


class Workspace(threading.local):
    """One buffer per dtype, as long as the longest request so far; what is taken is valid until the next request."""

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._taken: dict[tuple[torch.dtype, tuple[Sequence[int], ...]], list[Tensor]] = {}

    def take(self, dtype: torch.dtype, *shapes: Sequence[int]) -> list[Tensor]:
        """Uninitialized tensors side by side."""
        if (known := self._taken.get((dtype, shapes))) is not None:
            return known
        sizes = [-(-math.prod(shape) // 32) * 32 for shape in shapes]  # each at a multiple of 64 bytes
        buffer = self._buffers.get(dtype)
        if buffer is None or buffer.numel() < sum(sizes):
            buffer = self._buffers[dtype] = torch.empty(sum(sizes), dtype=dtype)
            self._taken = {key: tensors for key, tensors in self._taken.items() if key[0] != dtype}
        parts = buffer[: sum(sizes)].split(sizes)
        tensors = [part[: math.prod(shape)].view(tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]
        self._taken[dtype, shapes] = tensors
        return tensors


WORKSPACE = Workspace()

WIDE = 128 * 128
"""Entries of a matrix from which on its products are faster in 16 bits than in 32."""
