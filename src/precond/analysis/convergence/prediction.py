"""The rate that a spectrum predicts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from precond.algebra import checks
from precond.analysis.convergence.numbers import decimals, steps_of
from precond.analysis.curvature import Conditioning, Singular


def optimal_lr(lam_min: float, lam_max: float) -> float:
    r"""α = 2/(λ_min + λ_max), the learning rate of the smallest rate r.

    Args:
        lam_min, lam_max: the ends of the spectrum of the Hessian, or of PᵀHP.

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

    Args:
        kappa: κ ≥ 1, or ∞.

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

    Args:
        rate: r, the factor per step.
        tolerance: in (0, 1).

    Returns:
        A number of steps, not rounded.

    Raises:
        ValueError: for a tolerance outside of (0, 1).

    Example:
        >>> round(steps(0.5, 1 / 8), 6)
        3.0

    References:
        Ye, Theorem 1.
    """
    checks.non_negative("steps", rate=rate)
    return steps_of(-math.log(rate) if rate > 0 else math.inf, tolerance)


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
        return steps_of(self.decay, tolerance)

    def __str__(self) -> str:
        return (
            f"r = {decimals(self.rate, self.error)} per step at lr {self.lr:.4g} (κ = {self.kappa:.4g}, λ from {self.lam_min:.3e} to "
            f"{self.lam_max:.3e})" + ("; diverges" if self.diverges else "")
        )


def predict(conditioning: Conditioning | tuple[float, float], lr: float | None = None, *, positive: bool = False) -> Prediction:
    r"""The rate of gradient descent from the ends of a spectrum.

    Args:
        conditioning: of the Hessian, or of ``P.T @ hessian(objective) @ P`` for the method that P preconditions; or (λ_min, λ_max).
        lr: α; None: the best one, 2/(λ_min + λ_max), at which r = (κ − 1)/(κ + 1).
        positive: take the smallest *positive* eigenvalue for λ_min where directions are null, as in scale-invariant networks, whose
            steps never leave the other directions' complement.

    Returns:
        A :class:`Prediction`.

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
