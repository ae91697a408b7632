"""Numbers as text."""

from __future__ import annotations

import math

from precond.lab.report.summary import Spread

NONE = "–"
"""What stands where there is no number."""


def short(x: float) -> str:
    """To three significant digits, without an exponent where it is readable so.

    Example:
        >>> [short(x) for x in (0.0123456, 0.0001, 12.3456, 12345.6, 3.2e-6, 510, float("nan"))]
        ['0.0123', '0.0001', '12.3', '12,346', '3.2e-06', '510', '–']
    """
    if not math.isfinite(x):
        return NONE
    if abs(x) >= 1000:
        return f"{x:,.0f}" if abs(x) < 1e7 else f"{x:.3g}"
    return f"{x:.3g}"


def metric(x: float, name: str | None) -> str:
    """An accuracy in percent, R² to three places.

    Example:
        >>> metric(0.97214, "accuracy"), metric(0.4213, "R²")
        ('97.2 %', '0.421')
    """
    if not math.isfinite(x):
        return NONE
    return f"{100 * x:.1f} %" if name == "accuracy" else f"{x:.3f}"


def loss_spread(spread: Spread | None) -> str:
    """Median and range.

    Example:
        >>> loss_spread(Spread(0.123456, 0.11, 0.1412)), loss_spread(Spread(0.1, 0.1, 0.1)), loss_spread(None)
        ('0.123 (0.11–0.141)', '0.1', '–')
    """
    if spread is None:
        return NONE
    middle, low, high = map(short, (spread.median, spread.low, spread.high))
    return middle if low == high else f"{middle} ({low}–{high})"


def metric_spread(spread: Spread | None, name: str | None) -> str:
    """Median and range of a metric.

    Example:
        >>> metric_spread(Spread(0.9721, 0.968, 0.9744), "accuracy")
        '97.2 % (96.8–97.4)'
    """
    if spread is None:
        return NONE
    middle, low, high = (metric(x, name) for x in (spread.median, spread.low, spread.high))
    return middle if low == high else f"{middle} ({low.removesuffix(' %')}–{high.removesuffix(' %')})"


def seconds(x: float) -> str:
    """A duration of training.

    Example:
        >>> seconds(0.01234), seconds(0.1234), seconds(12.34), seconds(700.0)
        ('0.0123 s', '0.12 s', '12.3 s', '11.7 min')
    """
    if not math.isfinite(x):
        return NONE
    if 0 < x < 0.1:
        return f"{short(x)} s"
    if x < 10:
        return f"{x:.2f} s"
    return f"{x:.1f} s" if x < 300 else f"{x / 60:.1f} min"
