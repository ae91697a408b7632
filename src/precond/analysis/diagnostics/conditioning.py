r"""κ of the mean of ĥĥᵀ, ĥ = [1; h] the extended inputs of a layer, in several coordinates of ŵ = [b; w].

By Theorem 3 a neuron's Hessian is H_e S H_eᵀ: with S = I this is what conditions it, and p = P z makes it Pᵀ(ĥĥᵀ)P.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from precond.algebra.maps import BlockDiagonal, LinearMap
from precond.algebra.vec import Vec
from precond.analysis.diagnostics.streaming import ROUNDINGS, InputStatistics
from precond.optim.inputs import Request
from precond.optim.preconditioners import Whitening

_PATCH = Request(conv="patch")
_NEURONS = 8  # of a layer, for which κ with the optimizer's P is computed
_WORK = 1e10  # entries that may be touched to find P of single neurons


@dataclass(frozen=True)
class Spectra:
    r"""Eigenvalues of the mean of ĥĥᵀ of a layer, descending, and of Pᵀ(ĥĥᵀ)P; those of the group with the largest κ.

    The rank counts singular values of H_e with columns of unit length above what rounding of the inputs leaves of zero, so that it does not
    depend on scales; κ is the ratio of the first and the last eigenvalue up to the rank. Directions beyond get no gradient.

    Attributes:
        values: by name: ``"raw"``; ``"centered"`` (h − μ); ``"scaled"`` (h/σ); ``"bnp"``, both; ``"whitened"``, with the damping
            that :class:`precond.Whitening` has; ``"optimizer"``, where its P is known: of the neuron with the median κ.
        rank: number of directions that inputs show.
        size: number of all.
    """

    values: dict[str, Tensor]
    rank: int
    size: int

    def kappa(self, name: str) -> float:
        """κ in some coordinates; NaN where it was not computed."""
        if name not in self.values or not len(self.values[name]):
            return float("nan")
        return float(self.values[name][0] / self.values[name][-1])


def spectra(layer: InputStatistics, neurons: Callable[[int], list[Tensor]] | None) -> tuple[int, Spectra]:
    """The group of a layer with the largest κ, and its spectra.

    Args:
        layer: what was gathered.
        neurons: a group's number ↦ P of some of its neurons, (n + 1, n + 1) each, or (n, n) without a bias.
    """
    found = [(_group(layer, k), k) for k in range(len(layer.R))]
    shown = [pair for pair in found if pair[0].rank] or found  # an expert may see nothing
    worst, k = max(shown, key=lambda pair: pair[0].kappa("raw"))
    maps = [] if neurons is None else neurons(k)
    if maps:
        R = layer.design(k)
        values = sorted((_values(R @ P, worst.rank) for P in maps), key=lambda v: float(v[0] / v[-1]))
        worst.values["optimizer"] = values[len(values) // 2]
    return k, worst


def _group(layer: InputStatistics, k: int) -> Spectra:
    R = layer.design(k)
    rank = directions(layer, k)
    mean, std = centers(layer, k)
    one, zero = torch.ones_like(std), torch.zeros_like(mean)
    scale = torch.where(std > 0, std, 1.0)
    maps = {"raw": (zero, one), "centered": (mean, one), "scaled": (zero, scale), "bnp": (mean, scale)}
    if not layer.biased:
        maps = {"raw": (zero, one), "scaled": (zero, scale), "bnp": (zero, scale)}
    values = {name: _values(_arrow(R, *parts, layer.biased), rank) for name, parts in maps.items()}
    values["whitened"] = _whitened(layer, k, rank)
    return Spectra(values, rank, R.shape[1])


def centers(layer: InputStatistics, k: int) -> tuple[Tensor, Tensor]:
    """(μ, σ) of each input of a group; σ is E[h²]^(1/2) without a bias; of its channel where a convolution has channels.

    A standard deviation that is rounding error of a constant is 0.
    """
    R, constant = layer.R[k], layer.constant[k]
    if layer.channel is not None and len(layer.channel.mean) == len(layer.R):
        mean, variance = (
            t[k].double().cpu().repeat_interleave(layer.kernel) for t in (layer.channel.mean, layer.channel.spread)
        )
        constant = constant.view(-1, layer.kernel).all(1).repeat_interleave(layer.kernel)
    else:
        mean, variance = R[0, 1:] / R[0, 0], R[1:, 1:].square().sum(0)
    if not layer.biased:
        return mean, (variance + mean.square()).sqrt()
    std = variance.sqrt()
    return mean, torch.where((std > ROUNDINGS * layer.epsilon * mean.abs()) & ~constant, std, 0.0)


def _arrow(R: Tensor, mean: Tensor, std: Tensor, biased: bool) -> Tensor:
    """R·U·diag(1, 1/σ), U = [[1, −μᵀ], [0, I]] (eq. 25)."""
    if not biased:
        return R / std
    return torch.cat([R[:, :1], (R[:, 1:] - R[:, :1] * mean) / std], dim=1)


def _values(R: Tensor, rank: int) -> Tensor:
    """The first eigenvalues of RᵀR, from singular values: squares would halve the digits."""
    return torch.linalg.svdvals(R)[:rank].square()


def _rank(unit: Tensor, epsilon: float) -> int:
    """How many singular values of a matrix of unit columns are more than rounding of its entries."""
    if not unit.numel():
        return 0
    floor = max(8 * epsilon, max(unit.shape) * torch.finfo(unit.dtype).eps)
    return int((torch.linalg.svdvals(unit) > floor).sum())


def coordinates(layer: InputStatistics, k: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """By name, X ↦ X·U for rows X of extended inputs or of gradients, p = U z: as they are, standardized, whitened."""
    mean, std = centers(layer, k)
    scale = torch.where(std > 0, std, 1.0)
    first = int(layer.biased)
    center = mean if layer.biased else torch.zeros_like(mean)
    R = _arrow(layer.R[k][:, 1 - first :], center, torch.ones_like(mean), layer.biased)[:, first:]
    # Inputs that are always 0 or, behind a bias, the same have no direction to whiten; 1 in their place leaves them alone.
    diagonal = Whitening().damping * layer.R[k][:, 1:].square().sum(0)
    L = torch.linalg.cholesky(R.T @ R + torch.diag(torch.where(diagonal > 0, diagonal, 1.0)))

    def whitened(X: Tensor) -> Tensor:
        X = _arrow(X, center, torch.ones_like(mean), layer.biased)
        return torch.cat([X[:, :first], torch.linalg.solve_triangular(L, X[:, first:].T, upper=False).T], dim=1)

    return {
        "raw": lambda X: X,
        "bnp": lambda X: _arrow(X, center, scale, layer.biased),
        "whitened": whitened,
    }


def gradient_rows(layer: InputStatistics, g: Vec) -> Tensor:
    """The gradient of a layer's neurons, (groups, rows, n + 1), [b; w] each; (groups, rows, n) without a bias."""
    layout = layer.site.layout(_PATCH)
    W = layout.view(g[0])
    return torch.cat([layout.column(g[1][layer.site.rows]), W], dim=-1) if len(g) > 1 else W


def directions(layer: InputStatistics, k: int) -> int:
    """The number of directions that extended inputs of a group show in its outputs, whatever their scales.

    Of centered ones it is one less than of those with a 1: what is rounding is told on inputs as they came.
    """
    R = layer.R[k] if layer.recentered else layer.design(k)
    lengths = torch.linalg.vector_norm(R, dim=0)
    return max(_rank(R[:, lengths > 0] / lengths[lengths > 0], layer.epsilon) - int(layer.recentered), 0)


def _whitened(layer: InputStatistics, k: int, rank: int) -> Tensor:
    r"""Of C_d^(−1/2) C C_d^(−1/2), C the covariance (E[hhᵀ] without a bias), C_d = C + ε·diag(E[h²]) with Whitening's ε."""
    R = layer.R[k]
    H = R[1:, 1:] if layer.biased else R[:, 1:]
    square = R[:, 1:].square().sum(0)
    live = square > 0
    H, square = H[:, live], square[live]
    L = torch.linalg.cholesky(H.T @ H + torch.diag(Whitening().damping * square))
    # Whitening knows its layer's inputs, and not what is behind the layer.
    shown = R[1:, 1:][:, live] if layer.recentered else H
    values = torch.linalg.svdvals(torch.linalg.solve_triangular(L, shown.T, upper=False)).square()
    if layer.biased and not layer.recentered:
        values = torch.cat([values, values.new_ones(1)])
    return values.sort(descending=True).values[:rank]


def with_bias(layer: InputStatistics, k: int) -> float:
    """κ of standardized inputs, had the layer a bias."""
    R = layer.R[k]
    H = R[1:, 1:]
    std = torch.linalg.vector_norm(H, dim=0)
    H = H[:, std > 0] / std[std > 0]
    values = torch.linalg.svdvals(H)[: _rank(H, layer.epsilon)].square()
    values = torch.cat([values, values.new_ones(1)])
    return float(values.max() / values.min())


def neurons_of(P: LinearMap, layer: InputStatistics, g: Vec) -> Callable[[int], list[Tensor]] | None:
    """P of some neurons of a layer, of those that have a gradient; None where P mixes neurons, or would take too long to find.

    Args:
        P: on (weight, bias) of the layer, or (weight,).
        layer: what was gathered.
        g: the gradient of the same.

    Returns:
        A group's number ↦ matrices on ŵ = [b; w], or on w.
    """
    like, site = g, layer.site
    layout = site.layout(_PATCH)
    view = layout.view(like[0])
    column = layout.column(like[1][site.rows]) if len(like) > 1 else None

    def apply(W: Tensor, b: Tensor | None) -> Tensor:
        """P on rows [b; w], (groups, rows, n + 1)."""
        v = [layout.back(W, like[0])]
        if b is not None:
            v.append(torch.zeros_like(like[1]))
            v[1][site.rows] = layout.back(b, like[1][site.rows])
        out = P.mv(tuple(v))
        W = layout.view(out[0])
        return W if b is None else torch.cat([layout.column(out[1][site.rows]), W], dim=-1)

    zero, none = torch.zeros_like(view), None if column is None else torch.zeros_like(column)
    groups, n = view.shape[0], view.shape[-1]
    at = torch.arange(groups)[:, None], shown_rows(view)
    if P.diagonal:
        d = apply(torch.ones_like(view), None if none is None else torch.ones_like(none))[at]
        return lambda k: [torch.diag(row).double().cpu() for row in d[k]]
    if n * view.numel() > _WORK or not _by_neuron(apply, zero, none):
        return None
    columns = [] if none is None else [apply(zero, torch.ones_like(none))[at]]
    for j in range(n):
        unit = zero.clone()
        unit[..., j] = 1
        columns.append(apply(unit, none)[at])
    stacked = torch.stack(columns, dim=-1)
    return lambda k: [matrix.double().cpu() for matrix in stacked[k]]


def shown_rows(view: Tensor) -> Tensor:
    """Which neurons of each group stand for all, by their gradient, (groups, rows, n); those without one only where there are no others."""
    alive = view.abs().sum(-1) > 0
    return torch.stack([_spread(alive[k]) for k in range(len(view))])


def _spread(alive: Tensor) -> Tensor:
    """Positions of a few neurons at equal distances."""
    found = alive.nonzero()[:, 0] if alive.any() else torch.arange(len(alive))
    return found[torch.linspace(0, len(found) - 1, min(_NEURONS, len(alive))).round().long()]


def _by_neuron(apply: Callable[[Tensor, Tensor | None], Tensor], zero: Tensor, none: Tensor | None) -> bool:
    """Whether P keeps a vector that is zero outside one neuron so."""
    W, b = zero.clone(), None if none is None else none.clone()
    W[0, 0] = torch.linspace(1, 2, zero.shape[-1])
    if b is not None:
        b[0, 0] = 1
    out = apply(W, b)
    out[0, 0] = 0
    return not out.any()


def restricted(P: LinearMap, index: Sequence[int]) -> LinearMap:
    """P on the tensors at some positions, the others standing still."""
    place = {i: k for k, i in enumerate(index)}
    if isinstance(P, BlockDiagonal):
        met = [(positions, part) for positions, part in P.blocks if place.keys() & set(positions)]
        if all(place.keys() >= set(positions) for positions, _ in met) and P.like is not None:
            blocks = [([place[i] for i in positions], part) for positions, part in met]
            return BlockDiagonal(blocks, tuple(P.like[i] for i in index), P.rest)
    return _Part(P, index)


class _Part(LinearMap):
    """EᵀPE, E the embedding of some tensors among all."""

    def __init__(self, map_: LinearMap, index: Sequence[int]):
        assert map_.like is not None
        self.map, self.index, self.diagonal, self.root = map_, tuple(index), map_.diagonal, map_.root
        self.whole = map_.like
        self.like = tuple(map_.like[i] for i in index)

    def _embedded(self, v: Vec) -> Vec:
        out = [torch.zeros_like(t) for t in self.whole]
        for i, t in zip(self.index, v, strict=True):
            out[i] = t
        return tuple(out)

    def mv(self, v: Vec) -> Vec:
        out = self.map.mv(self._embedded(v))
        return tuple(out[i] for i in self.index)

    def rmv(self, v: Vec) -> Vec:
        out = self.map.rmv(self._embedded(v))
        return tuple(out[i] for i in self.index)
