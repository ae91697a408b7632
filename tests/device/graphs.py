"""A CUDA graph that is pretended: what a device does while it is captured, to be done again on the same memory, and no Python with it.

Numbers that the host handed over are those of the capture, as in a real graph; what the host computed, counted or chose is not repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload


class Graph:
    """The operations of one capture, each with its results."""

    def __init__(self) -> None:
        self._calls: list[tuple[OpOverload, Sequence[Any], Mapping[str, Any], Any]] = []

    def __len__(self) -> int:
        return len(self._calls)

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Note what happens inside; as here nothing can be noted without being done, the caller puts back what it wrote."""
        global _current
        _current = self
        try:
            yield
        finally:
            _current = None

    def note(self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """One call, on real tensors."""
        self._calls.append((func, args, kwargs, out))

    def replay(self) -> None:
        """Do it all again."""
        with torch.no_grad():
            for func, args, kwargs, out in self._calls:
                for old, new in zip(_flat(out), _flat(func(*args, **kwargs)), strict=True):
                    if old is not new:
                        old.copy_(new)


_current: Graph | None = None


def current() -> Graph | None:
    """The one that is being captured."""
    return _current


def _flat(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [t for x in out for t in _flat(x)] if isinstance(out, list | tuple) else []
