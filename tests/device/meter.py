"""Counters of what a pretended device does, and the bytes that are alive on it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from device import prices

HERE = str(Path(__file__).parent)


@dataclass
class Count:
    """What happened, by operation and, where a host waits or devices mix, by the line of the caller.

    ``mixed`` are operations on tensors of several devices, most of which are errors on real ones; ``scattered`` are calls on lists
    whose tensors, one by one, are on several devices: the slow route.
    """

    launches: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    mixed: Counter[str] = field(default_factory=Counter)
    scattered: Counter[str] = field(default_factory=Counter)
    copies_in: Counter[str] = field(default_factory=Counter)
    copies_out: Counter[str] = field(default_factory=Counter)
    solvers: Counter[str] = field(default_factory=Counter)

    def plus(self, other: Count) -> Count:
        """Both together."""
        return Count(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def add(self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
        """Charge an operation that meets the device; ``tensors``: all among its arguments."""
        name = prices.name_of(func)
        if name in ("copy_", "_to_copy"):
            self._copy(name, args, kwargs)
            if name == "copy_" and args[0].device.type == "cpu":
                return
        elif len({t.device for t in tensors}) > 1:
            kind = self.scattered if prices.pairs_up(func, args) else self.mixed
            kind[f"{name} at {_caller()}"] += 1
        if prices.waits(func, args):
            self.reads[f"{name} at {_caller()}"] += 1
        if name in prices.SOLVERS:
            self.solvers[f"{name} {tuple(tensors[0].shape)}"] += 1
        if charge := prices.launches(func, args, kwargs):
            self.launches[name] += charge

    def _copy(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Between host and device, in either direction; what comes to the host is waited for."""
        to, source = (args[0].device, args[1]) if name == "copy_" else (kwargs.get("device") or args[0].device, args[0])
        if to.type == source.device.type:
            return
        (self.copies_in if to.type != "cpu" else self.copies_out)[f"{tuple(source.shape)} at {_caller()}"] += 1
        if to.type == "cpu":
            self.reads[f"{name} at {_caller()}"] += 1


class Meter:
    """Where operations are charged, if anywhere, and the bytes alive on the device.

    Attributes:
        live: bytes of storages now.
        peak: the most since :meth:`mark`.
    """

    def __init__(self) -> None:
        self.count: Count | None = None
        self.live = self.peak = 0
        self._storages: dict[int, list[int]] = {}

    @contextmanager
    def into(self, count: Count | None) -> Iterator[None]:
        """Charge what happens within to ``count``, or to nobody."""
        before, self.count = self.count, count
        try:
            yield
        finally:
            self.count = before

    def mark(self) -> int:
        """The bytes alive now, from which the peak is counted anew."""
        self.peak = self.live
        return self.live

    def hold(self, tensor: Tensor) -> int:
        """One more user of the tensor's storage; the key to :meth:`release` it by."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            self._storages[key][1] += 1
        else:
            self._storages[key] = [storage.nbytes(), 1]
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
        return key

    def release(self, key: int) -> None:
        """One user less."""
        held = self._storages[key]
        held[1] -= 1
        if not held[1]:
            self.live -= held[0]
            del self._storages[key]


METER = Meter()
"""The one of this process."""


def _caller() -> str:
    """The nearest line that is neither torch's nor of this folder."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(HERE) and "/torch/" not in file and not file.startswith("<"):
            return f"{'/'.join(Path(file).parts[-3:])}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
