"""JSON as frozen dataclasses: every value has the type that its hint says, or the message names the place."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_LARGEST = 2**63
_NAMES: dict[Any, str] = {
    float: "a finite number or null", int: "a whole number below 2^63", bool: "true or false", str: "text", type(None): "null", dict: "an object"
}  # fmt: skip


def parsed(content: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: where it is none; NaN and infinities are none.
    """
    try:
        return json.loads(content, parse_constant=_none)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _none(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def read(value: Any, hint: Any, at: str) -> Any:
    """A value of JSON as the hint says: a dataclass, Literal, union, tuple, list, dict or a plain type. null is NaN where a number is due.

    Keys that a dataclass does not know are passed by.

    Args:
        value: what :func:`parsed` returned, or a part of it.
        hint: of the wanted type.
        at: what to call the place.

    Raises:
        ValueError: for a value of another type, and for what is missing; the message names the place.

    Example:
        >>> read([1, 2.5, None], list[float], "losses"), read({"a": "b"}, dict[str, str], "facts")
        ([1.0, 2.5, nan], {'a': 'b'})
        >>> read([1, "2"], tuple[int, ...], "steps")
        Traceback (most recent call last):
        ...
        ValueError: steps[1] must be a whole number below 2^63, got "2"
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if is_dataclass(hint):
        return _dataclass(value, hint, at)
    if origin in (Union, types.UnionType):
        return _first(value, args, at)
    if origin is Literal:
        if not isinstance(value, str) or value not in args:
            raise _wrong(at, f"one of {', '.join(map(repr, args))}", value)
        return value
    if origin in (tuple, list):
        return _sequence(value, origin, args, at)
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(at, _NAMES[dict], value)
        return {key: read(item, args[1], f"{at}[{_shown(key)}]") for key, item in value.items()}
    if hint is float:
        return _number(value, at)
    if (
        not isinstance(value, hint)
        or (isinstance(value, bool) and hint is not bool)
        or (hint is int and abs(value) >= _LARGEST)
    ):
        raise _wrong(at, _NAMES[hint], value)
    return value


def _number(value: Any, at: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1.7e308:
        raise _wrong(at, _NAMES[float], value)
    return float(value)


def _first(value: Any, options: tuple[Any, ...], at: str) -> Any:
    """Of a union: null where it may be, else the first option that takes it."""
    if value is None and type(None) in options:
        return None
    kept = [option for option in options if option is not type(None)]
    for option in kept[:-1]:
        try:
            return read(value, option, at)
        except ValueError:
            continue
    return read(value, kept[-1], at)


def _sequence(value: Any, origin: type, args: tuple[Any, ...], at: str) -> Any:
    many = origin is list or args[1:] == (Ellipsis,)
    if not isinstance(value, list) or not (many or len(value) == len(args)):
        raise _wrong(at, "a list" if many else f"a list of {len(args)}", value)
    hints = [args[0]] * len(value) if many else args
    return origin(read(item, hint, f"{at}[{i}]") for i, (item, hint) in enumerate(zip(value, hints, strict=True)))


def _dataclass(value: Any, cls: Any, at: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(at, _NAMES[dict], value)
    found, hints = {}, _hints(cls)
    for field in fields(cls):
        if field.name in value:
            found[field.name] = read(value[field.name], hints[field.name], f"{at}.{field.name}" if at else field.name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{at or 'it'} lacks {field.name}")
    try:
        return cls(**found)
    except ValueError as error:
        raise ValueError(f"{at or 'it'}: {error}") from error


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _wrong(at: str, wanted: str, value: Any) -> ValueError:
    return ValueError(f"{at or 'it'} must be {wanted}, got {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= _LARGEST:
        return "a larger one"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
