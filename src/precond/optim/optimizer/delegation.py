"""Wrappers that imitate an optimizer's class (Lightning's, Fabric's): their methods are those of the optimizer inside."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def delegate(cls: type, ours: type) -> None:
    """Make the public methods that an imitation inherits from ``ours`` act on ``.optimizer``, not on the imitation.

    Such a class is ``type(name, (Wrapper, Ours), {})``: what the wrapper does not define is called with the wrapper as self,
    which reads attributes through to the optimizer inside and writes them to itself.
    """
    wrapper = cls.__bases__[0]
    if issubclass(wrapper, torch.optim.Optimizer) or not hasattr(wrapper, "optimizer"):
        return
    for name in dir(ours):
        if name.startswith("_") or hasattr(wrapper, name):
            continue
        found = getattr(ours, name)
        if isinstance(found, property):
            setattr(cls, name, property(_reader(name), doc=found.__doc__))
        elif callable(found):
            setattr(cls, name, _caller(name, found))


def _reader(name: str) -> Callable[[Any], Any]:
    return lambda self: getattr(self.optimizer, name)


def _caller(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.optimizer, name)(*args, **kwargs)

    return call
