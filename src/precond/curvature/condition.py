r"""Condition numbers of symmetric maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from precond.curvature.conditioning import Conditioning, Inertia
from precond.curvature.operators import as_map
from precond.curvature.precision import in_float64
from precond.curvature.spectrum import Method, Settings, Spectrum, spectrum
from precond.curvature.subspace import Subspace
from precond.curvature.symmetric import example_of, length
from precond.vec import flatten

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
