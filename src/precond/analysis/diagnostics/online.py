r"""Estimates that are cheap enough to be made while training runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from precond.algebra.maps import LinearMap
from precond.algebra.vec import Vec, flatten, unflatten
from precond.optim.inputs import Moments


@dataclass(frozen=True)
class TopEigenpair:
    """An estimate of the largest eigenvalue of a symmetric map.

    Attributes:
        value: λ̂, a lower bound of λ_max.
        residual: ‖A u − λ̂ u‖: some eigenvalue lies within it.
        vector: u, the next start.
    """

    value: float
    residual: float
    vector: Vec


def top_eigenpair(A: LinearMap, start: Vec, products: int) -> TopEigenpair:
    """The largest Ritz value of ``products`` steps of Lanczos with full orthogonalization.

    From the last measurement's vector a few steps are enough, since the steepest direction turns slowly.

    Args:
        A: a symmetric map.
        start: any vector, not 0.
        products: with A, at least one.
    """
    like = start
    q = flatten(start)
    Q = [q / torch.linalg.vector_norm(q)]
    AQ: list[Tensor] = []
    for _ in range(products):
        AQ.append(flatten(A.mv(unflatten(Q[-1], like))).to(q))
        w = AQ[-1]
        basis = torch.stack(Q)
        for _ in range(2):
            w = w - basis.T @ (basis @ w)
        length = torch.linalg.vector_norm(w)
        if len(AQ) == products or float(length) <= torch.finfo(w.dtype).eps * float(torch.linalg.vector_norm(AQ[-1])):
            break
        Q.append(w / length)
    V, AV = torch.stack(Q[: len(AQ)]), torch.stack(AQ)
    T = (V @ AV.T).double()
    theta, S = torch.linalg.eigh((T + T.T) / 2)
    s = S[:, -1].to(V)
    u, value = s @ V, float(theta[-1])
    return TopEigenpair(value, float(torch.linalg.vector_norm(s @ AV - value * u)), unflatten(u, like))


def kappa_of_moments(moments: Moments, biased: bool) -> float:
    r"""κ of the mean of ĥĥᵀ with the covariances of different inputs dropped: what means and scales alone do to it.

    The matrix is diag(0, σ²) + v vᵀ with v = [1; μ] (without a bias diag(σ²) + μμᵀ), so that its ends are roots of the secular
    equation 1 + Σ v_i²/(d_i − λ) = 0. Directions in which it is 0 are left out. Of several groups, the largest κ.

    Args:
        moments: mean and variance, (groups, n).
        biased: whether a bias goes with the inputs.
    """
    mean, variance = moments.mean.double().cpu(), moments.spread.double().cpu()
    rounding = 8 * torch.finfo(moments.mean.dtype).eps * mean.abs()
    d = torch.where(variance > rounding.square(), variance, 0.0)
    v = mean.square()
    if biased:
        d, v = (
            torch.cat([t, column], dim=1) for t, column in ((d, torch.zeros_like(d[:, :1])), (v, torch.ones_like(d[:, :1])))
        )
    # All entries with d = 0 are one: a direction along v, and null ones.
    fixed = (torch.where(d == 0, v, 0)).sum(1, keepdim=True)
    v = torch.cat([fixed, torch.where(d > 0, v, 0)], dim=1)
    d = torch.cat([torch.zeros_like(fixed), d], dim=1)
    absent = torch.cat([fixed == 0, d[:, 1:] == 0], dim=1)
    high = _root(d, v, torch.where(absent, -torch.inf, d).amax(1), v.sum(1))
    order = torch.where(absent, torch.inf, d).sort(1).values
    first = order[:, 0]
    gap = (order[:, 1] - first) if order.shape[1] > 1 else torch.full_like(first, torch.inf)
    low = _root(d, v, first, torch.minimum(gap, v.sum(1)))
    kappas = (high / low)[torch.isfinite(first)]
    return float(kappas.max()) if kappas.numel() else float("nan")


def _root(d: Tensor, v: Tensor, above: Tensor, width: Tensor) -> Tensor:
    """The root of 1 + Σ v/(d − λ) with t = λ − ``above`` in (0, ``width``], one per group.

    ``above`` is one of the d, whose v is w; with φ(t) = 1 + the sum over the others it is the root of tφ(t) − w, found by Newton's method
    within a bracket.
    """
    shifted = d - above[:, None]
    pole = shifted == 0
    w = torch.where(pole, v, 0).sum(1)
    v = torch.where(pole, 0, v)
    shifted = torch.where(v > 0, shifted, torch.inf)
    low, high = torch.zeros_like(width), width
    t = high / 2
    for _ in range(100):
        gap = shifted - t[:, None]
        terms = v / gap
        phi = 1 + terms.sum(1)
        value = t * phi - w
        low, high = torch.where(value < 0, t, low), torch.where(value < 0, high, t)
        new = t - value / (phi + t * (terms / gap).sum(1))
        new = torch.where((new > low) & (new < high), new, (low + high) / 2)
        if bool(((new - t).abs() <= 1e-14 * new).all()):
            break
        t = new
    return above + t
