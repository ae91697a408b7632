r"""Condition numbers of symmetric maps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from precond.algebra.vec import flatten
from precond.analysis.curvature.conditioning import Conditioning, Inertia
from precond.analysis.curvature.operators import as_map
from precond.analysis.curvature.precision import in_float64
from precond.analysis.curvature.spectrum import Method, Settings, Spectrum, spectrum
from precond.analysis.curvature.subspace import Subspace
from precond.analysis.curvature.symmetric import example_of, length

# Up to this many entries all eigenvalues are computed where Lanczos leaves a question open (1e4: 40 s on two cores).
_DENSE = 10_000


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
    Krylov methods, and is confirmed by further products. Eigenvalues closer
    together than a few residuals, which may be up to √(tol·λ·gap/2), may be taken for one in between.

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

    Returns:
        A :class:`Conditioning`, whose ``kappa`` and ``kappa_positive`` raise where they are not defined or not resolved.

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

    def made(found: Spectrum, ends: _Ends, before: int = 0) -> Conditioning:
        return _conditioning(found, ends.first(found), before, tol, n, dtype)

    if method == "auto" and n <= _DENSE:
        # Half of all products is where the dense path becomes the faster one.
        settings = Settings(tol, null_tol, method, min(max_products, max(n // 2, 1)), block, basis, seed, vectors=False)
    ends = _Ends(tol)
    found = spectrum(map, ends.known, deflate, settings, "condition_number")
    out = made(found, ends)
    if method == "auto" and n <= _DENSE and not ends.known(found) and not out.indefinite:
        settings = Settings(tol, null_tol, "dense", max_products, block, basis, seed, vectors=False)
        out = made(spectrum(map, lambda s: True, deflate, settings, "condition_number"), _Ends(tol), found.products)
    return out


class _Ends:
    """Whether more products would change what can be said of κ and κ₊, followed through one run.

    Behind a null space of many dimensions rounding brings up one null vector after the other, and there is always a Ritz value on its way
    from the positive ones down to zero. Ritz values at one place of the order only fall as the run goes on (Cauchy). So those below
    λ_min₊ are counted where it settles first; when as many have come to rest at zero, and it is still there, those that came later are
    passed over.
    """

    def __init__(self, tol: float):
        self._tol = tol
        self._value, self._below = math.nan, 0

    def known(self, found: Spectrum) -> bool:
        if found.complete:
            return True
        values, settled = found.values, found.settled(self._tol)
        if float(values[0]) < -found.threshold:
            return bool(settled[0] & settled[-1])
        at = _position(settled & (values > found.threshold))
        if at is None:
            return False
        if not abs(float(values[at]) - self._value) <= 2 * self._tol * self._value:
            self._value, self._below = float(values[at]), at
        # Fewer than before where a restart has dropped some.
        self._below = min(self._below, at)
        return bool(settled[-1] & settled[: self._below].all())

    def first(self, found: Spectrum) -> int | None:
        """The position of λ_min₊ among the values."""
        positive = found.values > found.threshold
        return _position(positive & found.settled(self._tol) if self.known(found) and not found.complete else positive)


def _position(mask: Tensor) -> int | None:
    at = mask.nonzero()[:, 0]
    return int(at[0]) if len(at) else None


def _conditioning(found: Spectrum, first: int | None, before: int, tol: float, n: int, dtype: torch.dtype) -> Conditioning:
    values, residuals, errors = found.values.double(), found.residuals.double(), found.errors.double() + found.floor
    if not found.complete and len(values) and float(values[0]) < -found.threshold:
        # Inside the spectrum of an indefinite map Lanczos has passed over eigenvalues.
        first = None
    smallest = None if first is None else [float(x[first]) for x in (values, errors, residuals)]
    # Coordinates where the map is zero, which Lanczos left out, are null eigenvectors.
    exact = torch.zeros(min(found.zeros, 1), dtype=torch.float64)
    values, residuals, errors = (torch.cat([x, exact]) for x in (values, residuals, errors))
    if not len(values):
        values, residuals, errors = (torch.zeros(1, dtype=torch.float64) for _ in range(3))
    order = values.argsort()
    values, residuals, errors = values[order], residuals[order], errors[order]
    null = values.abs() <= found.threshold
    return Conditioning(
        lam_max=float(values[-1]),
        lam_min=float(values[0]),
        lam_min_positive=None if smallest is None else smallest[0],
        lam_max_error=float(errors[-1]),
        lam_min_error=float(errors[0]),
        lam_min_positive_error=None if smallest is None else smallest[1],
        residuals=(float(residuals[-1]), float(residuals[0]), torch.nan if smallest is None else smallest[2]),
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
