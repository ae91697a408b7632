"""Whether a step is taken, where the host is not to wait for the answer: inf and NaN are known to devices alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from precond.algebra.vec import Vec

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Verdict:
    """Of a step that inf or NaN may forbid.

    What the step writes is put back by products of the bits with 0 or 1, which are exact whatever the bits are, and which one
    multi-tensor kernel takes of many tensors: choices by ``torch.where`` would be a launch for each.

    Args:
        found: one element on any device, as ``found_inf`` of a GradScaler: 0 where the step is taken.
    """

    def __init__(self, found: Tensor):
        found = found.reshape(()).to(torch.float32).clamp(0, 1)
        self._found = {found.device: found}
        self._first = found

    @property
    def against(self) -> bool:
        """Whether the step was not taken; the host waits for the answer."""
        return bool(self._first)

    def found_inf(self, device: torch.device) -> Tensor:
        """1 where the step is not taken, else 0; float32, as torch's fused kernels read it."""
        if device not in self._found:
            self._found[device] = self._first.to(device, non_blocking=True)
        return self._found[device]

    def taken(self, device: torch.device) -> Tensor:
        """1 where the step is taken, else 0; float32."""
        return 1 - self.found_inf(device)

    def only(self, v: Sequence[Tensor]) -> Vec:
        """v where the step is taken, else 0: what is made of it is finite. Tensors of its own."""
        own = [t.clone() for t in v]
        for bits, device in _as_bits(own):
            torch._foreach_mul_(bits, self.taken(device).to(torch.int32))
        return tuple(own)

    @contextmanager
    def over(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """What is written into the tensors inside is put back where the step is not taken."""
        tensors = list(tensors)
        before = [t.clone() for t in tensors]
        yield
        for (new, device), (old, _) in zip(_as_bits(tensors), _as_bits(before), strict=True):
            torch._foreach_mul_(new, self.taken(device).to(torch.int32))
            torch._foreach_mul_(old, self.found_inf(device).to(torch.int32))
            torch._foreach_add_(new, old)


def over(verdict: Verdict | None, tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
    """:meth:`Verdict.over`; nothing where every step is taken, or the host knows."""
    return nullcontext() if verdict is None else verdict.over(tensors)


def _as_bits(tensors: Sequence[Tensor]) -> list[tuple[list[Tensor], torch.device]]:
    """Whole numbers with the same bits, by size and device."""
    found: dict[tuple[int, torch.device], list[Tensor]] = {}
    for t in tensors:
        found.setdefault((t.element_size(), t.device), []).append(t.view(_BITS[t.element_size()]))
    return [(bits, device) for (_, device), bits in found.items()]
