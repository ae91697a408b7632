"""Batches of examples: shuffled for training, in order for evaluation, the same for the same key."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor

from precond.analysis.curvature.batches import checked, size
from precond.lab.workloads.data import Part
from precond.lab.workloads.randomness import seed_all

Batch = tuple[Any, Tensor]
"""(inputs, targets)."""


class Batches(ABC):
    """A part of a data set, seen batch by batch."""

    @abstractmethod
    def __len__(self) -> int:
        """Batches of one epoch."""

    @abstractmethod
    def epoch(self, key: int) -> Iterator[Batch]:
        """One pass for training, in an order that depends on the key alone."""

    @abstractmethod
    def once(self) -> Iterator[Batch]:
        """One pass for evaluation, always over the same examples."""


class TensorBatches(Batches):
    """Batches of examples that are held in memory.

    Each epoch is a permutation cut into batches whose sizes differ by at most one, so that no batch is so small that batch
    statistics fail on it.

    Args:
        part: the examples.
        size: largest batch in training.
        at_most: evaluate on so many examples of a fixed permutation; None: on all.
        skipped: evaluate on those that come after so many others, where there are enough.
    """

    _EVALUATED_AT_ONCE = 256  # so many fit into the cache with the activations of a small convolutional net

    def __init__(self, part: Part, size: int, at_most: int | None = None, skipped: int = 0) -> None:
        self._part = self._evaluated = part
        self._pieces = -(-len(part) // size)
        if at_most is not None and at_most < len(part):
            first = skipped if skipped + at_most <= len(part) else 0
            self._evaluated = part[_permutation(len(part), key=0)[first : first + at_most]]

    def __len__(self) -> int:
        return self._pieces

    def epoch(self, key: int) -> Iterator[Batch]:
        for indices in _permutation(len(self._part), key).tensor_split(self._pieces):
            batch = self._part[indices]
            yield batch.inputs, batch.targets

    def once(self) -> Iterator[Batch]:
        size = self._EVALUATED_AT_ONCE
        return zip(self._evaluated.inputs.split(size), self._evaluated.targets.split(size), strict=True)


def _permutation(n: int, key: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(key))


class StreamBatches(Batches):
    """Batches of a user's own iterable, which is read anew for every pass.

    The key seeds the global generators before the iterable is read: a DataLoader that shuffles takes its order from there.

    Args:
        source: yields (inputs, targets), any number of times.
        device: where batches are moved.
        at_most: evaluate on the first batches that hold so many examples; None: on all.

    Raises:
        ValueError: for a batch that is no pair or holds no example: at once where batches are in memory or have to be counted.
    """

    def __init__(self, source: Iterable[Batch], device: str, at_most: int | None = None) -> None:
        self._source, self._device, self._at_most = source, device, at_most
        known = None if isinstance(source, list | tuple) else _length(source)
        self._length = sum(1 for _ in self._read()) if known is None else known

    def __len__(self) -> int:
        return self._length

    def epoch(self, key: int) -> Iterator[Batch]:
        seed_all(key)
        for inputs, targets in self._read():
            yield moved(inputs, self._device), moved(targets, self._device)

    def _read(self) -> Iterator[Batch]:
        for index, batch in enumerate(self._source):
            pair = checked(batch, index)
            size(pair, index)
            yield pair

    def once(self) -> Iterator[Batch]:
        seen = 0
        for inputs, targets in self.epoch(key=0):
            yield inputs, targets
            seen += len(targets)
            if self._at_most is not None and seen >= self._at_most:
                return


def _length(source: Iterable[Batch]) -> int | None:
    """How many batches there are; None where nothing says it, as of a loader of a data set without a length."""
    try:
        return len(source) if isinstance(source, Sized) else None
    except TypeError:
        return None


def moved(value: Any, device: str) -> Any:
    """Tensors in nested tuples, lists and dictionaries, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(moved(item, device) for item in value)
    return value
