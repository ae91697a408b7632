r"""The ends of the spectrum of a symmetric map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from precond.algebra.vec import Vec, unflatten
from precond.analysis.curvature.operators import as_map
from precond.analysis.curvature.spectrum import Method, Settings, Spectrum, spectrum, working
from precond.analysis.curvature.subspace import Subspace
from precond.analysis.curvature.symmetric import example_of

Which = Literal["largest", "smallest", "both"]
# The probability with which a copy may be overlooked.
_MISSED = 1e-4


@dataclass(frozen=True)
class Eigenvalues:
    """Eigenvalues with what is known of them.

    Attributes:
        values: λ, in float64: descending for ``"largest"``, ascending otherwise.
        vectors: their unit eigenvectors, aligned to the map's vectors.
        residuals: ‖A x − λ x‖ in exact arithmetic: an eigenvalue lies within it.
        errors: bounds of |λ̂ − λ|: the residual, or 2·residual²/gap where that is smaller, plus the floor; the gap is the one seen, and
            of eigenvalues that lie closer together than a few residuals one number in between may be all that was seen.
        resolved: which are accurate to ``tol`` relative to themselves, or null (of a magnitude below the threshold).
        floor: what rounding leaves undecided.
        threshold: magnitude up to which an eigenvalue counts as null.
        complete: whether no copy of a multiple eigenvalue is missing from the list: all eigenvalues were computed, or a fresh random
            vector, orthogonal to what was there, found no further copy (which misses one with a probability of at most 1e-4).
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
        """Whether every value is resolved, and no copy is missing."""
        return self.complete and bool(self.resolved.all())

    def __str__(self) -> str:
        lines = [
            f"{value:+.6e} ± {error:.0e}{'' if ok else '   not resolved'}"
            for value, error, ok in zip(self.values.tolist(), self.errors.tolist(), self.resolved.tolist(), strict=True)
        ]
        if bool((~self.resolved & (self.errors <= 2 * self.floor)).any()):
            lines.append(
                f"rounding of products alone leaves ±{self.floor:.0e}: compute in float64, hessian(objective.double())"
            )
        if not self.complete:
            lines.append("copies of multiple eigenvalues may be missing: raise max_products")
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

    Lanczos with full reorthogonalization (without it copies of one eigenvalue pass for several), both ends from one run. One run meets
    one vector of an eigenspace. So fresh runs, orthogonal to all that is there, follow until one finds no copy that belongs in the list;
    where no copy could change it (k = 1, or all values equal) there are none. ``max_products`` bounds all of them together.

    Args:
        map: a symmetric map, such as ``hessian(objective)`` or ``P.T @ hessian(objective) @ P``; a matrix; a SciPy ``LinearOperator``.
        k: how many; for ``"both"`` also (number of smallest, number of largest).
        which: ``"largest"``, ``"smallest"``, or ``"both"`` (all ascending).
        tol: relative accuracy.
        null_tol: magnitude, relative to max|λ|, up to which an eigenvalue counts as null; None: 16 times the dtype's ε.
        method: ``"dense"``, ``"lanczos"`` or ``"auto"``.
        max_products: where to stop, resolved or not.
        block: vectors at once.
        basis: vectors kept in memory; None: 1 GiB of them.
        deflate: a subspace whose eigenvalues are left out.
        seed: of the first vector.

    Returns:
        An :class:`Eigenvalues`, with vectors and error bounds.

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
        # Each end of the chain: it has found something that belongs in the list, or shows that nothing of it is there.
        if count < low + high or not all(end.absent or end.found for end in _searches(found, low, high, tol)):
            return False
        return bool(found.settled(tol)[_ends(count, low, high)].all())

    def missing(found: Spectrum) -> bool:
        return not all(end.absent for end in _searches(found, low, high, tol))

    found = spectrum(map, done, deflate, settings, "eigenvalues", missing)
    count = len(found.values)
    # Coordinates where the map is zero are eigenvectors too, which Lanczos left out.
    zeros = found.zeros if found.method == "lanczos" else 0
    if low + high > count + zeros:
        raise ValueError(
            f"eigenvalues: k asks for {low + high} eigenvalues, found {count + zeros}; ask for fewer, or raise max_products"
        )
    like = example_of(map, "eigenvalues")
    complete = found.complete or not missing(found)
    return _with_zeros(found, low, high, zeros, tol, like, which == "largest", complete)


@dataclass(frozen=True)
class _Search:
    """Whether copies are missing at one end of the spectrum, the values signed so that it is the upper end.

    Attributes:
        sought: τ, the smallest value of the list of which a further copy would change it.
        bottom: the other end of the spectrum.
        same: distance of two values that are not told apart.
        theta: the uppermost Ritz value of a chain from a random vector, orthogonal to all that is known.
        residual: ‖A x − θ x‖ of it, within the chain's space.
        steps: m, of the chain.
        room: n, the dimension of the space.
    """

    sought: float
    bottom: float
    same: float
    theta: float
    residual: float
    steps: int
    room: int

    @property
    def found(self) -> bool:
        """Whether the chain has one of the values of the list."""
        return self.theta >= self.sought - self.same

    @property
    def absent(self) -> bool:
        r"""Whether the chain would have met an eigenvalue ≥ τ but with a probability δ.

        A Krylov space of m dimensions has θ < λ_max − ε(λ_max − λ_min) with probability at most 1.648 √n exp(−√ε(2m − 1)). And the
        Ritz vector of θ has hardly less of an eigenvector above than the random vector, |q| <= s with probability s√n, and at most
        residual/(τ − θ).

        References:
            Kuczyński & Woźniakowski (1992), Estimating the largest eigenvalue by the power and Lanczos algorithms with a random start.
        """
        if self.found:
            return False
        gap = self.sought - self.theta
        share = min(gap / (self.sought - self.bottom), 1.0)
        chance = 1.648 * self.room**0.5 * math.exp(-(share**0.5) * (2 * self.steps - 1))
        return min(chance, self.residual / gap * self.room**0.5) <= _MISSED


def _searches(found: Spectrum, low: int, high: int, tol: float) -> list[_Search]:
    """The ends at which a copy could change the list of the ``low`` smallest and ``high`` largest."""
    out = []
    for count, sign in ((low, -1), (high, 1)):
        values, errors = (x if sign > 0 else x.flip(0) for x in (sign * found.values, found.errors + found.floor))
        listed, chain = values[len(values) - count :], found.chain
        if count < 2 or chain is None:
            continue
        null = torch.where(listed.abs().maximum(listed[0].abs()) <= found.threshold, 2 * found.threshold, 0.0)
        same = torch.maximum(tol * listed.abs() + (errors[-count:] + errors[-count]), null)
        apart = listed[listed - listed[0] > same]
        if not len(apart):
            continue
        # A chain that a restart has merged with the rest counts as one that has found something: another one follows.
        theta, residual = float(apart[0]), 0.0
        if chain.ritz is not None:
            at = int((sign * chain.ritz.values).argmax())
            theta, residual = sign * float(chain.ritz.values[at]), float(chain.ritz.residuals[at])
        bottom = float(values[0] - errors[0])
        out.append(_Search(float(apart[0]), bottom, float(same[-len(apart)]), theta, residual, chain.steps, chain.room))
    return out


def _ends(count: int, low: int, high: int) -> Tensor:
    """Positions of the ``low`` first and ``high`` last of ``count``."""
    return torch.tensor([*range(low), *range(count - high, count)], dtype=torch.long)


def _with_zeros(
    found: Spectrum, low: int, high: int, zeros: int, tol: float, like: Vec, descending: bool, complete: bool
) -> Eigenvalues:
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
    flat = working(like)
    return Eigenvalues(
        values[wanted],
        tuple(unflatten(row.to(flat), like) for row in rows[wanted]),
        joined(found.residuals.double(), null),
        joined(found.errors.double() + found.floor, null),
        joined(found.resolved(tol), null == 0),
        found.floor,
        found.threshold,
        complete,
        found.products,
        found.method,
    )
