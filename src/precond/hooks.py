"""Hooks that do not keep what they serve alive."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch


class WeakHook:
    """Calls ``method`` of an object while that lives; a copied or unpickled model carries an inert one."""

    def __init__(self, target: Any = None, method: str = ""):
        self._target = weakref.ref(target) if target is not None else _nobody
        self._method = method

    def __call__(self, *args: Any) -> None:
        target = self._target()
        if target is None:
            return
        if torch.compiler.is_compiling():  # a traced graph would run this once and never again
            _outside(target, self._method, args)
        else:
            getattr(target, self._method)(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return WeakHook, ()


def _nobody() -> None:
    return None


@torch._disable_dynamo
def _outside(target: Any, method: str, args: tuple[Any, ...]) -> None:
    getattr(target, method)(*args)


def remove(handles: Iterable[Any]) -> None:
    """Remove hooks by their handles."""
    for handle in handles:
        handle.remove()
