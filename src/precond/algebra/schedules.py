"""Numbers that change during training, and the walk that finds the numbers in a frozen configuration.

A configuration is a tree of frozen dataclasses. Its numbers have names, ``"rms.decay"``, ``"momentum.beta"``, ``"l2.lam"``:
the class in lower case and the field. Parameter groups hold them under these names, so that each can differ per group.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from precond.algebra import checks


class Schedule(ABC):
    """A number as a function of the step (from 1; a tensor where the device counts) and the learning rate.

    Example:
        >>> import precond
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Halving(precond.Schedule):  # value/2 after every ``steps`` steps
        ...     value: float
        ...     steps: int
        ...
        ...     def at(self, step, lr):
        ...         return self.value * 0.5 ** (step // self.steps)
        >>> regularizer = precond.SAM(Halving(0.1, 100))
        >>> regularizer.rho.at(250, 1e-3)
        0.025
    """

    @abstractmethod
    def at(self, step: int | Tensor, lr: float | Tensor) -> float | Tensor:
        """Its value."""


@dataclasses.dataclass(frozen=True)
class TimesLr(Schedule):
    """factor·α. Plain preconditioned descent already follows L + (α/4)‖Pᵀg‖² (Barrett & Dherin, 2021); ``TimesLr(k / 4)`` is k times that.

    Args:
        factor: what multiplies α, ≥ 0.

    Example:
        >>> import precond
        >>> precond.TimesLr(0.25).at(1, 0.5)
        0.125
    """

    factor: float

    def __post_init__(self) -> None:
        checks.non_negative("TimesLr", factor=self.factor)

    def at(self, step: int | Tensor, lr: float | Tensor) -> float | Tensor:
        return self.factor * lr


@dataclasses.dataclass(frozen=True)
class Warmup(Schedule):
    """From 0 linearly to ``value`` (a number or another schedule) over ``steps`` steps.

    Args:
        value: what it rises to, ≥ 0.
        steps: > 0, after how many steps it is there.

    Example:
        >>> import precond
        >>> [precond.Warmup(0.5, 10).at(step, 1e-3) for step in (1, 5, 20)]
        [0.05, 0.25, 0.5]
    """

    value: float | Schedule
    steps: int

    def __post_init__(self) -> None:
        if not isinstance(self.value, Schedule):
            checks.non_negative("Warmup", value=self.value)
        checks.positive("Warmup", steps=self.steps)

    def at(self, step: int | Tensor, lr: float | Tensor) -> float | Tensor:
        part = step / self.steps
        return (part.clamp_max(1.0) if isinstance(part, Tensor) else min(1.0, part)) * value_at(self.value, step, lr)


def value_at(x: float | Tensor | Schedule, step: int | Tensor, lr: float | Tensor) -> float | Tensor:
    """A number, or a schedule's value."""
    return x.at(step, lr) if isinstance(x, Schedule) else x


def numbers(config: Any) -> dict[str, Any]:
    """The numbers of a tree of frozen dataclasses by name; a second object of a class is called ``l2_2``."""
    return {name: getattr(owner, field) for name, owner, field in _walk(config, {})}


def replaced(config: Any, values: Mapping[str, Any]) -> Any:
    """The same tree with numbers replaced by name; its own checks run again."""
    return _rebuild(config, values, {})


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) or (isinstance(x, Tensor) and x.ndim == 0)


def _prefix(x: Any, seen: dict[str, int]) -> str:
    stem = type(x).__name__.lower()
    seen[stem] = seen.get(stem, 0) + 1
    return stem if seen[stem] == 1 else f"{stem}_{seen[stem]}"


def _walk(x: Any, seen: dict[str, int], prefix: str | None = None) -> Iterator[tuple[str, Any, str]]:
    if isinstance(x, tuple | list):
        for item in x:
            yield from _walk(item, seen)
    elif dataclasses.is_dataclass(x) and not isinstance(x, type):
        prefix = _prefix(x, seen) if prefix is None else prefix
        for field in dataclasses.fields(x):
            value = getattr(x, field.name)
            if _is_number(value):
                yield f"{prefix}.{field.name}", x, field.name
            else:
                yield from _walk(value, seen, f"{prefix}.{field.name}" if isinstance(value, Schedule) else None)


def _rebuild(x: Any, values: Mapping[str, Any], seen: dict[str, int], prefix: str | None = None) -> Any:
    if isinstance(x, tuple | list):
        items = [_rebuild(item, values, seen) for item in x]
        return x if all(a is b for a, b in zip(items, x, strict=True)) else type(x)(items)
    if not dataclasses.is_dataclass(x) or isinstance(x, type):
        return x
    prefix = _prefix(x, seen) if prefix is None else prefix
    changes = {}
    for field in dataclasses.fields(x):
        old = getattr(x, field.name)
        if _is_number(old):
            new = values.get(f"{prefix}.{field.name}", old)
        else:
            new = _rebuild(old, values, seen, f"{prefix}.{field.name}" if isinstance(old, Schedule) else None)
        if new is not old:
            changes[field.name] = new
    return dataclasses.replace(x, **changes) if changes else x
