r"""Trace and diagonal of a symmetric map from products, with error bars."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor

from precond.algebra.vec import Vec, unflatten
from precond.analysis.curvature.operators import as_map
from precond.analysis.curvature.spectrum import SMALL, row_product, working
from precond.analysis.curvature.symmetric import example_of, length
from precond.analysis.curvature.xtrace import xtrace

T = TypeVar("T", float, Vec)
Estimator = Literal["auto", "exact", "hutchinson", "hutch++", "xtrace"]
_ROWS = 256


@dataclass(frozen=True)
class Estimate(Generic[T]):
    """A number or a vector with its standard error.

    Attributes:
        value: unbiased.
        error: standard error, from the scatter of the random probes; 0 where exact.
        exact: whether it is computed from all columns.
        products: matrix–vector products used.
        probes: how many random vectors scatter; 0 where exact.
    """

    value: T
    error: T
    exact: bool
    products: int
    probes: int = 1

    def interval(self, confidence: float = 0.95) -> tuple[T, T]:
        """(low, high) around the value: Student's t for the scatter of the probes; entry by entry of a diagonal.

        Raises:
            ValueError: for a confidence outside (0, 1).
        """
        if not 0 < confidence < 1:
            raise ValueError(f"Estimate.interval: confidence must lie in (0, 1), got {confidence!r}; 0.95 is usual")
        t = 0.0 if self.exact else students_t(confidence, self.probes - 1)
        if isinstance(self.value, tuple):
            pairs = list(zip(self.value, self.error, strict=True))
            return tuple(v - t * e for v, e in pairs), tuple(v + t * e for v, e in pairs)
        return self.value - t * self.error, self.value + t * self.error

    def __str__(self) -> str:
        if isinstance(self.value, tuple):
            return (
                f"diagonal of {length(self.value)} entries, {'exact' if self.exact else 'estimated'}; {self.products} products"
            )
        return f"{self.value:.6e} ± {self.error:.0e} ({self.products} products{', exact' if self.exact else ''})"


def students_t(confidence: float, degrees: int) -> float:
    """t with P(|T| ≤ t) = confidence, of Student's distribution: closed for one and two degrees of freedom, else by its expansion.

    The expansion is right to 0.2 % from three degrees on at 0.95, and to 0.8 % at 0.99.

    References:
        Abramowitz & Stegun (1964), 26.7.5.
    """
    if degrees == 1:
        return math.tan(math.pi * confidence / 2)
    if degrees == 2:
        return confidence * math.sqrt(2 / (1 - confidence**2))
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**k for k, term in enumerate(terms, 1))


def trace(map: Any, *, products: int = 96, method: Estimator = "auto", seed: int = 0) -> Estimate[float]:
    r"""tr A of a symmetric map.

    Hutchinson: the mean of vᵀAv over vectors v of random signs. Hutch++ takes the trace on the range Q of a sketch AS exactly and
    estimates the rest alone, tr A = tr QᵀAQ + tr (I − QQᵀ)A(I − QQᵀ), which pays where few eigenvalues are large, as those of a
    Hessian. ``"xtrace"`` is XTrace: each of products/2 probes is taken on the complement of the sketch of all others, so that every probe
    serves both ends; its error is a jackknife's, rather too large than too small.

    Args:
        map: a symmetric map, a matrix, or a SciPy ``LinearOperator``.
        products: how many to spend, ≥ 6 (12 of ``"xtrace"``); where that is as many as there are entries, all columns are taken.
        method: ``"exact"`` (n products), ``"hutchinson"``, ``"hutch++"``, ``"xtrace"`` (XTrace), or ``"auto"``: exact up to 512 entries, else
            Hutch++.
        seed: of the random signs.

    Returns:
        An :class:`Estimate` of a number.

    Example:
        >>> trace(torch.diag(torch.tensor([1.0, 2.0, 4.0]))).value
        7.0

    References:
        Hutchinson (1990); Meyer, Musco, Musco & Woodruff (2021), Hutch++; Epperly, Tropp & Webber (2024), XTrace.
    """
    found = _found(map, products, method, seed, "trace")
    return Estimate(*found.trace, found.probes == 0, found.products, found.probes)


def diagonal(map: Any, *, products: int = 96, method: Estimator = "auto", seed: int = 0) -> Estimate[Vec]:
    r"""diag A of a symmetric map, aligned to its vectors.

    The mean of v ⊙ Av over vectors v of random signs (which reads the rows' off-diagonal entries as noise); ``"hutch++"`` takes out what
    the range Q of a sketch holds, diag A = diag(PA + AP − PAP) + diag((I − P)A(I − P)) with P = QQᵀ; ``"xtrace"`` is XDiag, as in
    :func:`trace`.

    Args:
        map: a symmetric map, a matrix, or a SciPy ``LinearOperator``.
        products: how many to spend, ≥ 6 (12 of ``"xtrace"``); where that is as many as there are entries, all columns are taken.
        method: as in :func:`trace`.
        seed: of the random signs.

    Returns:
        An :class:`Estimate` of tensors of the parameters' shapes, with a standard error for each entry.

    Example:
        >>> diagonal(torch.diag(torch.tensor([1.0, 2.0]))).value
        (tensor([1., 2.]),)

    References:
        Bekas, Kokiopoulou & Saad (2007); Baston & Nakatsukasa (2022) for the form with a sketch; Epperly, Tropp & Webber (2024), XDiag.
    """
    found = _found(map, products, method, seed, "diagonal")
    flat = working(found.like)
    value, error = (unflatten(x.to(flat), found.like) for x in found.diagonal())
    return Estimate(value, error, found.probes == 0, found.products, found.probes)


@dataclass(frozen=True)
class _Found:
    """(value, standard error) of the trace and, when called, of the diagonal, (n,), from so many probes; 0 where it is exact."""

    trace: tuple[float, float]
    diagonal: Callable[[], tuple[Tensor, Tensor]]
    probes: int
    products: int
    like: Vec


def _scattered(known: Tensor, scatter: Tensor, products: int, like: Vec) -> _Found:
    r"""From diag A = ``known``, (n,), + the mean of d = v ⊙ Rv, the rows of ``scatter``, over vectors v of random signs.

    Var vᵀRv = 2Σ_{i≠j} R_ij² = 2 Σ_i Var d_i of a symmetric R. The right side is the better estimate: where one eigenvalue is all, it is off
    as the mean is, and not as its square.
    """
    m = len(scatter)
    mean, variance = known + scatter.mean(0), scatter.var(0) / m
    return _Found((float(mean.sum()), math.sqrt(2 * float(variance.sum()))), lambda: (mean, variance.sqrt()), m, products, like)


def _found(map: Any, products: int, method: Estimator, seed: int, caller: str) -> _Found:
    method = "xtrace" if method == "exchanged" else method  # its name until 0.2
    if method not in get_args(Estimator):
        raise ValueError(f"{caller}: method must be one of {', '.join(get_args(Estimator))}, got {method!r}")
    if not (isinstance(products, int) and products >= 6):
        raise ValueError(f"{caller}: products must be a whole number >= 6, got {products!r}; 96 is a usual choice")
    map = as_map(map, caller)
    like = example_of(map, caller)
    n, flat = length(like), working(like)
    apply = row_product(map, like)
    if method == "exact" or (method == "auto" and n <= SMALL) or products >= n:
        parts = []
        for start in range(0, n, _ROWS):
            rows = torch.arange(start, min(start + _ROWS, n), device=flat.device)
            units = torch.nn.functional.one_hot(rows, n).to(flat)
            parts.append(apply(units)[torch.arange(len(rows)), rows])
        known = torch.cat(parts).double()
        return _Found((float(known.sum()), 0.0), lambda: (known, torch.zeros_like(known)), 0, n, like)
    generator = torch.Generator().manual_seed(seed)
    signs = lambda k: (2.0 * torch.randint(0, 2, (k, n), generator=generator) - 1).to(flat)  # noqa: E731
    if method == "hutchinson":
        V = signs(products)
        return _scattered(flat.double() * 0, (V * apply(V)).double(), products, like)
    if method == "xtrace":
        m = products // 2
        if m < 6:
            raise ValueError(
                f"{caller}: products must be at least 12 with method='xtrace', got {products}: of fewer than six probes the jackknife "
                "knows too little; give more, or method='hutch++'"
            )
        value, error, diagonals = xtrace(signs(m), apply)

        def mean() -> tuple[Tensor, Tensor]:
            found, errors = diagonals()
            return found.mean(0), errors

        return _Found((value, error), mean, m, 2 * m, like)
    k = products // 3
    Q = torch.linalg.qr(apply(signs(k)).T).Q.T
    AQ = apply(Q)
    B = AQ @ Q.T
    known = (2 * Q * AQ - Q * (B @ Q)).double().sum(0)
    V = signs(products - 2 * k)
    inside = V - (V @ Q.T) @ Q
    out = apply(inside)
    return _scattered(known, (V * (out - (out @ Q.T) @ Q)).double(), products, like)
