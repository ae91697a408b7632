"""What a layer was called with, as dense numbers: which argument its weight meets, and whether that can be read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils._pytree import tree_leaves

from precond.algebra.sharding import replicated

_USUAL = ("input", "x", "inputs", "hidden_states")
"""Names that a layer's one input has, the surest first."""


class Unreadable(Exception):
    """The inputs of a call cannot be read; the message says why, as a verb whose subject is the weight."""


def called_with(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name; surplus ones by number."""
    names, variadic = _parameters(module.forward if "forward" in vars(module) else type(module).forward)
    named = dict(zip(names, args, strict=False))
    named |= {f"*{i}": x for i, x in enumerate(args[len(names) :])} if variadic else {}
    return {**named, **kwargs}


@lru_cache(maxsize=256)
def _parameters(forward: Callable[..., Any]) -> tuple[tuple[str, ...], bool]:
    """(names of what may be given by position, without self; whether any number may be)."""
    found = list(inspect.signature(forward).parameters.values())
    found = found if inspect.ismethod(forward) or not found or found[0].name != "self" else found[1:]
    names = tuple(p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    return names, any(p.kind is p.VAR_POSITIONAL for p in found)


def is_called_as(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a module is called as a base class is: neither its class nor itself has a forward of its own."""
    return type(module).forward is base.forward and "forward" not in vars(module)


def argument(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], fits: Callable[[Tensor], bool]) -> Tensor:
    """The one argument that a weight can meet: called ``input``, else alone of its shape, else alone with a usual name.

    Raises:
        Unreadable: where none fits, or several do and no name tells them apart.
    """
    named = called_with(module, args, kwargs)
    every = {name: tree_leaves(value) for name, value in named.items()}
    tensors = {id(t): t for leaves in every.values() for t in leaves if isinstance(t, Tensor)}
    candidates = {key: t for key, t in tensors.items() if t.ndim and t.is_floating_point() and fits(t)}
    first = named.get(_USUAL[0])
    if len(candidates) > 1 and id(first) in candidates:
        return candidates[id(first)]
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    usual = [named[name] for name in _USUAL if id(named.get(name)) in candidates]
    if len(usual) == 1:
        return usual[0]
    kind = type(module).__name__
    if candidates:
        names = [name for name, leaves in every.items() if any(id(t) in candidates for t in leaves)]
        raise Unreadable(
            f"may meet several tensors that {kind}.forward was given ({', '.join(names)}): precond.register_layer says which"
        )
    shapes = _shapes(list(tensors.values()))
    raise Unreadable(f"can meet no tensor that {kind}.forward was given ({shapes}): precond.register_layer says what it meets")


def _shapes(tensors: list[Tensor]) -> str:
    return "shapes " + ", ".join(str(tuple(t.shape)) for t in tensors) if tensors else "no tensor at all"


def plain(x: Any) -> Tensor | None:
    """A tensor of floating-point numbers, dense and whole; None where it shows nothing: it is empty, or has no values.

    Jagged tensors become the rows of all their parts. The graph that made x stays with it.

    Args:
        x: what a layer was called with.

    Returns:
        The tensor, dense and strided, with its own dtype; None where it shows nothing.

    Raises:
        Unreadable: for what is no such tensor.

    Example:
        >>> import torch
        >>> plain(torch.ones(2, 3)).shape, plain(torch.ones(0, 3)) is None
        (torch.Size([2, 3]), True)
    """
    if not isinstance(x, Tensor):
        raise Unreadable(f"was given a {type(x).__name__}, not a tensor")
    if not _has_values(x):
        return None
    if type(x).__torch_dispatch__ is Tensor.__torch_dispatch__ and type(x) is not Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            x = x.as_subclass(Tensor)  # what its class does to functions is not asked for
    x = replicated(x)
    if x is None:
        raise Unreadable("was given a tensor that is divided among processes")
    if x.is_nested:
        x = x.values() if x.layout == torch.jagged and x._lengths is None else _together(x.unbind())
    if x.layout != torch.strided:
        raise Unreadable(f"was given a sparse tensor ({x.layout}): pass input.to_dense(), where memory allows")
    if x.is_quantized or not x.is_floating_point():
        raise Unreadable(f"was given {x.dtype}, not floating-point numbers")
    return x if x.numel() else None


def _has_values(x: Tensor) -> bool:
    if type(x) is Tensor and not torch._is_functional_tensor(x) and not torch._C._functorch.is_functorch_wrapped_tensor(x):
        return not x.is_meta  # most are told here, at a fifth of what the question costs
    return x.device.type != "meta" and not is_fake(x)


def _together(parts: tuple[Tensor, ...]) -> Tensor:
    """Rows of all parts."""
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
