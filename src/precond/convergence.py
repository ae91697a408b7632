r"""How fast gradient descent converges: predicted from the spectrum, observed in a trace, and both side by side.

Near a minimum the error of (preconditioned) gradient descent shrinks by r = max(|1 − αλ_min|, |1 − αλ_max|) per step, λ the eigenvalues of
the Hessian, of PᵀHP with a preconditioner (Ye, Theorem 1). The loss, being quadratic there, shrinks by r².
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from precond import checks
from precond.curvature import Conditioning, Singular

Kind = Literal["loss", "error"]
_FEWEST = 8  # points of a fit
_MOST = 300  # points that pairwise slopes are taken over
_ABOVE = 30.0  # times the floor: what lies below is not fitted
_SETTLED = 0.02  # relative difference of the decay in both halves of a window up to which it counts as constant


def optimal_lr(lam_min: float, lam_max: float) -> float:
    r"""α = 2/(λ_min + λ_max), the learning rate of the smallest rate r.

    Raises:
        ValueError: unless 0 < λ_min ≤ λ_max.

    Example:
        >>> optimal_lr(1.0, 3.0)
        0.5

    References:
        Ye, Theorem 1; Saad (2003), Iterative methods for sparse linear systems, Example 4.1.
    """
    _check_ends("optimal_lr", lam_min, lam_max)
    return 2 / (lam_min + lam_max)


def rate(kappa: float) -> float:
    r"""r = (κ − 1)/(κ + 1), the factor per step at the best learning rate (Ye, eq. 3); 1 for κ = ∞.

    Raises:
        ValueError: unless κ ≥ 1.

    Example:
        >>> rate(3.0)
        0.5
    """
    if not kappa >= 1:
        raise ValueError(
            f"rate: kappa must be a number >= 1, got {kappa!r}; it is lam_max/lam_min of a positive definite matrix"
        )
    return 1.0 if math.isinf(kappa) else (kappa - 1) / (kappa + 1)


def steps(rate: float, tolerance: float) -> float:
    r"""ln(tolerance)/ln(r): steps in which the error shrinks by ``tolerance``; ∞ where r ≥ 1.

    Example:
        >>> round(steps(0.5, 1 / 8), 6)
        3.0
    """
    checks.non_negative("steps", rate=rate)
    return _steps(-math.log(rate) if rate > 0 else math.inf, tolerance)


@dataclass(frozen=True)
class Prediction:
    r"""The rate that a spectrum predicts for a learning rate.

    Attributes:
        lr: α.
        lam_min: the smallest eigenvalue that counts.
        lam_max: the largest.
        lam_min_error: bound of its error.
        lam_max_error: bound of its error.
    """

    lr: float
    lam_min: float
    lam_max: float
    lam_min_error: float = 0.0
    lam_max_error: float = 0.0

    @property
    def kappa(self) -> float:
        """κ = λ_max/λ_min."""
        return self.lam_max / self.lam_min

    @property
    def rate(self) -> float:
        """r = max(|1 − αλ_min|, |1 − αλ_max|)."""
        return max(abs(1 - self.lr * self.lam_min), abs(1 - self.lr * self.lam_max))

    @property
    def error(self) -> float:
        """Bound of the error of r that follows from those of the eigenvalues."""
        return self.lr * max(self.lam_min_error, self.lam_max_error)

    @property
    def decay(self) -> float:
        """−ln r per step, accurate where r is close to 1; negative where the steps diverge."""
        # 1 − r has no rounding in it where the slow end decides, as it does at the best learning rate.
        low, high = self.lr * self.lam_min, self.lr * self.lam_max
        gap = min(low if low <= 1 else 2 - low, high if high <= 1 else 2 - high)
        return -math.log1p(-gap) if gap < 1 else math.inf

    @property
    def diverges(self) -> bool:
        """Whether α > 2/λ_max."""
        return self.lr * self.lam_max > 2

    def steps(self, tolerance: float) -> float:
        """Steps in which the error shrinks by ``tolerance``."""
        return _steps(self.decay, tolerance)

    def __str__(self) -> str:
        return (
            f"r = {_decimals(self.rate, self.error)} per step at lr {self.lr:.4g} (κ = {self.kappa:.4g}, λ from {self.lam_min:.3e} to "
            f"{self.lam_max:.3e})" + ("; diverges" if self.diverges else "")
        )


def predict(conditioning: Conditioning | tuple[float, float], lr: float | None = None, *, positive: bool = False) -> Prediction:
    r"""The rate of gradient descent from the ends of a spectrum.

    Args:
        conditioning: of the Hessian, or of ``P.T @ hessian(objective) @ P`` for the method that P preconditions; or (λ_min, λ_max).
        lr: α; None: the best one, 2/(λ_min + λ_max), at which r = (κ − 1)/(κ + 1).
        positive: take the smallest *positive* eigenvalue for λ_min where directions are null, as in scale-invariant networks, whose
            steps never leave the other directions' complement.

    Raises:
        CurvatureError: where κ (with ``positive``, κ₊) is refused: an indefinite or singular Hessian, an end that was not resolved.

    Example:
        >>> predict((1.0, 3.0)).rate
        0.5
        >>> predict((1.0, 3.0)).steps(1e-3)  # doctest: +ELLIPSIS
        9.96...

    References:
        Ye, Theorem 1 and the remark on (5).
    """
    if isinstance(conditioning, Conditioning):
        low, high, *errors = _ends(conditioning, positive)
    else:
        low, high = conditioning
        errors = []
    _check_ends("predict", low, high)
    if lr is not None:
        checks.positive("predict", lr=lr)
    return Prediction(optimal_lr(low, high) if lr is None else lr, low, high, *errors)


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
        return _steps(self.decay, tolerance)

    def __str__(self) -> str:
        notes = [f"steps {self.start} to {self.stop - 1} of the {self.kind}"]
        if self.floor_reached:
            notes.append(f"floor {self.floor:.0e} reached")
        if not self.settled:
            notes.append("not settled")
        if self.decay < 0:
            notes.append("growing")
        return f"r = {_decimals(self.rate, self.error)} per step ({', '.join(notes)})"


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


@dataclass(frozen=True)
class Comparison:
    """What a spectrum predicts and what a trace shows, side by side.

    Attributes:
        predicted: from the spectrum.
        observed: from the trace.
    """

    predicted: Prediction
    observed: ObservedRate

    @property
    def ratio(self) -> float:
        """Steps observed over steps predicted, to any tolerance."""
        return self.predicted.decay / self.observed.decay if self.observed.decay else math.inf

    @property
    def agrees(self) -> bool:
        """Whether the two decays differ by at most twice the sum of their errors, or by 1 % (first-order theory holds no further)."""
        error = self.observed.decay_error + self.predicted.error / max(self.predicted.rate, 1e-300)
        return abs(self.predicted.decay - self.observed.decay) <= max(2 * error, 0.01 * abs(self.predicted.decay))

    def __str__(self) -> str:
        p, o = self.predicted, self.observed
        rows = [
            ("", "predicted", "observed"),
            ("rate per step", _decimals(p.rate, p.error), f"{_decimals(o.rate, o.error)}"),
            ("steps to 1e-3", f"{p.steps(1e-3):.4g}", f"{o.steps(1e-3):.4g}"),
            ("steps to 1e-6", f"{p.steps(1e-6):.4g}", f"{o.steps(1e-6):.4g}"),
        ]
        lines = [f"{a:<14} {b:<24} {c}" for a, b, c in rows]
        verdict = "agree" if self.agrees else f"differ: {self.ratio:.3g} times as many steps as predicted"
        return "\n".join([*lines, f"{verdict}; {o}"])


def _ends(c: Conditioning, positive: bool) -> tuple[float, float, float, float]:
    if c.why is not None and positive:
        _ = c.kappa_positive  # raises where it is refused
        assert c.lam_min_positive is not None and c.lam_min_positive_error is not None
        return c.lam_min_positive, c.lam_max, c.lam_min_positive_error, c.lam_max_error
    try:
        _ = c.kappa
    except Singular as error:
        if c.why_positive is None:
            raise Singular(f"{error}; predict(..., positive=True) takes the smallest positive eigenvalue") from None
        raise
    return c.lam_min, c.lam_max, c.lam_min_error, c.lam_max_error


def _check_ends(caller: str, lam_min: float, lam_max: float) -> None:
    if not 0 < lam_min <= lam_max < math.inf:
        raise ValueError(
            f"{caller}: needs 0 < lam_min <= lam_max, got lam_min={lam_min!r}, lam_max={lam_max!r}; where the Hessian is singular take "
            "the smallest positive eigenvalue, where it is indefinite there is no rate"
        )


def _steps(decay: float, tolerance: float) -> float:
    if not 0 < tolerance < 1:
        raise ValueError(f"steps: tolerance must lie in (0, 1), got {tolerance!r}; usual values are 1e-3 to 1e-12")
    return -math.log(tolerance) / decay if decay > 0 else math.inf


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


def _decimals(x: float, error: float) -> str:
    """x with two digits more than 1 − x needs, and its error."""
    digits = 4 if x == 1 or not math.isfinite(x) else min(max(4, 3 - math.floor(math.log10(abs(1 - x)))), 15)
    return f"{x:.{digits}f}" + (f" ± {error:.0e}" if error else "")
