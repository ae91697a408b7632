"""What is read of parameters and groups in each step, to see whether anything has changed: a column at a time."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from precond.optim.optimizer.naming import Naming

SHAPE, _wants, _dtype, PARAMETERS = map(operator.attrgetter, ("shape", "requires_grad", "dtype", "_parameters"))
_PLAIN = frozenset({bool, int, float, str, tuple, dict, type(None)})
"""Types of options that hold no tensor."""

Kinds = tuple[list[bool], list[torch.dtype], list[int]]
"""Whether each parameter wants gradients, its dtype, and the number of its device, -1 on a processor: numbers are compared at once."""


def read_kinds(params: Sequence[Tensor]) -> Kinds:
    """Of each parameter what decides where its state is, and in what dtype; a model may be converted at any time."""
    return list(map(_wants, params)), list(map(_dtype, params)), list(map(Tensor.get_device, params))


def read_options(groups: Iterable[Mapping[str, Any]], naming: Naming) -> list[tuple[Any, ...]]:
    """The options of groups; of tensors also their versions, since they may be changed in place."""
    found = [tuple(map(group.get, naming.defaults)) for group in groups]
    for k, options in enumerate(found):
        if not _PLAIN.issuperset(map(type, options)):
            found[k] = tuple((x, x._version) if isinstance(x, Tensor) else x for x in options)
    return found


def hold_tensors(options: list[tuple[Any, ...]]) -> bool:
    """Whether some options are tensors, which compare equal when they were changed in place."""
    return any(isinstance(x, tuple) and x and isinstance(x[0], Tensor) for o in options for x in o)


def structure(options: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """What decides which state is kept: options themselves, whole ones too (lengths of blocks); of others whether they are zero."""
    return [
        tuple(tuple(bool(y) for y in x) if isinstance(x, tuple) else bool(x) if isinstance(x, float) else x for x in o)
        for o in options
    ]
