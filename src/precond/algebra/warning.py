"""Warnings that name the user's line."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

import torch

_WITHIN = tuple(f"{Path(file).parent}/" for file in (Path(__file__).parent, torch.__file__))
"""Where calls pass through on their way from the user's code."""


def warn(message: str) -> None:
    """A UserWarning at the nearest line that is neither this package's nor torch's."""
    frame, level = sys._getframe(1), 2
    while (file := frame.f_code.co_filename).startswith(_WITHIN) or file == contextlib.__file__:
        if frame.f_back is None:
            break
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
