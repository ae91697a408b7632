"""The same maps made otherwise: in another precision, and with a root where M alone is stated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from precond.algebra.maps import LinearMap, Unrooted
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
    return _changed(map, _double)


def rooted(map: LinearMap) -> LinearMap:
    """The same map where M = P Pᵀ alone is stated of some of it: P is the symmetric root M^(1/2) there.

    Eigenvalues of PᵀHP are those of MH, whatever the root.

    Args:
        map: any map; it stays as it is.

    Returns:
        A map of the same kind.

    Example:
        >>> import torch
        >>> from precond.algebra.maps import SymmetricKronecker, Unrooted
        >>> rooted(Unrooted(SymmetricKronecker(torch.tensor([[4.0]]), None))).mv((torch.ones(1, 1),))
        (tensor([[2.]]),)
    """
    return _changed(map, lambda x: x.map if isinstance(x, Unrooted) else None)


def _double(x: Any) -> Any:
    match x:
        case GraphCache():
            return x if all(p.dtype == torch.float64 for p in x.objective.params) else x.on(x.objective.double())
        case Objective():
            return x.double()
        case Tensor():
            return x.double() if x.is_floating_point() else x
    return None


def _changed(x: Any, change: Callable[[Any], Any]) -> Any:
    """What ``change`` makes of something, or where that is None a copy with all that it holds changed so."""
    if (new := change(x)) is not None:
        return new
    match x:
        case LinearMap():
            other = copy.copy(x)
            for name, value in vars(x).items():
                if isinstance(getattr(type(x), name, None), cached_property):
                    del vars(other)[name]  # made again, of what is changed
                else:
                    vars(other)[name] = _changed(value, change)
            return other
        case Mapping():
            return {key: _changed(value, change) for key, value in x.items()}
        case tuple() | list() if not hasattr(x, "_fields"):
            return type(x)(_changed(part, change) for part in x)
    return x
