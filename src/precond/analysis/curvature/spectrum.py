r"""The part of a symmetric map's spectrum that was computed, densely or by Lanczos, with what is known of its errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from precond.algebra.maps import LinearMap
from precond.algebra.vec import Vec, flatten, unflatten
from precond.analysis.curvature.errors import NotSymmetric
from precond.analysis.curvature.lanczos import _SYMMETRIC, Lanczos, Ritz, asymmetry_allowed
from precond.analysis.curvature.subspace import Coordinates, Subspace
from precond.analysis.curvature.symmetric import apply_block, dense, example_of, from_rows, length, to_rows

Method = Literal["auto", "dense", "lanczos"]
# Below this many entries all products cost little more than those of a Lanczos run, and give all eigenvalues.
SMALL = 512
_BASIS_BYTES = 2**30


@dataclass(frozen=True)
class Settings:
    """How eigenvalues are computed.

    Attributes:
        tol: relative accuracy at which an eigenvalue is called resolved.
        null_tol: eigenvalues of a magnitude up to ``null_tol``·max|λ| count as null; None: 16 times the dtype's ε.
        method: ``"dense"`` (all eigenvalues, n products), ``"lanczos"``, or ``"auto"``: dense up to 512 entries.
        max_products: where Lanczos stops, resolved or not.
        block: vectors that go through at once; multiplicities up to it are found.
        basis: vectors kept in memory, None: as many as fit in 1 GiB.
        seed: of the first vectors.
        vectors: whether eigenvectors will be asked for (without them the dense path takes a fifth of the time).
    """

    tol: float = 1e-3
    null_tol: float | None = None
    method: Method = "auto"
    max_products: int = 1000
    block: int = 1
    basis: int | None = None
    seed: int = 0
    vectors: bool = True

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method must be one of {', '.join(map(repr, get_args(Method)))}, got {self.method!r}")
        for name in ("tol", "null_tol"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} must lie in (0, 1), got {value!r}; usual values are 1e-3 to 1e-8")
        for name in ("max_products", "block"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
        if self.basis is not None and self.basis < 4 * self.block + 8:
            raise ValueError(f"basis must be at least 4·block + 8 = {4 * self.block + 8}, got {self.basis!r}")


@dataclass(frozen=True)
class Chain:
    """What the last fresh start has found: the ends of A on the complement of all that had been there.

    Attributes:
        ritz: Ritz values and residuals there; None after a restart, which merges it with the rest.
        steps: its length.
        room: dimension of the space.
    """

    ritz: Ritz | None
    steps: int
    room: int


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues in ascending order: all of them, or both ends' approximations.

    Attributes:
        values: θ.
        residuals: ‖A x − θ x‖.
        errors: bounds of |θ − λ| in exact arithmetic.
        rows: eigenvectors at given positions, as rows (k, n).
        complete: whether these are all eigenvalues outside what was deflated.
        floor: what rounding leaves undecided: the measured asymmetry of products, and a quarter of ε·max|λ|.
        threshold: magnitude up to which an eigenvalue counts as null.
        zeros: coordinates at which the map is exactly zero.
        deflated: dimension of the subspace that the caller took out.
        products: matrix–vector products used.
        method: ``"dense"`` or ``"lanczos"``.
        weights: squared components of the random first vector along the Ritz vectors, sum 1; None: not known (after a restart).
        kept: False at coordinates where the map is exactly zero and which Lanczos left out; None: nowhere.
        chain: what the last fresh start has found; None: all eigenvalues were computed.
    """

    values: Tensor
    residuals: Tensor
    errors: Tensor
    rows: Callable[[Tensor], Tensor]
    complete: bool
    floor: float
    threshold: float
    zeros: int
    deflated: int
    products: int
    method: str
    kept: Tensor | None = None
    weights: Tensor | None = None
    chain: Chain | None = None

    def resolved(self, tol: float) -> Tensor:
        """Which values are accurate to ``tol`` relative to themselves, or known to be null."""
        total = self.errors + self.floor
        return (total <= tol * self.values.abs()) | (self.values.abs() + total <= self.threshold)

    def settled(self, tol: float) -> Tensor:
        """Which values further products would not improve to any purpose: resolved, or at the floor."""
        size = self.values.abs()
        null = torch.tensor(max(self.floor, self.threshold / 4), dtype=size.dtype)
        return self.errors <= torch.where(size <= self.threshold, null, (tol * size - self.floor).clamp_min(self.floor))


def spectrum(
    map: LinearMap,
    done: Callable[[Spectrum], bool],
    deflate: Subspace | None,
    settings: Settings,
    caller: str,
    fresh: Callable[[Spectrum], bool] = lambda found: False,
) -> Spectrum:
    """The spectrum of a symmetric map outside a subspace, computed until ``done``, exhausted or out of products.

    Where it is done and ``fresh`` holds, Lanczos goes on from a fresh vector until it is done anew.
    """
    like = example_of(map, caller)
    n = length(like)
    if n == 0:
        raise ValueError(f"{caller}: the map acts on no entries; choose parameters")
    if settings.method == "dense" or (settings.method == "auto" and n <= SMALL):
        return _dense(map, deflate, settings, like)
    return _lanczos(map, done, fresh, deflate, settings, like)


def working(like: Vec) -> Tensor:
    """Zeros (n,) in the precision of the vectors around the products: the map's own, at least float32."""
    flat = flatten(like)
    return torch.zeros_like(flat, dtype=torch.promote_types(flat.dtype, torch.float32))


def row_product(map: LinearMap, like: Vec) -> Callable[[Tensor], Tensor]:
    """A on each row of a matrix (k, n), in the map's precision, refused where it is not finite."""
    dtype = flatten(like).dtype

    def product(rows: Tensor) -> Tensor:
        if len(rows) == 1:
            out = flatten(map.mv(unflatten(rows[0].to(dtype), like)))[None]
        else:
            out = to_rows(apply_block(map, from_rows(rows.to(dtype), like)))
        out = out.to(rows)
        if not torch.isfinite(out).all():
            raise ValueError("a product of the map is not finite; look for divergence or bad data")
        return out

    return product


def _threshold(settings: Settings, dtype: torch.dtype, scale: float, floor: float) -> float:
    relative = 16 * torch.finfo(dtype).eps if settings.null_tol is None else settings.null_tol
    return max(relative * scale, floor)


def _dense(map: LinearMap, deflate: Subspace | None, settings: Settings, like: Vec) -> Spectrum:
    dtype = flatten(like).dtype
    A = dense(map)
    if not torch.isfinite(A).all():
        raise ValueError("the map has entries that are not finite; look for divergence or bad data")
    A = A.double()
    asymmetry = float(torch.linalg.matrix_norm(A - A.T)) / 2
    norm = float(torch.linalg.matrix_norm(A))
    if asymmetry > asymmetry_allowed(dtype) * norm:
        raise NotSymmetric(f"the map is not symmetric: ‖A − Aᵀ‖/2 is {asymmetry:.1e} at a norm of {norm:.1e}; {_SYMMETRIC}")
    A = (A + A.T) / 2
    if deflate is not None and deflate.dim:
        removed = lambda X: deflate.removed(X.to(working(like))).double()  # noqa: E731
        # The subspace's own eigenvalues are moved beyond all others, and cut off there.
        inside = removed(torch.eye(len(A), dtype=A.dtype, device=A.device))
        beyond = 2 * float(torch.linalg.matrix_norm(A)) + 1
        A = inside @ A @ inside.T + beyond * (torch.eye(len(A), dtype=A.dtype, device=A.device) - (inside + inside.T) / 2)
        A = (A + A.T) / 2
    theta, X = torch.linalg.eigh(A) if settings.vectors else (torch.linalg.eigvalsh(A), A[:, :0])
    m = len(theta) - (deflate.dim if deflate is not None else 0)
    theta = theta[:m].cpu()
    scale = float(theta.abs().max()) if m else 0.0
    floor = max(asymmetry / len(A) ** 0.5, torch.finfo(dtype).eps / 4 * scale)
    none = torch.zeros_like(theta)
    return Spectrum(
        theta, none, none, lambda at: X[:, at.to(X.device)].T.to(working(like)), True, floor, _threshold(settings, dtype, scale, floor),
        0, deflate.dim if deflate is not None else 0, len(A), "dense",
    )  # fmt: skip


def _lanczos(
    map: LinearMap,
    done: Callable[[Spectrum], bool],
    fresh: Callable[[Spectrum], bool],
    deflate: Subspace | None,
    settings: Settings,
    like: Vec,
) -> Spectrum:
    flat = working(like)
    dtype, n = flatten(like).dtype, flat.numel()
    generator = torch.Generator().manual_seed(settings.seed)
    random = lambda k: torch.randn(k, n, generator=generator, dtype=torch.float64).to(flat)  # noqa: E731

    product = row_product(map, like)
    # Rows of the map that are exactly zero (inputs that are always 0, units that never fire) are null vectors one knows.
    out = Coordinates(product(random(1))[0] != 0, deflate)
    room = n - out.dim
    basis = settings.basis or max(4 * settings.block + 8, min(_BASIS_BYTES // (n * flat.element_size()), 4096))
    theta = torch.zeros(0, dtype=torch.float64)
    if room <= 0:
        return Spectrum(
            theta, theta, theta, lambda at: flat.new_zeros(0, n), True, 0.0, 0.0, out.zeros, out.dim - out.zeros, 1, "lanczos",
            out.kept,
        )  # fmt: skip
    run = Lanczos(
        lambda rows: out.removed(product(rows)),
        out.removed(random(min(settings.block, room))),
        room,
        basis,
        generator,
        out.removed,
        asymmetry_allowed(dtype),
    )
    check, before, every = 0, False, 16
    while True:
        run.step()
        last = run.exhausted or run.products + settings.block + 1 > settings.max_products
        if run.size >= check or last:
            found = _found(run, settings, dtype, out)
            # Twice: a Ritz value may come to rest at the second eigenvalue before it feels the first.
            now = done(found)
            confirmed = now and before
            if last or (confirmed and not fresh(found)):
                return found
            if confirmed:
                if run.size > basis // 2:
                    run.restart(_kept(found, basis // 4))
                run.fresh(settings.block)
                every = 32
            wait = max(4, run.size // 8) if now and not before else run.size // every
            check, before = run.size + max(settings.block, wait), now
        if run.size + 2 * settings.block > basis:
            run.restart(_kept(_found(run, settings, dtype, out), basis // 4))
            check = 0


def _kept(found: Spectrum, ends: int) -> Tensor:
    """Positions of the values at both ends; of many null ones, beside which nothing else would have room, half as many."""
    count = len(found.values)
    null = (found.values.abs() <= found.threshold).nonzero()[:, 0].tolist()
    rest = [i for i in range(count) if i not in set(null[ends // 2 :])]
    return torch.tensor(sorted({*rest[:ends], *rest[-ends:]}))


def _found(run: Lanczos, settings: Settings, dtype: torch.dtype, out: Coordinates) -> Spectrum:
    ritz = run.ritz()
    scale = float(ritz.values.abs().max())
    floor = max(run.noise, torch.finfo(dtype).eps / 4 * scale)
    return Spectrum(
        ritz.values, ritz.residuals, ritz.errors, lambda at: run.vectors(ritz.coordinates[:, at]), run.exhausted, floor,
        _threshold(settings, dtype, scale, floor), out.zeros, out.dim - out.zeros, run.products + 1, "lanczos", out.kept,
        ritz.coordinates[: settings.block].square().mean(0) if run.products == run.size else None, Chain(run.chain(), run.length, run.room),
    )  # fmt: skip
