"""``optimizer.state`` as users have it: what they put there, take away or replace is noticed, and the next step goes on from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any

from torch import Tensor

from precond.optim.blocks import Leaf

_CHANGES = ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update")


def _noticed(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.states.changed = True
        return method(self, *args, **kwargs)

    return call


class Entries(dict[str, Any]):
    """State of a parameter: names outside → tensors. A copy, or a pickle, is a plain dict."""

    def __init__(self, states: States, entries: Mapping[str, Any]):
        super().__init__(entries)
        self.states = states

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class States(defaultdict[Tensor, Any]):
    """Parameter → its entries. A deep copy, or a pickle, is a plain ``defaultdict``.

    Attributes:
        changed: whether anything was put there, or taken away, since this was last set to False.
    """

    def __init__(self, factory: type[dict[str, Any]] = dict, given: Mapping[Tensor, Any] | None = None):
        super().__init__(factory)
        self.changed, self.states = False, self
        for key, entries in (given or {}).items():
            self[key] = entries

    def __missing__(self, key: Tensor) -> Entries:
        found = Entries(self, {})
        super().__setitem__(key, found)  # to ask changes nothing
        return found

    def __setitem__(self, key: Tensor, entries: Any) -> None:
        own = isinstance(entries, Entries) and entries.states is self
        super().__setitem__(key, Entries(self, entries) if isinstance(entries, Mapping) and not own else entries)

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict, dict(self))


for _kind in (Entries, States):
    for _name in _CHANGES:
        setattr(_kind, _name, _noticed(getattr(_kind, _name)))


def changed(state: Mapping[Tensor, Any]) -> bool:
    """Whether an optimizer's state was emptied, replaced or edited from outside since it was bound."""
    return not isinstance(state, States) or state.changed


def follow(state: Mapping[Tensor, Any]) -> None:
    """What is changed from here on counts."""
    if isinstance(state, States):
        state.changed = False


def versions(state: Mapping[Tensor, Mapping[str, Any]]) -> list[int]:
    """Those of its tensors, by which it is known that one was written into."""
    return [t._version for entries in state.values() for t in entries.values() if isinstance(t, Tensor)]


def with_data(state: Mapping[Tensor, Mapping[str, Any]]) -> dict[Tensor, dict[str, Any]]:
    """Without what was made on the meta device for parameters that have left it."""
    return {p: {key: t for key, t in entries.items() if p.is_meta or not t.is_meta} for p, entries in state.items()}


def begun_anew(state: Mapping[Tensor, Any], now: Iterable[tuple[Leaf, str, Tensor]]) -> set[Tensor]:
    """The parameters that have made steps, and none by what is kept of them from now on."""
    return {leaf.param for leaf, key, t in now if key == "step" and not t and bool(state.get(leaf.param, {}).get("step", 0))}
