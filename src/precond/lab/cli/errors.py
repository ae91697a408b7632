"""What a user can put right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Settings, files or names that cannot work; the message names the remedy."""


@contextmanager
def as_user_errors(about: str = "") -> Iterator[None]:
    """Around everything that is checked before training starts, where such an exception comes from what the user gave."""
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise UserError(f"{about}{error}") from error
