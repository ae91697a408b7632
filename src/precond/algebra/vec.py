"""Vectors of a parameter space: tuples of tensors, one per parameter.

Every operation returns a new tuple and leaves its arguments alone; names that end in ``_`` write into
their first argument. One multi-tensor call stands for one loop over the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

Vec = tuple[Tensor, ...]
Tensors = tuple[Tensor, ...] | list[Tensor]
"""What torch's multi-tensor operations take."""
Scalar = float | Tensor
"""A number, or a tensor of one element (a learning rate that must not be read by the host)."""


def together(f: Callable[..., Any], a: Tensors, *lists: Sequence[Any], **options: Any) -> Vec:
    """A multi-tensor operation f(a, *lists), of the tensors of each device by themselves: of several ones torch takes one after the other."""
    if not a:
        return ()
    first = a[0].device
    if all(t.device == first for t in a):
        return tuple(f(a, *lists, **options) or ())
    devices: dict[torch.device, list[int]] = {}
    for i, t in enumerate(a):
        devices.setdefault(t.device, []).append(i)
    out: dict[int, Tensor] = {}
    for index in devices.values():
        out |= zip(index, f(*([x[i] for i in index] for x in (a, *lists)), **options) or (), strict=False)
    return tuple(out[i] for i in sorted(out))


def add(a: Vec, b: Vec, alpha: float = 1.0) -> Vec:
    """a + alpha·b."""
    return together(torch._foreach_add, a, b, alpha=alpha)


def sub(a: Vec, b: Vec) -> Vec:
    """a − b."""
    return together(torch._foreach_sub, a, b)


def mul(a: Vec, b: Vec) -> Vec:
    """Entrywise product."""
    return together(torch._foreach_mul, a, b)


def div(a: Vec, b: Vec) -> Vec:
    """Entrywise quotient."""
    return together(torch._foreach_div, a, b)


def copy_(a: Vec, b: Vec) -> None:
    """a ← b in place."""
    together(torch._foreach_copy_, a, b)


def scale(a: Vec, s: Scalar | Sequence[Scalar]) -> Vec:
    """s·a with one scalar, one scalar per tensor, or a tensor of numbers that is broadcast."""
    if not a:
        return ()
    if isinstance(s, Tensor) and s.ndim:
        return tuple(t * s for t in a)
    if isinstance(s, Sequence):
        if not any(isinstance(x, Tensor) for x in s):
            return together(torch._foreach_mul, a, [float(x) for x in s])
        return tuple(t * x for t, x in zip(a, s, strict=True))
    if not isinstance(s, Tensor):
        return together(torch._foreach_mul, a, [s] * len(a))
    if all(t.device == s.device for t in a):
        return tuple(torch._foreach_mul(a, s))
    there: dict[torch.device, Tensor] = {}
    return tuple(t * there.setdefault(t.device, s.to(t.device)) for t in a)


def map_(f, a: Vec) -> Vec:
    """f applied to each tensor."""
    return tuple(f(t) for t in a)


def zeros_like(a: Vec) -> Vec:
    """The zero vector of the same shapes, dtypes and devices."""
    return tuple(torch.zeros_like(t) for t in a)


def dot(a: Vec, b: Vec) -> Tensor:
    """⟨a, b⟩ as a tensor of one element; 0 for the empty vector."""
    if not a:
        return torch.zeros(())
    parts = [_dot([a[i] for i in index], [b[i] for i in index]).to(a[0].device) for index in _bundles(a)]
    return torch.stack(parts).sum()


def _dot(a: Tensors, b: Tensors) -> Tensor:
    """The same, of a few small tensors together: a call costs more than the arithmetic on them."""
    if len(a) == 1:
        return torch.dot(a[0].reshape(-1), b[0].reshape(-1))
    product = torch.cat([t.reshape(-1) for t in a])
    torch._foreach_mul_(product.split([t.numel() for t in a]), [t.reshape(-1) for t in b])
    return product.sum()


def _bundles(a: Vec, size: int = 2**20) -> list[list[int]]:
    """Positions of tensors of one dtype and device, in bundles of no more entries than a size, but for single ones."""
    out: list[list[int]] = []
    filled: dict[tuple[torch.dtype, torch.device], tuple[int, list[int]]] = {}
    for i, t in enumerate(a):
        count, bundle = filled.get((t.dtype, t.device), (size + 1, []))
        if count + t.numel() > size:
            count, bundle = 0, []
            out.append(bundle)
        bundle.append(i)
        filled[t.dtype, t.device] = count + t.numel(), bundle
    return out


def by_shape(a: Vec) -> list[list[int]]:
    """Positions of tensors of one shape, dtype and device."""
    found: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = {}
    for i, t in enumerate(a):
        found.setdefault((t.shape, t.dtype, t.device), []).append(i)
    return list(found.values())


def norm(a: Vec, q: float = 2) -> Tensor:
    """‖a‖_q over all entries of all tensors, as a tensor of one element."""
    full = [t for t in a if t.numel()]
    if not full:
        return torch.zeros(())
    parts = torch.stack([n.to(full[0].device) for n in together(torch._foreach_norm, full, ord=q)])
    return torch.linalg.vector_norm(parts, q)


def all_finite(a: Vec) -> bool:
    """Whether no entry is inf or NaN (reads one number from the device)."""
    # A sum tells it in one pass at the speed of memory, some twenty times as fast as the largest magnitude; only one that overflows does not.
    full = [t for t in a if t.numel()]
    if not all([t.device.type == "cpu" for t in full]):
        return math.isfinite(norm(tuple(full), math.inf))
    sizes = [t.numel() for t in full]
    if len(full) > 2 and sum(sizes) < 2**16 and len({t.dtype for t in full}) == 1:  # a call costs more than the arithmetic
        total = _flatten_dense_tensors(full).sum().item()
    else:
        total = sum([t.sum().item() for t in full])  # reading a number here is cheaper than an operation
    return math.isfinite(total) or all(bool(t.isfinite().all()) for t in full)


def nonfinite(a: Vec) -> Tensor:
    """1 where an entry is inf or NaN, else 0; a tensor of one element, which the host does not read."""
    return 1 - norm(a, math.inf).isfinite().float()


def is_captured(t: Tensor) -> bool:
    """Whether operations on a tensor are being captured in a CUDA graph: they are noted, not done, and repeated later on the same memory."""
    return t.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def flatten(a: Vec) -> Tensor:
    """The entries in order, row-major, as one vector."""
    return torch.cat([t.reshape(-1) for t in a]) if a else torch.zeros(0)


def unflatten(flat: Tensor, like: Vec) -> Vec:
    """The inverse of :func:`flatten` for the shapes of ``like``."""
    parts = flat.split([t.numel() for t in like])
    return tuple(part.view(t.shape) for part, t in zip(parts, like, strict=True))


def add_scaled_(a: Vec, b: Vec, s: Sequence[Scalar]) -> None:
    """a ← a + s·b in place, one scalar per tensor; a scalar that is a tensor is not read by the host."""
    for x, index in _alike(s):
        first, second = [a[i] for i in index], [b[i] for i in index]
        if isinstance(x, Tensor):
            together(torch._foreach_add_, first, scale(tuple(second), x.to(first[0].dtype)))
        elif x:
            together(torch._foreach_add_, first, second, alpha=x)


def scale_(a: Vec, s: Sequence[Scalar]) -> None:
    """a ← s·a in place, one scalar per tensor."""
    for x, index in _alike(s):
        some = [a[i] for i in index]
        if isinstance(x, Tensor):
            for device in dict.fromkeys(t.device for t in some):
                torch._foreach_mul_([t for t in some if t.device == device], x.to(device))
        elif x != 1:
            together(torch._foreach_mul_, some, [x] * len(some))


def combined(f: Callable[..., Scalar], *scalars: Sequence[Scalar]) -> list[Scalar]:
    """f of the scalars of each tensor; computed once for those that are the same objects."""
    known: dict[tuple[int, ...], Scalar] = {}
    out = []
    for each in zip(*scalars, strict=True):
        key = tuple(map(id, each))
        if key not in known:
            known[key] = f(*each)
        out.append(known[key])
    return out


def uniform(values: Sequence[Scalar]) -> bool:
    """Whether all values are one number; tensors are not read, only the same tensor counts as equal."""
    first, *others = values
    numbers = not any(isinstance(x, Tensor) for x in values)
    return all(x is first or (numbers and x == first) for x in others)


def larger(a: Scalar, b: Scalar) -> Scalar:
    """The larger of two scalars; tensors are not read by the host."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return max(a, b)
    like = a if isinstance(a, Tensor) else b
    return torch.maximum(*(x if isinstance(x, Tensor) else torch.full_like(like, x) for x in (a, b)))  # type: ignore[arg-type]


def _alike(s: Sequence[Scalar]) -> list[tuple[Scalar, list[int]]]:
    """The different scalars, and where each stands; tensors are not read, only the same tensor counts as equal."""
    found: dict[Any, tuple[Scalar, list[int]]] = {}
    for i, x in enumerate(s):
        found.setdefault(id(x) if isinstance(x, Tensor) else float(x), (x, []))[1].append(i)
    return list(found.values())
