"""What the methods of a strategy return is checked where they return it: an author's slip is an error, not silence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

_OWN = f"{__name__.partition('.')[0]}."


def of_library(cls: type) -> bool:
    """Whether a class is the library's own."""
    return cls.__module__.startswith(_OWN)


def checked(cls: type, checks: Mapping[str, Callable[..., None]]) -> None:
    """Wrap the methods that a class defines itself: ``checks[name](strategy, returned, *args)`` raises TypeError or ValueError.

    The library's own classes are held to it by tests, and pay for no checks in each step.
    """
    if of_library(cls):
        return
    for name, check in checks.items():
        if callable(method := cls.__dict__.get(name)) and not getattr(method, "__isabstractmethod__", False):
            setattr(cls, name, _wrapped(method, check))


def _wrapped(method: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any) -> Any:
        returned = method(self, *args)
        check(self, returned, *args)
        return returned

    return call


def whole(cls: type, signatures: Mapping[str, str]) -> None:
    """Raise TypeError where a class leaves abstract methods out, with what each returns."""
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise TypeError(f"{cls.__name__} lacks {'; '.join(signatures.get(name, name) for name in missing)}")


def instance(owner: str, what: str, value: Any, kind: type, remedy: str) -> None:
    """Raise TypeError where a value is not of a kind; a class in place of an object is told so."""
    if isinstance(value, type) and issubclass(value, kind):
        raise TypeError(f"{owner}: {what} is the class {value.__name__}; pass an object of it, {value.__name__}(...)")
    if not isinstance(value, kind):
        raise TypeError(f"{owner}: {what} must be {remedy}, got {value!r}")


def frozen(owner: str, strategy: Any) -> None:
    """Raise TypeError where a strategy, or one that it holds, is a dataclass that may change: groups hold its numbers."""
    if isinstance(strategy, tuple | list):
        for item in strategy:
            frozen(owner, item)
    elif is_dataclass(strategy) and not isinstance(strategy, type):
        if not type(strategy).__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise TypeError(
                f"{owner}: {type(strategy).__name__} may change after it was made; write @dataclass(frozen=True) above it"
            )
        for field in fields(strategy):
            frozen(owner, getattr(strategy, field.name))


def shapes(who: str, found: Sequence[Tensor], like: Iterable[Tensor]) -> None:
    """Raise ValueError where tensors are not of the shapes of others."""
    mine, theirs = [tuple(t.shape) for t in found], [tuple(t.shape) for t in like]
    if mine != theirs:
        raise ValueError(f"{who} has tensors of shapes {mine}; the parameters have {theirs}, one tensor for each")
