r"""What is known of a matrix' conditioning: the ends of its spectrum with their bounds, its inertia, and κ where it means something."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from precond.analysis.curvature.errors import CurvatureError, Indefinite, NotResolved, Singular

# The smallest positive eigenvalue means something if it is this many times what counts as null; else it echoes the threshold.
_APART = 10.0


@dataclass(frozen=True)
class Inertia:
    """Numbers of negative, null and positive eigenvalues.

    Attributes:
        negative: below −threshold; at least so many (each negative Ritz value proves an eigenvalue below it).
        null: of a magnitude up to the threshold; at least so many where not ``exact``.
        positive: above the threshold; at least so many where not ``exact``.
        exact: whether the three are the true numbers, and not lower bounds.
        null_estimate: n₀, estimated from a random vector's part in the null space; None: not known.
        null_error: standard error of ``null_estimate``.
    """

    negative: int
    null: int
    positive: int
    exact: bool
    null_estimate: float | None = None
    null_error: float | None = None

    def __str__(self) -> str:
        least = "" if self.exact else "at least "
        text = f"{least}{self.negative} negative, {self.null} null, {self.positive} positive"
        if not self.exact and self.null_estimate is not None:
            text += f" (about {self.null_estimate:.0f} ± {self.null_error:.0f} null)"
        return text


@dataclass(frozen=True)
class Conditioning:
    r"""Ends of the spectrum of a symmetric map A and what follows from them.

    κ = λ_max/λ_min, where all eigenvalues are positive; κ₊ = λ_max/λ_min₊ with the smallest positive one, where none is negative.
    Both raise where that is not so or was not resolved; ``why`` and ``why_positive`` say it without raising.

    Attributes:
        lam_max: largest eigenvalue.
        lam_min: smallest eigenvalue, negative for an indefinite map; outside what was deflated.
        lam_min_positive: smallest eigenvalue above ``threshold``; None: not found, as Lanczos does not inside an indefinite spectrum.
        lam_max_error: bound of the error of ``lam_max``: residual, or 2·residual²/gap where that is smaller, plus the precision floor. The
            gap is the one seen; where two eigenvalues lie closer together than the residual, the residual is the bound.
        lam_min_error: the same of ``lam_min``.
        lam_min_positive_error: the same of ``lam_min_positive``; None with it.
        residuals: ‖A x − λ x‖ of λ_max, λ_min and λ_min₊ (NaN where there is none): an eigenvalue lies within it, whatever the gaps.
        inertia: numbers of negative, null and positive eigenvalues.
        threshold: magnitude up to which an eigenvalue counts as null.
        null_level: largest magnitude among the null ones, at least ``floor``.
        floor: what rounding in ``dtype`` leaves undecided of any eigenvalue.
        tol: relative accuracy that was asked for.
        dtype: in which products were computed.
        n: number of entries that the map acts on.
        deflated: dimension of the subspace that was left out.
        products: matrix–vector products used.
        method: ``"dense"`` or ``"lanczos"``.
    """

    lam_max: float
    lam_min: float
    lam_min_positive: float | None
    lam_max_error: float
    lam_min_error: float
    lam_min_positive_error: float | None
    residuals: tuple[float, float, float]
    inertia: Inertia
    threshold: float
    null_level: float
    floor: float
    tol: float
    dtype: torch.dtype
    n: int
    deflated: int
    products: int
    method: str

    @property
    def kappa(self) -> float:
        """κ = λ_max/λ_min.

        Raises:
            Indefinite: with a negative eigenvalue.
            Singular: with a null one.
            NotResolved: where an end was not resolved to ``tol``.
        """
        if (error := self._refusal()) is not None:
            raise error
        return self.lam_max / self.lam_min

    @property
    def kappa_positive(self) -> float:
        """κ₊ = λ_max/λ_min₊.

        Raises:
            Indefinite: with a negative eigenvalue.
            Singular: where the smallest positive one is not apart from the null ones, so that it echoes the threshold.
            NotResolved: where it, or λ_max, was not resolved to ``tol``.
        """
        if (error := self._refusal_positive()) is not None:
            raise error
        assert self.lam_min_positive is not None
        return self.lam_max / self.lam_min_positive

    @property
    def kappa_error(self) -> float:
        """Bound of the error of κ. Raises as ``kappa`` does."""
        return self._ratio_error(self.kappa, self.lam_min, self.lam_min_error)

    @property
    def kappa_positive_error(self) -> float:
        """Bound of the error of κ₊. Raises as ``kappa_positive`` does."""
        kappa = self.kappa_positive
        assert self.lam_min_positive is not None and self.lam_min_positive_error is not None
        return self._ratio_error(kappa, self.lam_min_positive, self.lam_min_positive_error)

    @property
    def why(self) -> str | None:
        """Why κ is refused; None where it is not."""
        return _text(self._refusal())

    @property
    def why_positive(self) -> str | None:
        """Why κ₊ is refused; None where it is not."""
        return _text(self._refusal_positive())

    @property
    def definite(self) -> bool:
        """Whether all eigenvalues (outside what was deflated) are positive, and this is certain."""
        return self.lam_min - self.lam_min_error > self.threshold

    @property
    def indefinite(self) -> bool:
        """Whether there is a negative eigenvalue, which is certain as soon as one Ritz value is negative."""
        return self.inertia.negative > 0

    @property
    def converged(self) -> bool:
        """Whether λ_max and λ_min are resolved (or null), and λ_min₊ where no eigenvalue is negative."""
        ends = _fine(self.lam_max, self.lam_max_error, self.tol) and (
            _fine(self.lam_min, self.lam_min_error, self.tol) or abs(self.lam_min) + self.lam_min_error <= self.threshold
        )
        return ends and (self.indefinite or self.why_positive is None)

    def _refusal(self) -> CurvatureError | None:
        if self.indefinite:
            return self._negative("κ")
        if not self.definite:
            if abs(self.lam_min) <= self.threshold:
                return Singular(
                    f"κ is not defined: λ_min = {self.lam_min:.1e} is null, |λ| <= {self.threshold:.1e} in {_name(self.dtype)}; read "
                    "kappa_positive, deflate what is known to be null (invariances(objective)), or add an L2 penalty"
                )
            return self._open("λ_min", self.lam_min, self.lam_min_error)
        return self._unresolved("λ_min", self.lam_min, self.lam_min_error)

    def _refusal_positive(self) -> CurvatureError | None:
        if self.indefinite:
            return self._negative("κ₊")
        value, error = self.lam_min_positive, self.lam_min_positive_error
        if value is None or error is None:
            return NotResolved(f"κ₊ is not known: no eigenvalue above {self.threshold:.1e} was found; {self._remedy()}")
        if value < _APART * self.null_level:
            return Singular(
                f"κ₊ is not well defined: the smallest eigenvalue above the threshold, {value:.1e}, is not apart from the null ones, "
                f"which reach {self.null_level:.1e}, so it echoes the threshold {self.threshold:.1e}; deflate what is known to be null "
                "(invariances(objective)), choose null_tol= in a gap of the spectrum, or add an L2 penalty"
            )
        return self._unresolved("λ_min₊", value, error)

    def _unresolved(self, name: str, value: float, error: float) -> NotResolved | None:
        for what, x, e in (("λ_max", self.lam_max, self.lam_max_error), (name, value, error)):
            if not _fine(x, e, self.tol):
                return self._open(what, x, e)
        return None

    def _open(self, what: str, value: float, error: float) -> NotResolved:
        return NotResolved(
            f"{what} = {value:.3e} ± {error:.0e} is not resolved to tol={self.tol:g} after {self.products} products; {self._remedy()}"
        )

    def _negative(self, what: str) -> Indefinite:
        return Indefinite(
            f"{what} is not defined: the map has at least {self.inertia.negative} negative eigenvalues, down to {self.lam_min:.3e}; "
            "measure at a minimum, use gauss_newton(objective), or read lam_max and lam_min"
        )

    def _remedy(self) -> str:
        if self.dtype != torch.float64 and max(self.lam_max, -self.lam_min) * self.tol > 0:
            low = self.lam_min_positive if self.lam_min_positive is not None else abs(self.lam_min)
            if self.floor > self.tol * low:
                return f"rounding in {_name(self.dtype)} alone leaves ±{self.floor:.0e}: use float64=True"
        return "raise max_products, loosen tol, or use method='dense' on a small problem"

    def _ratio_error(self, kappa: float, low: float, low_error: float) -> float:
        return kappa * (self.lam_max_error / abs(self.lam_max) + low_error / abs(low))

    def __str__(self) -> str:
        lines = [
            f"λ_max   {self.lam_max:+.6e} ± {self.lam_max_error:.0e}",
            f"λ_min   {self.lam_min:+.6e} ± {self.lam_min_error:.0e}",
        ]
        if self.lam_min_positive is not None and self.lam_min_positive != self.lam_min:
            lines.append(f"λ_min₊  {self.lam_min_positive:+.6e} ± {self.lam_min_positive_error:.0e}")
        if self.why is None:
            lines.append(f"κ       {self.kappa:.6g} ± {self.kappa_error:.0e}")
        elif self.why_positive is None:
            lines.append(f"κ₊      {self.kappa_positive:.6g} ± {self.kappa_positive_error:.0e}")
        else:
            lines.append(self.why_positive)
        inside = f", {self.deflated} deflated" if self.deflated else ""
        lines.append(f"{self.n} entries: {self.inertia}{inside}; |λ| <= {self.threshold:.0e} counts as null")
        lines.append(
            f"{self.products} products, {self.method}, {_name(self.dtype)} (floor {self.floor:.0e})"
            f"{'' if self.converged else '; not converged'}"
        )
        return "\n".join(lines)


def _fine(value: float, error: float, tol: float) -> bool:
    return error <= tol * abs(value)


def _text(error: CurvatureError | None) -> str | None:
    return None if error is None else str(error)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
