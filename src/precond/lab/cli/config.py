"""Settings from a TOML file."""

from __future__ import annotations

import tomllib
import types
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from precond.lab.cli.errors import UserError
from precond.lab.workloads.suggestions import did_you_mean

T = TypeVar("T")


def config_path(argv: Sequence[str]) -> Path | None:
    """The file that ``--config FILE`` or ``--config=FILE`` names, last one first."""
    for i in range(len(argv) - 1, -1, -1):
        if argv[i] == "--config" and i + 1 < len(argv):
            return Path(argv[i + 1])
        if argv[i].startswith("--config="):
            return Path(argv[i].partition("=")[2])
    return None


def from_toml(path: Path, cls: type[T]) -> T:
    """An instance of a dataclass of settings with the values of a file, and defaults for what it does not set.

    Keys are the names of the settings, with underscores or hyphens.

    Raises:
        UserError: where the file is absent or no TOML, for unknown keys (the message offers the nearest), and for values of
            another type.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the settings in {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no TOML: {error}") from error
    hints = get_type_hints(cls, include_extras=True)
    known = [f.name for f in fields(cls) if f.name != "config"]  # type: ignore[arg-type]
    values = {}
    for key, value in found.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UserError(
                f"{path}: unknown setting {key!r}{did_you_mean(name, known)} (all are in precond {cls.__name__.lower()} --help)"
            )
        try:
            values[name] = _converted(value, hints[name])
        except TypeError as error:
            raise UserError(f"{path}: {key} must be {error}, got {value!r}") from error
    return cls(**values)


def _converted(value: Any, hint: Any) -> Any:
    """The value as the hint's type; TypeError says what it should be."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _converted(value, args[0])
    if origin in (Union, types.UnionType):
        wanted = []
        for option in args:
            try:
                return _converted(value, option)
            except TypeError as error:
                wanted.append(str(error))
        raise TypeError(" or ".join(w for w in wanted if w != _NAMES[type(None)]))
    if origin is Literal:
        if value in args:
            return value
        raise TypeError(f"one of {', '.join(map(repr, args))}")
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError(f"a list of {_NAMES[args[0]].partition(' ')[2]}s")
        return tuple(_converted(item, args[0]) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise TypeError(_NAMES[hint])


_NAMES: dict[Any, str] = {
    float: "a number", int: "a whole number", bool: "true or false", str: "a string", Path: "a path", type(None): "nothing"
}  # fmt: skip
