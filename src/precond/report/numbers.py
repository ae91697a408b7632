"""Numbers as text."""

from __future__ import annotations

import math

from precond.report.summary import Spread

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
    """Mean ± standard deviation, the deviation to two digits and the mean to the same place.

    Example:
        >>> loss_spread(Spread(0.123456, 0.0123)), loss_spread(Spread(0.123456, float("nan"))), loss_spread(None)
        ('0.123 ± 0.012', '0.123', '–')
    """
    if spread is None:
        return NONE
    if not (math.isfinite(spread.std) and spread.std > 0):
        return short(spread.mean)
    if max(abs(spread.mean), spread.std) < 1e-4 or abs(spread.mean) >= 1e4:
        return f"{short(spread.mean)} ± {spread.std:.1e}"
    places = max(0, 1 - math.floor(math.log10(spread.std)))
    return f"{spread.mean:.{places}f} ± {spread.std:.{places}f}"


def metric_spread(spread: Spread | None, name: str | None) -> str:
    """Mean ± standard deviation of a metric.

    Example:
        >>> metric_spread(Spread(0.9721, 0.004), "accuracy")
        '97.2 ± 0.4 %'
    """
    if spread is None:
        return NONE
    if not math.isfinite(spread.std):
        return metric(spread.mean, name)
    if name == "accuracy":
        return f"{100 * spread.mean:.1f} ± {100 * spread.std:.1f} %"
    return f"{spread.mean:.3f} ± {spread.std:.3f}"


def seconds(x: float) -> str:
    """A duration of training.

    Example:
        >>> seconds(0.1234), seconds(12.34), seconds(700.0)
        ('0.12 s', '12.3 s', '11.7 min')
    """
    if not math.isfinite(x):
        return NONE
    if x < 10:
        return f"{x:.2f} s"
    return f"{x:.1f} s" if x < 300 else f"{x / 60:.1f} min"
