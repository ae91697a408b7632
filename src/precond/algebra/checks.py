"""Checks of arguments: an error names the argument, the value and the remedy."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor


def one_number(owner: str, name: str, value: Tensor) -> None:
    """Raise ValueError where a tensor does not hold one number."""
    if value.numel() != 1:
        each = "rate" if name == "lr" else "value"
        raise ValueError(
            f"{owner}: {name} must hold one number, got a tensor of shape {tuple(value.shape)}; use one group per {each}"
        )


def _readable(owner: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and numbers; of tensors only those that are read without waiting for a device."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            one_number(owner, name, value)
            if value.device.type != "cpu":
                continue
            value = value.item()
        yield name, value


def non_negative(owner: str, **values: Any) -> None:
    """Raise ValueError where a number is negative, NaN or infinite (tensors on other devices are not read)."""
    _non_negative(owner, values, "0.001")


def _non_negative(owner: str, values: Mapping[str, Any], example: str) -> None:
    for name, value in _readable(owner, values):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{owner}: {name} must be a number, got {value!r} of type {type(value).__name__}")
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{owner}: {name} must be a finite number >= 0, got {value!r}; give a number such as {example}")


def learning_rate(owner: str, lr: Any) -> None:
    """Raise where a learning rate is no number >= 0 and no tensor that holds one (which is read here, once)."""
    if isinstance(lr, Tensor):
        one_number(owner, "lr", lr)
        lr = lr.item()
    non_negative(owner, lr=lr)


def positive(owner: str, **values: Any) -> None:
    """Raise ValueError where a number is not positive and finite."""
    non_negative(owner, **values)
    for name, value in _readable(owner, values):
        if value == 0:
            raise ValueError(f"{owner}: {name} must be > 0, got {value!r}")


def whole(owner: str, **values: Any) -> None:
    """Raise ValueError where a number is not whole and positive."""
    count(owner, **values)
    positive(owner, **values)


def count(owner: str, **values: Any) -> None:
    """Raise ValueError where a number is not whole, or negative."""
    _non_negative(owner, values, "10")
    for name, value in _readable(owner, values):
        if value != int(value):
            raise ValueError(f"{owner}: {name} must be a whole number, got {value!r}; round it")


def fraction(owner: str, usual: str = "0.9 to 0.999", /, **values: Any) -> None:
    """Raise ValueError where a number lies outside [0, 1).

    Args:
        owner: whose numbers.
        usual: values; of decay rates where not told.
        values: by name.
    """
    non_negative(owner, **values)
    for name, value in _readable(owner, values):
        if not value < 1:
            raise ValueError(f"{owner}: {name} must lie in [0, 1), got {value!r}; usual values are {usual}")


def one_of(owner: str, name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise ValueError where a value is not among the choices; the message offers the nearest."""
    choices = list(choices)
    if any(isinstance(value, type(c)) and value == c for c in choices):
        return
    hint = nearest(str(value), map(str, choices))
    raise ValueError(f"{owner}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}{hint}")


def nearest(value: str, choices: Iterable[str], cutoff: float = 0.5) -> str:
    """The end of a message: which of the choices may have been meant; nothing where none is near.

    Args:
        cutoff: the least ratio of letters in common (``difflib``).
    """
    near = difflib.get_close_matches(value, list(choices), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""
