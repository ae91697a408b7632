r"""The density of all eigenvalues, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from precond.algebra.vec import flatten
from precond.analysis.curvature.lanczos import Lanczos, asymmetry_allowed
from precond.analysis.curvature.operators import as_map
from precond.analysis.curvature.spectrum import SMALL, Method, Settings, row_product, spectrum, working
from precond.analysis.curvature.subspace import Coordinates, Subspace
from precond.analysis.curvature.symmetric import example_of, length


class Count(tuple[float, float]):
    """An estimated number of eigenvalues, and its error: the pair (value, error).

    Attributes:
        value: the number.
        sampling: standard error: of so few random probes.
        resolution: bound of what the steps leave undecided: eigenvalues that may lie on either side of an end of the interval.
        error: ``sampling + resolution``.
    """

    value: float
    sampling: float
    resolution: float
    error: float

    def __new__(cls, value: float, sampling: float, resolution: float) -> Count:
        out = super().__new__(cls, (value, sampling + resolution))
        out.value, out.sampling, out.resolution, out.error = value, sampling, resolution, sampling + resolution
        return out


@dataclass(frozen=True)
class SpectralDensity:
    r"""φ(t) = (1/n) Σ_i δ(t − λ_i), estimated by one quadrature Σ_k w_k δ(t − θ_k) for each probe.

    Attributes:
        nodes: θ, (probes, k), float64; all eigenvalues in one row where ``exact``.
        weights: w, (probes, k), each row sums to 1.
        n: number of eigenvalues that the density is of (without the deflated ones).
        exact: whether the nodes are the eigenvalues.
        products: matrix–vector products used.
        recurrence: α and β of the three-term recurrence of each probe, (probes, k, 2); None where ``exact``.
    """

    nodes: Tensor
    weights: Tensor
    n: int
    exact: bool
    products: int
    recurrence: Tensor | None = None

    def mean(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over all eigenvalues of a function whose values at the nodes are (probes, k, …), and its standard error, (…)."""
        weights = self.weights.reshape(*self.weights.shape, *(1,) * (values.ndim - 2))
        each = (weights * values).sum(1)
        if self.exact:
            return each[0], torch.zeros_like(each[0])
        return each.mean(0), each.std(0) / len(each) ** 0.5

    def smoothed(self, t: Tensor, width: float | None = None) -> tuple[Tensor, Tensor]:
        """The density under a Gaussian of standard deviation ``width``, at points t, (m,), and its standard error over the
        probes.

        The width is the resolution: it should be more than the distance of neighboring nodes, which the error does not know of.

        Args:
            t: where, (m,).
            width: None: a fiftieth of the spectrum's range.

        Raises:
            ValueError: for a width that is not positive.
        """
        s = self._width if width is None else width
        if not s > 0:
            raise ValueError(f"smoothed: width must be positive, got {width!r}")
        z = (t.double().cpu() - self.nodes[..., None]) / s
        return self.mean(torch.exp(-z.square() / 2) / (s * (2 * torch.pi) ** 0.5))

    def count(self, low: float, high: float) -> Count:
        r"""The number of eigenvalues in [low, high], and its error, in two parts.

        All that k steps tell of a probe's measure μ is that μ((−∞, x)) and μ((−∞, x]) lie between the weights of the nodes left of x and
        these with that of x, in the quadrature that has x for a node (Chebyshev, Markov, Stieltjes). The middle is the estimate, half
        of x's weight the resolution. The share of a random direction in m of n dimensions has the variance 2m(n − m)/n³, about; the
        sampling error is this, or the scatter of the probes where that is larger.

        Args:
            low: where the interval begins, may be −∞.
            high: where it ends, may be ∞.

        References:
            Golub & Meurant (2010), Matrices, moments and quadrature; Szegő (1939), Orthogonal polynomials, 3.41.
        """
        if self.recurrence is None:
            return Count(float(((self.nodes >= low) & (self.nodes <= high)).sum()), 0.0, 0.0)
        pairs = [[_below(r, x) for x in (low, high)] for r in self.recurrence]
        ends = torch.tensor(pairs, dtype=torch.float64)  # (probes, 2, (middle, half width))
        shares = ends[:, 1, 0] - ends[:, 0, 0]
        share = min(max(float(shares.mean()), 0.0), 1.0)
        own = (2 * share * (1 - share) / self.n) ** 0.5
        sampling = self.n * max(float(shares.std()), own) / len(shares) ** 0.5
        return Count(self.n * share, sampling, self.n * float(ends[:, :, 1].sum(1).mean()))

    def grid(self, points: int = 400, width: float | None = None) -> Tensor:
        """Points t for :meth:`smoothed` that cover the spectrum and three widths beyond."""
        s = self._width if width is None else width
        return torch.linspace(float(self.nodes.min()) - 3 * s, float(self.nodes.max()) + 3 * s, points, dtype=torch.float64)

    @property
    def _width(self) -> float:
        span = float(self.nodes.max() - self.nodes.min())
        return span / 50 if span > 0 else max(abs(float(self.nodes.max())), 1.0) / 50

    def __str__(self) -> str:
        ends = f"{float(self.nodes.min()):+.4e} to {float(self.nodes.max()):+.4e}"
        if self.exact:
            return f"{self.n} eigenvalues from {ends}; {self.products} products, dense"
        trace, error = (self.n * float(x) for x in self.mean(self.nodes))
        return (
            f"density of {self.n} eigenvalues from {ends}, trace {trace:.4e} ± {error:.0e}; "
            f"{len(self.nodes)} probes × {self.nodes.shape[1]} nodes, {self.products} products"
        )


def spectral_density(
    map: Any,
    *,
    probes: int = 8,
    steps: int = 64,
    method: Method = "auto",
    deflate: Subspace | None = None,
    seed: int = 0,
) -> SpectralDensity:
    r"""The density of the eigenvalues of a symmetric map, with error bars.

    vᵀf(A)v = Σ_k w_k f(θ_k) for polynomials f of degree < 2·steps, θ and the squared first components w from a Lanczos run (fully
    reorthogonalized) that starts at v; for random directions v the mean is tr f(A)/n.

    Args:
        map: a symmetric map, a matrix, or a SciPy ``LinearOperator``.
        probes: independent random directions; error bars are over these.
        steps: Lanczos steps for each.
        method: ``"dense"`` (all eigenvalues), ``"lanczos"``, or ``"auto"``: dense up to 512 entries.
        deflate: a subspace that is left out.
        seed: of the directions.

    Returns:
        Nodes and weights; ``smoothed(t, width)`` gives the density as a curve, ``count(low, high)`` the number of eigenvalues.

    Raises:
        NotSymmetric: for a map that is not symmetric.
        ValueError: for fewer than two probes or steps.

    Example:
        >>> density = spectral_density(torch.diag(torch.tensor([0.0, 0.0, 1.0, 3.0])))
        >>> density.count(0.5, 4.0)
        (2.0, 0.0)

    References:
        Golub & Meurant (2010), Matrices, moments and quadrature; Ubaru, Chen & Saad (2017); Ghorbani, Krishnan & Xiao (2019).
    """
    map = as_map(map, "spectral_density")
    for name, value, least in (("probes", probes, 2), ("steps", steps, 2)):
        if not (isinstance(value, int) and value >= least):
            raise ValueError(f"spectral_density: {name} must be a whole number >= {least}, got {value!r}")
    like = example_of(map, "spectral_density")
    n = length(like)
    if method == "dense" or (method == "auto" and n <= SMALL):
        values = spectrum(map, lambda s: True, deflate, Settings(method="dense", vectors=False), "spectral_density").values
        return SpectralDensity(
            values[None], torch.full((1, len(values)), 1 / len(values), dtype=torch.float64), len(values), True, n
        )
    flat = working(like)
    generator = torch.Generator().manual_seed(seed)
    product = row_product(map, like)
    asymmetry = asymmetry_allowed(flatten(like).dtype)
    outside = deflate if deflate is not None else Coordinates(torch.ones(n, dtype=torch.bool, device=flat.device))
    room = n - outside.dim
    nodes, weights, recurrence, products = [], [], [], 0
    for _ in range(probes):
        start = outside.removed(torch.randn(1, n, generator=generator, dtype=torch.float64).to(flat))
        run = Lanczos(
            lambda rows: outside.removed(product(rows)), start, room, steps + 2, generator, outside.removed, asymmetry
        )
        while run.size < min(steps, room):
            run.step()
        ritz = run.ritz()
        nodes.append(ritz.values)
        weights.append(ritz.coordinates[0].square())
        recurrence.append(run.recurrence())
        products += run.products
    return SpectralDensity(torch.stack(nodes), torch.stack(weights), room, False, products, torch.stack(recurrence))


def _below(recurrence: Tensor, x: float) -> tuple[float, float]:
    """The part of a probe's measure below x: the middle of its bounds, and half their distance."""
    if math.isinf(x):
        return float(x > 0), 0.0
    alpha, beta = recurrence.unbind(1)
    scale = float(recurrence.abs().max()) or 1.0
    # Where β is as good as zero the measure is known, up to what rounding makes of x.
    none = 10 * torch.finfo(torch.float64).eps * scale
    k = int(torch.cat([beta <= none, torch.ones(1, dtype=torch.bool)]).nonzero()[0, 0]) + 1
    alpha, beta = alpha[:k], beta[:k].clamp_min(none)
    pivot, left = 0.0, 0
    for i, a in enumerate((alpha - x).tolist()):
        pivot = a - (float(beta[i - 1]) ** 2 / pivot if i else 0.0) or none
        left += pivot < 0
    # The quadrature with a node at x (Golub): the last entry makes the last pivot zero. Beyond 1e6 a node is as good as at infinity.
    end = x + max(min(float(beta[-1]) ** 2 / pivot, 1e6 * scale), -1e6 * scale)
    T = torch.cat([alpha, alpha.new_tensor([end])]).diag() + beta.diag(1) + beta.diag(-1)
    weights = torch.linalg.eigh(T).eigenvectors[0].square()
    half = float(weights[left]) / 2
    return float(weights[:left].sum()) + half, half
