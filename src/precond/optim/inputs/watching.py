"""Whether forwards are being watched: off inside second passes, objectives and monitors. Imported by both sides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_watching: ContextVar[bool] = ContextVar("precond_watching", default=True)


def watching() -> bool:
    """Whether a forward may be observed here."""
    return _watching.get()


@contextmanager
def unwatched() -> Iterator[None]:
    """Forwards inside are not observed."""
    token = _watching.set(False)
    try:
        yield
    finally:
        _watching.reset(token)
