"""Text that is always at hand: the sources of Python's standard library."""

from __future__ import annotations

import string
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from precond.lab.workloads.data import Part
from precond.lab.workloads.idx import DataError

ALPHABET = "\n" + " " + string.digits + string.ascii_letters + string.punctuation
"""The 96 characters that are kept: printable ASCII and the end of a line."""

# One module in so many is held out for validation, and one for testing.
_TENTH = 10


def library_text(context: int, characters: int = 2_000_000) -> dict[str, Part]:
    """Windows of the standard library's modules: inputs (N, context) and the characters that follow each (N, context), int64.

    The modules at the top of the library are taken in the order of their names, so that one version of Python makes one data set;
    every tenth is for validation, the one after it for testing, and no window crosses from one module into the next.

    Args:
        context: characters in a window.
        characters: at most so many in all.

    Raises:
        DataError: where the library's sources are not installed.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    modules = sorted(folder.glob("*.py"), key=lambda path: path.name)
    return windows([_read(path) for path in modules], context, characters, str(folder))


def windows(texts: Sequence[str], context: int, characters: int, origin: str = "the texts") -> dict[str, Part]:
    """Windows of texts in parts; characters outside the alphabet are left out.

    Raises:
        DataError: where there are too few for a window in each part.
    """
    number = {c: i for i, c in enumerate(ALPHABET)}
    found: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    left = characters
    for index, text in enumerate(texts):
        numbers = [number[c] for c in text if c in number][:left]
        left -= len(numbers)
        # Each window and the character after its last one.
        amount = (len(numbers) - 1) // context
        if amount > 0:
            part = {_TENTH - 2: "validation", _TENTH - 1: "test"}.get(index % _TENTH, "train")
            found[part].append(torch.tensor(numbers[: amount * context + 1]).unfold(0, context + 1, context))
    if not all(found.values()):
        raise DataError(f"{origin}: too little text for windows of {context} characters in three parts")
    return {
        name: Part(w[:, :-1].contiguous(), w[:, 1:].contiguous()) for name, w in ((n, torch.cat(p)) for n, p in found.items())
    }


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore")
