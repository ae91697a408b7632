r"""Condition numbers, with what stands behind them, and refused where nothing does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from precond.curvature.errors import CurvatureError, Indefinite, NotResolved, Singular
from precond.curvature.operators import as_map
from precond.curvature.precision import in_float64
from precond.curvature.spectrum import Method, Settings, Spectrum, spectrum
from precond.curvature.subspace import Subspace
from precond.curvature.symmetric import example_of, length
from precond.vec import flatten

# Up to this many entries all eigenvalues are computed where Lanczos leaves a question open (1e4: 40 s on two cores).
_DENSE = 10_000
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
        lam_max_error: bound of the error of ``lam_max``: residual, or residual²/gap where that is smaller, plus the precision floor. The
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


def condition_number(
    map: Any,
    *,
    tol: float = 1e-3,
    null_tol: float | None = None,
    method: Method = "auto",
    max_products: int = 1000,
    block: int = 1,
    basis: int | None = None,
    deflate: Subspace | None = None,
    float64: bool = False,
    seed: int = 0,
) -> Conditioning:
    r"""κ and κ₊ of a symmetric map, with the ends of its spectrum, their error bounds and its inertia.

    The rate of gradient descent at its best learning rate is (κ − 1)/(κ + 1) (Ye, eq. 3); for ``P.T @ hessian(objective) @ P`` it is the
    rate of the preconditioned method. The smallest *positive* eigenvalue takes the place of λ_min where directions are null.

    ``"auto"`` computes all eigenvalues of up to 512 entries; above, a Lanczos run that reorthogonalizes always gives both ends. Where that
    leaves λ_min₊ open (inside the spectrum of a map with null directions, Lanczos may not get there), and the map has at most 10,000
    entries, all eigenvalues are computed after all.

    An eigenvalue lies within the residual of each number; that it is the outermost one rests on the random first vector, as in all
    Krylov methods, and is confirmed by further products. Eigenvalues closer together than ``tol`` may be taken for one.

    Args:
        map: a symmetric map, such as ``hessian(objective)`` or ``P.T @ hessian(objective) @ P``; a matrix; a SciPy ``LinearOperator``.
        tol: relative accuracy of the eigenvalues.
        null_tol: magnitude, relative to max|λ|, up to which an eigenvalue counts as null; None: 16 times the dtype's ε.
        method: ``"dense"``, ``"lanczos"`` or ``"auto"``.
        max_products: where Lanczos stops, resolved or not.
        block: vectors at once in Lanczos.
        basis: Lanczos vectors kept in memory; None: 1 GiB of them.
        deflate: a subspace that is left out, such as ``invariances(objective)``.
        float64: compute in float64, with copies of all numbers: float32 cannot resolve λ_min to 1e-3 from κ ≈ 3e4 on.
        seed: of Lanczos' first vector.

    Raises:
        NotSymmetric: for a map that is not symmetric.

    Example:
        >>> print(condition_number(torch.diag(torch.tensor([4.0, 2.0, 0.5])).double()).kappa)
        8.0

    References:
        Paige (1980); Parlett (1998), The symmetric eigenvalue problem; Ye, Theorem 1.
    """
    map = as_map(map, "condition_number")
    if float64:
        map = in_float64(map)
    like = example_of(map, "condition_number")
    n, dtype = length(like), flatten(like).dtype
    settings = Settings(tol, null_tol, method, max_products, block, basis, seed, vectors=False)

    def made(found: Spectrum, before: int = 0) -> Conditioning:
        return _conditioning(found, before, tol, n, dtype)

    if method == "auto" and n <= _DENSE:
        # Half of all products is where the dense path becomes the faster one.
        settings = Settings(tol, null_tol, method, min(max_products, max(n // 2, 1)), block, basis, seed, vectors=False)
    found = spectrum(map, lambda s: _done(s, tol), deflate, settings, "condition_number")
    out = made(found)
    if method == "auto" and n <= _DENSE and not _done(found, tol) and not out.indefinite:
        settings = Settings(tol, null_tol, "dense", max_products, block, basis, seed, vectors=False)
        out = made(spectrum(map, lambda s: True, deflate, settings, "condition_number"), found.products)
    return out


def _done(found: Spectrum, tol: float) -> bool:
    """Whether more products would not change what can be said of κ and κ₊."""
    values, settled = found.values, found.settled(tol)
    if found.complete:
        return True
    if not bool(settled[0] & settled[-1]):
        return False
    if float(values[0]) < -found.threshold:
        return True
    low = int((values <= found.threshold).sum())
    return bool(settled[: low + 1].all())


def _conditioning(found: Spectrum, before: int, tol: float, n: int, dtype: torch.dtype) -> Conditioning:
    values, residuals, errors = found.values.double(), found.residuals.double(), found.errors.double() + found.floor
    # Coordinates where the map is zero, which Lanczos left out, are null eigenvectors.
    exact = torch.zeros(min(found.zeros, 1), dtype=torch.float64)
    values, residuals, errors = (torch.cat([x, exact]) for x in (values, residuals, errors))
    if not len(values):
        values, residuals, errors = (torch.zeros(1, dtype=torch.float64) for _ in range(3))
    order = values.argsort()
    values, residuals, errors = values[order], residuals[order], errors[order]
    null = values.abs() <= found.threshold
    positive = (values > found.threshold).nonzero()[:, 0]
    if not found.complete and float(values[0]) < -found.threshold:
        # Inside the spectrum of an indefinite map Lanczos has passed over eigenvalues.
        positive = positive[:0]
    first = int(positive[0]) if len(positive) else None
    return Conditioning(
        lam_max=float(values[-1]),
        lam_min=float(values[0]),
        lam_min_positive=None if first is None else float(values[first]),
        lam_max_error=float(errors[-1]),
        lam_min_error=float(errors[0]),
        lam_min_positive_error=None if first is None else float(errors[first]),
        residuals=(float(residuals[-1]), float(residuals[0]), torch.nan if first is None else float(residuals[first])),
        inertia=_inertia(found, values, errors, n),
        threshold=found.threshold,
        null_level=max(float(values[null].abs().max()) if bool(null.any()) else 0.0, found.floor),
        floor=found.floor,
        tol=tol,
        dtype=dtype,
        n=n,
        deflated=found.deflated,
        products=before + found.products,
        method=found.method,
    )


def _inertia(found: Spectrum, values: Tensor, errors: Tensor, n: int) -> Inertia:
    inside = n - found.deflated
    negative = int((found.values < -found.threshold).sum())
    positive = int((found.values > found.threshold).sum())
    null = len(found.values) - negative - positive
    if found.complete or not len(found.values):
        return Inertia(negative, null + found.zeros, positive, exact=True)
    if not found.zeros and float(values[0] - errors[0]) > found.threshold:
        return Inertia(0, 0, inside, exact=True)
    if found.weights is None or null == 0:
        return Inertia(negative, null + found.zeros, positive, exact=False)
    # The squared part of a random unit vector in a space of dimension m has the mean m/room and the variance 2m(room − m)/room³.
    room = inside - found.zeros
    share = float(found.weights[found.values.abs() <= found.threshold].sum())
    m = room * share
    return Inertia(negative, null + found.zeros, positive, False, m + found.zeros, (2 * m * (1 - share)) ** 0.5)


def _fine(value: float, error: float, tol: float) -> bool:
    return error <= tol * abs(value)


def _text(error: CurvatureError | None) -> str | None:
    return None if error is None else str(error)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
