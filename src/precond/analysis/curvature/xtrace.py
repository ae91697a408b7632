r"""Trace and diagonal by leave-one-out: every probe is estimated on the complement of the sketch of all others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def xtrace(probes: Tensor, apply: Callable[[Tensor], Tensor]) -> tuple[float, float, Callable[[], tuple[Tensor, Tensor]]]:
    r"""(XTrace, its standard error, a function that makes XDiag of each probe (m, n) and standard errors (n,) of their mean) of a symmetric A.

    With Q_i an orthonormal basis of A(Ω without ω_i) and P_i = Q_iQ_iᵀ they are the means over the probes ω_i of
    tr Q_iᵀAQ_i + ω_iᵀ(I − P_i)A(I − P_i)ω_i and diag(P_iA) + ω_i ⊙ (I − P_i)Aω_i. One factorization AΩ = QR serves all, since
    P_i = Q(I − s_is_iᵀ)Qᵀ, s_i ∝ R⁻ᵀe_i. Where AΩ has not full rank any m − 1 of its columns span the same, and s_i = 0.

    The estimates share their sketches, so that their scatter says too little of the error of their mean. It is estimated by the
    jackknife, leaving out one probe more, which by the inequality of Efron & Stein is too large on average if anything.

    Args:
        probes: Ωᵀ, (m, n), m ≥ 3 random signs each.
        apply: rows of a matrix times A.

    References:
        Epperly, Tropp & Webber (2024), XTrace: making the most of every sample in stochastic trace estimation, sections 2 and 4;
        Efron & Stein (1981), The jackknife estimate of variance.
    """
    Y, W = apply(probes).double(), probes.double()
    Q, R = torch.linalg.qr(Y.T)
    U, sigma, Vh = torch.linalg.svd(R)
    # Products know the sketch to their own precision.
    known = sigma > len(W) * torch.finfo(probes.dtype).eps * sigma[0]
    if bool(known.all()):
        S = (U * (sigma[-1] / sigma)) @ Vh
        S /= torch.linalg.vector_norm(S, dim=0)
    else:
        Q, R = Q @ U[:, known], (sigma[:, None] * Vh)[known]
        S = torch.zeros_like(R)
    AQ = apply(Q.T.to(probes)).double().T
    T, C = Q.T @ AQ, Q.T @ W.T
    each, more = _left_out(T, C, R, S, (W * Y).sum(1))
    without = (more.sum(1) - more.diagonal()) / (len(W) - 1)  # the estimate without probe i

    def diagonals() -> tuple[Tensor, Tensor]:
        # diag(P_iA) = Σ_k (Q − Q s_i s_iᵀ)_k ⊙ (AQ)_k, and QᵀAω_i = R e_i.
        q, a, r = Q @ S, AQ @ S, (S * R).sum(0)
        found = (Q * AQ).sum(1) - (q * a).T + W * (Y - (Q @ (R - S * r)).T)
        return found, _jackknife(_diagonals_left_out(q, a, W, S, r))

    return float(each.mean()), float(_jackknife(without)), diagonals


def _jackknife(without: Tensor) -> Tensor:
    """√Σ_i (e_i − ē)² of estimates e_i, (m, …), that leave out one probe each."""
    return (without - without.mean(0)).square().sum(0).sqrt()


def _diagonals_left_out(q: Tensor, a: Tensor, W: Tensor, S: Tensor, r: Tensor) -> Tensor:
    r"""XDiag without probe i, (m, n), less what all of them have in common.

    It is the mean over j ≠ i of the estimates by j on the complement of s_i and s_j.
    Of the projection Π_ij on their span −diag(QΠ_ijQᵀA) + ω_j ⊙ QΠ_ijQᵀAω_j is left, where QᵀAω_j = R e_j is orthogonal to s_i; q = QS, a = AQS,
    r_j = s_jᵀR e_j.
    """
    G = S.T @ S
    w = _determinants(G).reciprocal().fill_diagonal_(0.0)
    c, ran = G * w, (W * r[:, None]).T
    found = q * ((a - ran) @ c - a * w.sum(0)) + a * (q @ c) - (q * (a - ran)) @ w
    return found.T / (len(W) - 1)


def _determinants(G: Tensor) -> Tensor:
    """1 − cos² of pairs of unit vectors; 1 of a vector and itself."""
    return (1 - G.square()).fill_diagonal_(1.0).clamp_min(torch.finfo(G.dtype).eps)


def _left_out(T: Tensor, C: Tensor, R: Tensor, S: Tensor, wAw: Tensor) -> tuple[Tensor, Tensor]:
    r"""Estimates by probe j, (m,), and (m, m) those by j where probe i is left out as well (of no meaning for i = j).

    All is in the coordinates of Q: T = QᵀAQ, C = QᵀΩ, R = QᵀAΩ. Outside the span of s_i and s_j, x = (I − ΠS_ij)Qᵀω_j.
    """
    TS, G = T @ S, S.T @ S
    B, SC, SR, STC = S.T @ TS, S.T @ C, S.T @ R, TS.T @ C  # [i, j]: s_iᵀ(…)_j
    CR, CTC = (C * R).sum(0), (C * (T @ C)).sum(0)
    g, b, c, r, t = (X.diagonal() for X in (G, B, SC, SR, STC))
    inside = T.trace() - b
    each = inside + wAw - 2 * (CR - c * r) + CTC - 2 * c * t + c * c * b
    if not bool(g.any()):
        return each, each.expand(len(each), -1)
    # The projection on the span of s_i and s_j: G_ij⁻¹ by hand, of unit vectors with cosine G_ij.
    det = _determinants(G)
    p, q = (SC - G * c) / det, (c - G * SC) / det  # coefficients along s_i and s_j
    taken = (b[:, None] + b[None, :] - 2 * G * B) / det
    xR = CR - p * SR - q * r
    xTx = CTC - 2 * (p * STC + q * t) + p * p * b[:, None] + 2 * p * q * B + q * q * b[None, :]
    return each, T.trace() - taken + wAw - 2 * xR + xTx
