"""All random generators that training may draw from: seeded, kept in checkpoints, and given back."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _numpy() -> Any:
    # NumPy's global generator matters only to those who have imported it.
    return sys.modules.get("numpy")


def check_seed(name: str, seed: int) -> None:
    """Raise ValueError for a number that seeds no generator."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"{name} must be a whole number >= 0 and below 2^63, got {seed}")


def seed_all(seed: int) -> None:
    """Seed the global generators of Python, torch and NumPy.

    Raises:
        ValueError: for a negative number, or one from 2^63 on.
    """
    check_seed("seed", seed)
    random.seed(seed)
    torch.manual_seed(seed)
    if (numpy := _numpy()) is not None:
        numpy.random.seed(seed % 2**32)


def random_states() -> dict[str, Any]:
    """Their states, as tensors, numbers and tuples."""
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    if (numpy := _numpy()) is not None:
        name, keys, *rest = numpy.random.get_state()
        states["numpy"] = (name, keys.tolist(), *rest)
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Put the generators into states that :func:`random_states` returned."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    if "numpy" in states:
        import numpy

        numpy.random.set_state(states["numpy"])


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seed all generators, and on leaving give the caller's states back."""
    before = random_states()
    seed_all(seed)
    try:
        yield
    finally:
        restore_random_states(before)
