r"""The ends of the spectrum of a symmetric map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from precond.curvature.operators import as_map
from precond.curvature.spectrum import Method, Settings, Spectrum, spectrum
from precond.curvature.subspace import Subspace
from precond.curvature.symmetric import example_of
from precond.vec import Vec, flatten, unflatten

Which = Literal["largest", "smallest", "both"]


@dataclass(frozen=True)
class Eigenvalues:
    """Eigenvalues with what is known of them.

    Attributes:
        values: λ, in float64: descending for ``"largest"``, ascending otherwise.
        vectors: their unit eigenvectors, aligned to the map's vectors.
        residuals: ‖A x − λ x‖ in exact arithmetic: an eigenvalue lies within it.
        errors: bounds of |λ̂ − λ|: the residual, or 2·residual²/gap where that is smaller, plus the floor; the gap is the one seen.
        resolved: which are accurate to ``tol`` relative to themselves, or null (of a magnitude below the threshold).
        floor: what rounding leaves undecided.
        threshold: magnitude up to which an eigenvalue counts as null.
        complete: whether all eigenvalues were computed; otherwise copies of a multiple one beyond ``block`` may be missing.
        products: matrix–vector products used.
        method: ``"dense"`` or ``"lanczos"``.
    """

    values: Tensor
    vectors: tuple[Vec, ...]
    residuals: Tensor
    errors: Tensor
    resolved: Tensor
    floor: float
    threshold: float
    complete: bool
    products: int
    method: str

    @property
    def converged(self) -> bool:
        """Whether every value is resolved."""
        return bool(self.resolved.all())

    def __str__(self) -> str:
        lines = [
            f"{value:+.6e} ± {error:.0e}{'' if ok else '   not resolved'}"
            for value, error, ok in zip(self.values.tolist(), self.errors.tolist(), self.resolved.tolist(), strict=True)
        ]
        return "\n".join([*lines, f"{self.products} products, {self.method}; |λ| <= {self.threshold:.0e} counts as null"])


def eigenvalues(
    map: Any,
    k: int | tuple[int, int] = 1,
    which: Which = "largest",
    *,
    tol: float = 1e-3,
    null_tol: float | None = None,
    method: Method = "auto",
    max_products: int = 1000,
    block: int = 1,
    basis: int | None = None,
    deflate: Subspace | None = None,
    seed: int = 0,
) -> Eigenvalues:
    r"""The k algebraically largest or smallest eigenvalues of a symmetric map, or k at both ends, with error bounds.

    Lanczos with full reorthogonalization (without it copies of one eigenvalue pass for several), both ends from one run.

    Args:
        map: a symmetric map, such as ``hessian(objective)`` or ``P.T @ hessian(objective) @ P``; a matrix; a SciPy ``LinearOperator``.
        k: how many; for ``"both"`` also (number of smallest, number of largest).
        which: ``"largest"``, ``"smallest"``, or ``"both"`` (all ascending).
        tol: relative accuracy.
        null_tol: magnitude, relative to max|λ|, up to which an eigenvalue counts as null; None: 16 times the dtype's ε.
        method: ``"dense"``, ``"lanczos"`` or ``"auto"``.
        max_products: where to stop, resolved or not.
        block: vectors at once: multiplicities up to it are found.
        basis: vectors kept in memory; None: 1 GiB of them.
        deflate: a subspace whose eigenvalues are left out.
        seed: of the first vector.

    Raises:
        NotSymmetric: for a map that is not symmetric.
        ValueError: for more eigenvalues than there are.

    Example:
        >>> from precond import Diagonal
        >>> A = Diagonal((torch.tensor([3.0, -1.0, 2.0]),))
        >>> eigenvalues(A, 2).values
        tensor([3., 2.], dtype=torch.float64)

    References:
        Paige (1980); Parlett (1998), The symmetric eigenvalue problem; Wu & Simon (2000) for thick restarts.
    """
    if which not in ("largest", "smallest", "both"):
        raise ValueError(f"eigenvalues: which must be 'largest', 'smallest' or 'both', got {which!r}")
    low, high = (k if isinstance(k, tuple) else (k, k)) if which == "both" else (0, k) if which == "largest" else (k, 0)
    if not (isinstance(low, int) and isinstance(high, int) and low >= 0 and high >= 0 and low + high > 0):
        raise ValueError(f"eigenvalues: k must be a positive whole number, or a pair of them for which='both', got {k!r}")
    map = as_map(map, "eigenvalues")
    settings = Settings(tol, null_tol, method, max_products, block, basis, seed)

    def done(found: Spectrum) -> bool:
        count = len(found.values)
        return count >= low + high and bool(found.settled(tol)[_ends(count, low, high)].all())

    found = spectrum(map, done, deflate, settings, "eigenvalues")
    count = len(found.values)
    # Coordinates where the map is zero are eigenvectors too, which Lanczos left out.
    zeros = found.zeros if found.method == "lanczos" else 0
    if low + high > count + zeros:
        raise ValueError(
            f"eigenvalues: k asks for {low + high} eigenvalues, found {count + zeros}; ask for fewer, or raise max_products"
        )
    like = example_of(map, "eigenvalues")
    return _with_zeros(found, low, high, zeros, tol, like, which == "largest")


def _ends(count: int, low: int, high: int) -> Tensor:
    """Positions of the ``low`` first and ``high`` last of ``count``."""
    return torch.tensor([*range(low), *range(count - high, count)], dtype=torch.long)


def _with_zeros(found: Spectrum, low: int, high: int, zeros: int, tol: float, like: Vec, descending: bool) -> Eigenvalues:
    """The wanted ends of the computed values and of ``zeros`` exact zeros."""
    count = len(found.values)
    near = _ends(count, min(low, count), min(high, count)).unique()
    added = min(zeros, low + high)
    null = torch.zeros(added, dtype=torch.float64)
    values = torch.cat([found.values.double()[near], null])
    order = values.argsort(descending=descending)
    size = len(order)
    wanted = order[:high] if descending else order[_ends(size, low, high)]

    def joined(computed: Tensor, exact: Tensor) -> Tensor:
        return torch.cat([computed[near], exact])[wanted]

    rows = found.rows(near).cpu()
    if added:
        assert found.kept is not None
        at = (~found.kept).nonzero()[:added, 0].cpu()
        rows = torch.cat([rows, torch.nn.functional.one_hot(at, len(found.kept)).to(rows)])
    flat = flatten(like)
    return Eigenvalues(
        values[wanted],
        tuple(unflatten(row.to(flat), like) for row in rows[wanted]),
        joined(found.residuals.double(), null),
        joined(found.errors.double() + found.floor, null),
        joined(found.resolved(tol), null == 0),
        found.floor,
        found.threshold,
        found.complete,
        found.products,
        found.method,
    )
