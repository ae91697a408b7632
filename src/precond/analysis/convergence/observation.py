"""The rate that a trace shows."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from precond.algebra import checks
from precond.analysis.convergence.numbers import decimals, steps_of

Kind = Literal["loss", "error"]
_FEWEST = 8  # points of a fit
_MOST = 300  # points that pairwise slopes are taken over
_ABOVE = 30.0  # times the floor: what lies below is not fitted
_SETTLED = 0.02  # relative difference of the decay in both halves of a window up to which it counts as constant


@dataclass(frozen=True)
class ObservedRate:
    r"""The factor per step that a trace shows in its tail.

    Attributes:
        rate: r̂, of the error (the root of the loss's factor).
        decay: −ln r̂, negative where the trace grows.
        decay_error: standard error of the fit, and what the decay changes by from one half of the window to the other.
        start: first step of the window that was fitted.
        stop: the step after its last.
        settled: whether the decay is the same in both halves of the window; else r̂ is a passing value (too small, as fast directions still
            count).
        floor: level of the trace's excess below which rounding decides.
        floor_reached: whether the trace got there; the window ends before.
        kind: ``"loss"`` or ``"error"``.
    """

    rate: float
    decay: float
    decay_error: float
    start: int
    stop: int
    settled: bool
    floor: float
    floor_reached: bool
    kind: Kind

    @property
    def error(self) -> float:
        """Error of r̂."""
        return self.rate * self.decay_error

    def steps(self, tolerance: float) -> float:
        """Steps in which the error shrinks by ``tolerance`` at this rate."""
        return steps_of(self.decay, tolerance)

    def __str__(self) -> str:
        notes = [f"steps {self.start} to {self.stop - 1} of the {self.kind}"]
        if self.floor_reached:
            notes.append(f"floor {self.floor:.0e} reached")
        if not self.settled:
            notes.append("not settled")
        if self.decay < 0:
            notes.append("growing")
        return f"r = {decimals(self.rate, self.error)} per step ({', '.join(notes)})"


def observed_rate(
    trace: Sequence[float] | Tensor, kind: Kind = "loss", *, minimum: float | None = None, floor: float | None = None
) -> ObservedRate:
    r"""The asymptotic rate r̂ from a trace of losses L_t − L* ≈ C r^{2t}, or of errors ‖p_t − p*‖ ≈ C r^t.

    A robust line (Theil–Sen) through the logarithm of the excess, over the end of the trace from which its slope is best known: what
    rounding decides is cut off behind it, what still decays faster before it. With L* unknown the differences L_t − L_{t+1}, which decay
    alike, are fitted.

    Args:
        trace: one number per step; entries from the first one on that is not finite are left out.
        kind: ``"loss"``, or ``"error"``, distances to the limit (or gradient norms).
        minimum: L* where it is known; None: unknown for losses, 0 for errors.
        floor: level of the excess below which the trace is rounding; None: the dtype's ε times the trace's magnitude (for numbers that are
            all float32 numbers, that of float32), or the level at which the trace stands still at its end.

    Raises:
        ValueError: for fewer than 8 usable steps, or losses that rise and fall, whose minimum must be given.

    Example:
        >>> trace = [2.0 + 0.25**t for t in range(20)]  # loss: r² = 1/4
        >>> round(observed_rate(trace).rate, 4)
        0.5

    References:
        Sen (1968), Estimates of the regression coefficient based on Kendall's tau.
    """
    checks.one_of("observed_rate", "kind", kind, get_args(Kind))
    values = [float(x) for x in (trace.tolist() if isinstance(trace, Tensor) else trace)]
    finite = next((t for t, x in enumerate(values) if not math.isfinite(x)), len(values))
    values = values[:finite]
    if len(values) < _FEWEST + 1:
        raise ValueError(
            f"observed_rate: trace has {len(values)} finite numbers, a fit needs at least {_FEWEST + 1}; record more steps"
        )
    excess, level = _excess(values, kind, minimum)
    # What is rounded is the number of the trace, not its excess: an error of limit 0 has no floor but where it stands still.
    floor = max(_epsilon(trace, values) * level, _plateau(excess)) if floor is None else floor
    below = next((t for t, x in enumerate(excess) if x <= _ABOVE * floor), len(excess))
    if below < _FEWEST:
        raise ValueError(
            f"observed_rate: the trace is within {_ABOVE:.0f} times its floor {floor:.1e} from step {below} on, a fit needs {_FEWEST} steps "
            "before; use float64, start farther from the minimum, or give floor="
        )
    logs = [math.log(x) for x in excess[:below]]
    start, slope, error, settled = _tail(logs)
    halved = 2 if kind == "loss" else 1
    decay = -slope / halved
    return ObservedRate(math.exp(-decay), decay, error / halved, start, below, settled, floor, below < len(excess), kind)


def _excess(values: list[float], kind: Kind, minimum: float | None) -> tuple[list[float], float]:
    """What should decay geometrically, and the magnitude to which its rounding is relative."""
    if minimum is not None or kind == "error":
        low = minimum or 0.0
        excess = [x - low for x in values]
        if kind == "error" and min(excess) < 0:
            raise ValueError(f"observed_rate: an error must not be negative, got {min(excess)!r}; for losses use kind='loss'")
        return excess, max(abs(values[-1]), abs(low)) if low else 0.0
    falls = [a - b for a, b in itertools.pairwise(values)]
    level = statistics.median(abs(x) for x in values[-max(len(values) // 4, 1) :])
    if values[-1] > values[0]:  # it diverges, from next to its minimum
        return [max(-x, 0.0) for x in falls], 0.0
    rounding = 1e-5 * level
    wrong = sum(x < -rounding for x in falls)
    if wrong > 0.02 * len(falls):
        raise ValueError(
            f"observed_rate: the loss rises in {wrong} of {len(falls)} steps, so its differences show no rate; give minimum= (the lowest loss "
            "that can be reached), or a trace of errors with kind='error'"
        )
    return falls, level


def _plateau(excess: list[float]) -> float:
    """The level at which the excess stands still at its end; 0 where it does not."""
    end = excess[-max(len(excess) // 10, _FEWEST) :]
    level = statistics.median(abs(x) for x in end)
    if min(end) <= 0 or level > 0.1 * max(excess):
        return 0.0
    slope, error = _line([math.log(x) for x in end])
    return level if abs(slope) <= 3 * error else 0.0


def _epsilon(trace: Sequence[float] | Tensor, values: list[float]) -> float:
    if isinstance(trace, Tensor) and trace.is_floating_point() and trace.dtype != torch.float64:
        return torch.finfo(trace.dtype).eps
    wide = torch.tensor(values, dtype=torch.float64)
    short = bool((wide.float().double() == wide).all())
    return torch.finfo(torch.float32 if short else torch.float64).eps


def _tail(logs: list[float]) -> tuple[int, float, float, bool]:
    """(start, slope, error, settled) of that window of all, the last half, the last quarter, … with the smallest error."""
    start, found = 0, []
    while len(logs) - start >= _FEWEST:
        window = logs[start:]
        half = len(window) // 2
        slope, error = _line(window)
        # What the slope still changes by is about what is left of the faster directions.
        drift = abs(_line(window[half:])[0] - _line(window[: half + 1])[0])
        settled = drift <= max(_SETTLED * abs(slope), 4 * error)  # a half has about 2√2 times the error
        found.append((error + drift, start, slope, settled))
        start += max(half, 1)
    error, start, slope, settled = min(found)
    return start, slope, error, settled


def _line(y: list[float]) -> tuple[float, float]:
    """Theil–Sen slope and its standard error, with the residuals' correlation from step to step."""
    stride = -(-len(y) // _MOST)
    t = list(range(0, len(y), stride))
    points = torch.tensor([y[i] for i in t], dtype=torch.float64)
    at = torch.tensor(t, dtype=torch.float64)
    i, j = torch.triu_indices(len(t), len(t), 1)
    slope = float(((points[j] - points[i]) / (at[j] - at[i])).median())
    residual = points - slope * at
    residual = residual - residual.median()
    scale = 1.4826 * float(residual.abs().median())
    square = float(residual.square().sum())
    correlation = min(max(float((residual[1:] * residual[:-1]).sum()) / square, 0.0), 0.98) if square > 0 else 0.0
    spread = float((at - at.mean()).square().sum()) ** 0.5
    return slope, scale / spread * ((1 + correlation) / (1 - correlation)) ** 0.5
