"""Numbers as people read them."""

from __future__ import annotations

import math


def number(x: float) -> str:
    """Three digits at most.

    Example:
        >>> [number(x) for x in (1.0, 12.34, 1234.5, 3.4e8, 0.00123)]
        ['1', '12.3', '1,230', '3.4e+08', '0.00123']
    """
    if math.isnan(x):
        return "–"
    if 1000 <= abs(x) < 1e6:
        return f"{float(f'{x:.3g}'):,.0f}"
    return f"{x:.3g}"
