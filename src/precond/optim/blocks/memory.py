"""How much memory a step takes for a while, at most."""

from __future__ import annotations

import torch

STACKED = 64 * 2**20
"""Bytes of the parameters of a stack, at most, unless one block alone has more: a step makes a few copies of them."""

CACHED = 2**18
"""The same on a processor, about a core's cache: of what is larger, memory costs more than calls."""

ONE_CALL = 2**15
"""Bytes of a layer on a processor up to which calls cost more than memory, so that several alike take one together."""

AT_ONCE = 64 * 2**20
"""Bytes that periodic work on the matrices of one shape takes in one step, at most, unless one of them alone takes more."""

PIECE = 12 * 2**20
"""Bytes of a piece of a matrix that is changed piece by piece, where the memory for another one would be more."""

JOINED = 2**19
"""Bytes of the matrices whose inverse roots are taken at once, about, unless one stack of them alone has more, or it is known how much a
step takes anyway."""


def stacked(device: torch.device) -> int:
    """Bytes of the parameters of a stack on a device, at most."""
    return CACHED if device.type == "cpu" else STACKED
