"""Maps in another precision: the same mathematics on copies of the numbers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from precond.algebra.maps import LinearMap
from precond.analysis.curvature.graph_cache import GraphCache
from precond.analysis.curvature.objective import Objective


def in_float64(map: LinearMap) -> LinearMap:
    """The same map in float64: curvatures by :meth:`Objective.double`, other maps on copies of their tensors.

    Args:
        map: any map; it stays as it is.

    Returns:
        A map of the same kind, whose products are float64.

    Example:
        >>> from precond.algebra.maps import Diagonal
        >>> in_float64(Diagonal((torch.ones(1),))).d
        (tensor([1.], dtype=torch.float64),)
    """
    if isinstance(map, GraphCache):
        return map if all(p.dtype == torch.float64 for p in map.objective.params) else map.on(map.objective.double())
    other = copy.copy(map)
    for name, value in vars(map).items():
        if isinstance(getattr(type(map), name, None), cached_property):
            del vars(other)[name]  # made again, in the new precision
        else:
            vars(other)[name] = _doubled(value)
    return other


def _doubled(x: Any) -> Any:
    match x:
        case LinearMap():
            return in_float64(x)
        case Objective():
            return x.double()
        case Tensor():
            return x.double() if x.is_floating_point() else x
        case Mapping():
            return {key: _doubled(value) for key, value in x.items()}
        case tuple() | list() if not hasattr(x, "_fields"):
            return type(x)(_doubled(part) for part in x)
    return x
