r"""Trace and diagonal of a symmetric map from products, with error bars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor

from precond.curvature.operators import as_map
from precond.curvature.spectrum import SMALL, row_product, working
from precond.curvature.symmetric import example_of, length
from precond.vec import Vec, unflatten

T = TypeVar("T", float, Vec)
Estimator = Literal["auto", "exact", "hutchinson", "hutch++"]
_ROWS = 256


@dataclass(frozen=True)
class Estimate(Generic[T]):
    """A number or a vector with its standard error.

    Attributes:
        value: unbiased.
        error: standard error, from the scatter of the random probes; 0 where exact.
        exact: whether it is computed from all columns.
        products: matrix–vector products used.
    """

    value: T
    error: T
    exact: bool
    products: int

    def __str__(self) -> str:
        if isinstance(self.value, tuple):
            return (
                f"diagonal of {length(self.value)} entries, {'exact' if self.exact else 'estimated'}; {self.products} products"
            )
        return f"{self.value:.6e} ± {self.error:.0e} ({self.products} products{', exact' if self.exact else ''})"


def trace(map: Any, *, products: int = 96, method: Estimator = "auto", seed: int = 0) -> Estimate[float]:
    r"""tr A of a symmetric map.

    Hutchinson: the mean of vᵀAv over vectors v of random signs. Hutch++ takes the trace on the range Q of a sketch AS exactly and
    estimates the rest alone, tr A = tr QᵀAQ + tr (I − QQᵀ)A(I − QQᵀ), which pays where few eigenvalues are large, as those of a Hessian.

    Args:
        map: a symmetric map, a matrix, or a SciPy ``LinearOperator``.
        products: how many to spend, ≥ 6; where that is as many as there are entries, all columns are taken.
        method: ``"exact"`` (n products), ``"hutchinson"``, ``"hutch++"``, or ``"auto"``: exact up to 512 entries, else Hutch++.
        seed: of the random signs.

    Example:
        >>> trace(torch.diag(torch.tensor([1.0, 2.0, 4.0]))).value
        7.0

    References:
        Hutchinson (1990); Meyer, Musco, Musco & Woodruff (2021), Hutch++.
    """
    found = _diagonal(map, products, method, seed, "trace")
    error = float(found.scatter.sum(1).std()) / len(found.scatter) ** 0.5 if not found.exact else 0.0
    return Estimate(float(found.known.sum() + found.scatter.sum(1).mean()), error, found.exact, found.products)


def diagonal(map: Any, *, products: int = 96, method: Estimator = "auto", seed: int = 0) -> Estimate[Vec]:
    r"""diag A of a symmetric map, aligned to its vectors.

    The mean of v ⊙ Av over vectors v of random signs (which reads the rows' off-diagonal entries as noise); ``"hutch++"`` takes out what
    the range Q of a sketch holds, diag A = diag(PA + AP − PAP) + diag((I − P)A(I − P)) with P = QQᵀ.

    Args:
        map: a symmetric map, a matrix, or a SciPy ``LinearOperator``.
        products: how many to spend, ≥ 6; where that is as many as there are entries, all columns are taken.
        method: as in :func:`trace`.
        seed: of the random signs.

    Example:
        >>> diagonal(torch.diag(torch.tensor([1.0, 2.0]))).value
        (tensor([1., 2.]),)

    References:
        Bekas, Kokiopoulou & Saad (2007); Baston & Nakatsukasa (2022) for the form with a sketch.
    """
    found = _diagonal(map, products, method, seed, "diagonal")
    mean = found.known + found.scatter.mean(0)
    error = found.scatter.std(0) / len(found.scatter) ** 0.5 if not found.exact else torch.zeros_like(mean)
    flat = working(found.like)
    value, bars = (unflatten(x.to(flat), found.like) for x in (mean, error))
    return Estimate(value, bars, found.exact, found.products)


@dataclass(frozen=True)
class _Parts:
    """diag A = ``known``, (n,), + the mean of the rows of ``scatter``, (k, n), one for each probe."""

    known: Tensor
    scatter: Tensor
    exact: bool
    products: int
    like: Vec


def _diagonal(map: Any, products: int, method: Estimator, seed: int, caller: str) -> _Parts:
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
        return _Parts(known, known.new_zeros(1, n), True, n, like)
    generator = torch.Generator().manual_seed(seed)
    signs = lambda k: (2.0 * torch.randint(0, 2, (k, n), generator=generator) - 1).to(flat)  # noqa: E731
    if method == "hutchinson":
        V = signs(products)
        return _Parts(flat.double() * 0, (V * apply(V)).double(), False, products, like)
    k = products // 3
    Q = torch.linalg.qr(apply(signs(k)).T).Q.T
    AQ = apply(Q)
    B = AQ @ Q.T
    known = (2 * Q * AQ - Q * (B @ Q)).double().sum(0)
    V = signs(products - 2 * k)
    inside = V - (V @ Q.T) @ Q
    out = apply(inside)
    return _Parts(known, (V * (out - (out @ Q.T) @ Q)).double(), False, products, like)
