"""Batches of data: read once and kept, of one structure, with their sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

Batch = tuple[Any, Any]
"""(inputs, targets). Inputs are a tensor, or a tuple or dictionary that the model takes as its arguments."""


def kept(data: Any) -> Sequence[Any]:
    """The batches of ``data`` as something that yields the same batches every time.

    A sequence (a list, or an object of a class that derives from ``collections.abc.Sequence`` and reads from disk) stays as it
    is; any other iterable, such as a shuffling loader, is read once and its batches are kept.
    """
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        return (data,)
    if isinstance(data, Tensor | str | Mapping) or not isinstance(data, Iterable | Sequence):
        raise TypeError(
            f"Objective: data must be batches (inputs, targets), got {type(data).__name__}; give [(inputs, targets)] or a DataLoader"
        )
    if isinstance(data, Dataset):
        raise TypeError(
            f"Objective: data must be batches, got the data set {type(data).__name__} of single examples; give DataLoader(data, batch_size)"
        )
    batches = data if isinstance(data, Sequence) else tuple(data)
    if len(batches) == 0:
        raise ValueError(
            "Objective: data yields no batches; an iterator that was used up yields nothing: give a list or a DataLoader"
        )
    return batches


def checked(batch: Any, index: int) -> Batch:
    """The batch as (inputs, targets)."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        found = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
        raise ValueError(
            f"Objective: batch {index} of data must be a pair (inputs, targets), got {found}; pack several inputs in a tuple or a dict"
        )
    return batch[0], batch[1]


def structure(x: Any) -> str:
    """What two batches must have in common: kinds of containers, dtypes, numbers of dimensions."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} tensor with {x.ndim} dimensions"
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{key}: {structure(x[key])}" for key in sorted(x, key=str)) + "}"
    if isinstance(x, tuple | list):
        return "(" + ", ".join(structure(part) for part in x) + ")"
    return type(x).__name__


def size(batch: Batch, index: int) -> int:
    """The number of examples: the first dimension of the first tensor, of the inputs if they hold one."""
    for part in batch:
        for tensor in tensors(part):
            if tensor.ndim:
                if tensor.shape[0] == 0:
                    raise ValueError(
                        f"Objective: batch {index} of data has 0 examples (shape {tuple(tensor.shape)}); leave it out"
                    )
                return tensor.shape[0]
    raise ValueError(
        f"Objective: batch {index} of data holds no tensor with a batch dimension; give size=, a function of the batch"
    )


def tensors(x: Any) -> Iterable[Tensor]:
    """All tensors in nested tuples, lists and dictionaries, in order."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        for value in x.values():
            yield from tensors(value)
    elif isinstance(x, tuple | list):
        for value in x:
            yield from tensors(value)


def moved(x: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """The same nest with its tensors on a device, and its floating-point tensors in a dtype."""
    if isinstance(x, Tensor):
        x = x.clone() if x.is_inference() else x
        return x.to(device, dtype if x.is_floating_point() else None)
    if isinstance(x, Mapping):
        return {key: moved(value, device, dtype) for key, value in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(moved(value, device, dtype) for value in x))
    if isinstance(x, tuple | list):
        return type(x)(moved(value, device, dtype) for value in x)
    return x
