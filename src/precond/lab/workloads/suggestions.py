"""Hints in error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """``"; did you mean 'nearest'?"``, empty where nothing is near.

    Example:
        >>> did_you_mean("adma", ["sgd", "adam"])
        "; did you mean 'adam'?"
    """
    spelled = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(name.lower(), list(spelled), n=1, cutoff=0.5)
    return f"; did you mean {spelled[near[0]]!r}?" if near else ""
