"""Steps to a tolerance, and rates in print."""

from __future__ import annotations

import math


def steps_of(decay: float, tolerance: float) -> float:
    """ln(1/tolerance)/decay, ∞ where nothing decays."""
    if not 0 < tolerance < 1:
        raise ValueError(f"steps: tolerance must lie in (0, 1), got {tolerance!r}; usual values are 1e-3 to 1e-12")
    return -math.log(tolerance) / decay if decay > 0 else math.inf


def decimals(x: float, error: float) -> str:
    """x with two digits more than 1 − x needs, and its error."""
    digits = 4 if x == 1 or not math.isfinite(x) else min(max(4, 3 - math.floor(math.log10(abs(1 - x)))), 15)
    return f"{x:.{digits}f}" + (f" ± {error:.0e}" if error else "")
