"""Arguments against the annotations of what takes them: an error names the argument, its value and the remedy."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple, ParamSpec, TypeVar

from torch import Tensor

from precond.algebra import checks

Given = ParamSpec("Given")
Made = TypeVar("Made")


def checked(function: Callable[Given, Made], further: Sequence[str] = (), silent: Sequence[str] = ()) -> Callable[Given, Made]:
    """Check each call's arguments against the annotations (``params``, which is looked at elsewhere, excepted).

    Numbers of other kinds (NumPy's, fractions) go in as Python's, iterables as tuples.

    Args:
        further: names that its ``**options`` may have.
        silent: such names that are none of a user's business.

    Example:
        >>> @checked
        ... def twice(x: float, *, loud: bool = False) -> float:
        ...     return 2 * x
        >>> twice(3)
        6.0
        >>> twice("3")
        Traceback (most recent call last):
        ...
        TypeError: twice: x must be a number, got '3' of type str
    """
    signature = inspect.signature(function)
    named = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD and p.name != "params"]
    owner = function.__name__
    options = list(dict.fromkeys([*signature.parameters, *further]))
    if kind := next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None):
        options.remove(kind)

    @functools.wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        for name in kwargs.keys() - {*options, *silent}:
            near = checks.nearest(name, options)
            its = f"{near} Its" if near else "; its"
            raise TypeError(f"{owner} has no option {name!r}{its} options are {', '.join(options[1:])}")
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{owner}: {error}") from None
        for name in named:
            if name in bound.arguments and name in _hints(function):
                bound.arguments[name] = _fitted(owner, name, bound.arguments[name], _hints(function)[name])
        return function(*bound.args, **bound.kwargs)

    return call


class _Hint(NamedTuple):
    """An annotation, taken apart.

    Attributes:
        options: what a union offers, or it alone.
        classes: those among them.
        kind: of the others the one that decides; a tensor, a pattern or None may stand beside it.
        origin, inside: of ``kind``.
    """

    options: tuple[Any, ...]
    classes: tuple[type, ...]
    kind: Any
    origin: Any
    inside: tuple[Any, ...]

    @classmethod
    def of(cls, hint: Any) -> _Hint:
        options = typing.get_args(hint) if _is_union(hint) else (hint,)
        classes = tuple(o for o in options if isinstance(o, type) and o not in (float, int, bool, str, types.NoneType, Tensor))
        kind = next((o for o in options if o not in (*classes, types.NoneType, Tensor, str)), None)
        return cls(options, classes, kind, typing.get_origin(kind), typing.get_args(kind))


@functools.cache
def _hints(annotated: Any) -> dict[str, _Hint]:
    """The annotations of a function or class by name, but for those made of names that are imported for types alone."""
    hints: dict[str, _Hint] = {}
    for owner in reversed(getattr(annotated, "__mro__", (annotated,))):
        known = sys.modules[owner.__module__].__dict__
        for name, hint in inspect.get_annotations(owner).items():
            with contextlib.suppress(NameError):
                hints[name] = _Hint.of(eval(hint, dict(known)) if isinstance(hint, str) else hint)
    return hints


def fitted(owner: str, name: str, value: Any, hint: Any) -> Any:
    """A value as its annotation wants it.

    Raises:
        TypeError: for a value of another type.
        ValueError: for one of the type that is out of range.
    """
    return _fitted(owner, name, value, _Hint.of(hint))


def _fitted(owner: str, name: str, value: Any, hint: _Hint) -> Any:
    options, classes, kind, origin, inside = hint
    if options == (Any,) or (value is None and types.NoneType in options) or isinstance(value, classes):
        return value
    if kind in (float, int):
        return number(owner, name, value, whole=kind is int)
    if kind is bool:
        return flag(owner, name, value)
    if origin is tuple:
        return _numbers(owner, name, value, inside)
    if origin is typing.Literal:
        checks.one_of(owner, name, value, (*inside, None) if types.NoneType in options else inside)
        return value
    if origin is Iterable:
        return _all(owner, name, value, inside[0])
    if origin is Callable and (isinstance(value, str) or (callable(value) and not isinstance(value, type))):
        return value
    # An annotation of another form is of a user's own class, and says nothing here.
    if origin is not Callable and (kind is not None or (not classes and isinstance(value, str))):
        return value
    wanted = "function of a leaf or a pattern such as '*.weight'" if origin is Callable else (*classes, str)[0].__name__
    raise TypeError(f"{owner}: {name} must be a {wanted}, got {shown(value)}")


def settle(choice: Any) -> None:
    """:func:`checked` for a frozen dataclass: called by its ``__post_init__``, before it looks at ranges."""
    kind = type(choice)
    hints = _hints(kind)  # type: ignore[arg-type]
    for name in choice.__dataclass_fields__.keys() & hints.keys():
        given = getattr(choice, name)
        if (value := _fitted(kind.__name__, name, given, hints[name])) is not given:
            object.__setattr__(choice, name, value)


def number(owner: str, name: str, value: Any, whole: bool = False) -> Any:
    """A number as Python's; a tensor of one element as it is, without dimensions."""
    if isinstance(value, Tensor) and not whole:
        checks.one_number(owner, name, value)
        if value.device.type == "cpu" and value.isnan():
            raise ValueError(f"{owner}: {name} must be a finite number, got {value!r}")
        return value if name == "lr" or not value.ndim else value.reshape(())
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be a {'whole ' if whole else ''}number, got {shown(value)}")
    if value != value:
        raise ValueError(f"{owner}: {name} must be a finite number, got {value!r}")
    if whole and value % 1:
        raise ValueError(f"{owner}: {name} must be a whole number, got {value!r}; round it")
    try:
        return int(float(value)) if whole else float(value)
    except OverflowError:
        raise ValueError(f"{owner}: {name} must be a finite number, got one that no float holds") from None


def flag(owner: str, name: str, value: Any) -> bool:
    """True or False; 1 and 0 too, and NumPy's, but no other thing that merely counts as true."""
    if (isinstance(value, Integral) or type(value).__name__ in ("bool", "bool_")) and value in (0, 1):
        return bool(value)
    raise TypeError(f"{owner}: {name} must be True or False, got {shown(value)}")


def _numbers(owner: str, name: str, value: Any, inside: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise TypeError(f"{owner}: {name} must be a tuple of {len(inside)} numbers, got {shown(value)}")
    if len(value) != len(inside):
        raise ValueError(f"{owner}: {name} must hold {len(inside)} numbers, got {value!r}")
    return tuple(
        number(owner, f"{name}[{k}]", x, whole=kind is int) for k, (x, kind) in enumerate(zip(value, inside, strict=True))
    )


def _all(owner: str, name: str, value: Any, kind: type) -> tuple[Any, ...]:
    if isinstance(value, kind):
        raise TypeError(f"{owner}: {name} must be a list, got {shown(value)}; write [{type(value).__name__}(…)]")
    try:
        items = tuple(value)
    except TypeError:
        raise TypeError(f"{owner}: {name} must be a list of {kind.__name__}s, got {shown(value)}") from None
    for item in items:
        if not isinstance(item, kind):
            raise TypeError(f"{owner}: {name} must hold {kind.__name__}s such as precond.L2(1e-4), got {shown(item)}")
    return items


def shown(value: Any) -> str:
    """A value in a message, with its type; of a tensor its shape."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}; write {value.__name__}()"
    return f"{value!r} of type {type(value).__name__}"


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)
