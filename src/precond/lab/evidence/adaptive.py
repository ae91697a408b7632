"""Adaptive learning rates as diagonal preconditioners."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from precond.analysis.curvature import condition_number, hessian
from precond.lab.evidence.problems import (
    Problem,
    extended,
    logistic,
    random,
    raw,
    remembered,
    seeded,
    tanh_network,
)
from precond.lab.evidence.statement import Bars, Chapter, Finding, Line, Plot
from precond.optim.optimizer import PreconditionedGD
from precond.optim.preconditioners import RMS, Fixed

CHAPTER = Chapter("Adaptive learning rates")


def _kappa(A: Tensor) -> float:
    s = torch.linalg.svdvals(A)
    return float(s[0] / s[-1])


def _best_scaling(A: Tensor) -> float:
    """κ(D₀A) at the best diagonal D₀ that a search finds."""
    log_d = (-A.norm(dim=1).log()).requires_grad_()
    search = torch.optim.LBFGS([log_d], max_iter=300, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def closure() -> Tensor:
        search.zero_grad()
        s = torch.linalg.svdvals(log_d.exp()[:, None] * A)
        loss = s[0].log() - s[-1].log()
        loss.backward()
        return loss

    search.step(closure)
    with torch.no_grad():
        return _kappa(log_d.exp()[:, None] * A)


def _equal_rows(A: Tensor) -> Tensor:
    return A / A.norm(dim=1, keepdim=True)


@remembered
def unscaled() -> tuple[Problem, Tensor]:
    """Logistic regression on features whose scales spread: each raw feature over the root mean square of all, at its minimum."""
    x, y = raw("wine")
    # Thirteen scales from 1 to 1000 without the extremes of the raw data, with which no gradient method arrives anywhere.
    x = (x - x.mean(0)) / x.std(0, correction=0) * torch.logspace(-0.75, 0.75, x.shape[1], dtype=torch.float64)
    problem = Problem(seeded(lambda: nn.Linear(x.shape[1], 1), 0), logistic, x, (y == 0).double(), 1e-3)
    return problem, problem.minimum()


@CHAPTER.statement(
    "equal-rows", "Theorem 2", "Scaling rows to equal norms is within √m of the best diagonal scaling: the Hessian."
)
def _van_der_sluis_hessian() -> Finding:
    problem, p_star = unscaled()
    H = hessian(problem.objective()).to_dense()
    best = _best_scaling(H)
    figure = Bars("κ", (("Hessian", _kappa(H)), ("rows of equal norm", _kappa(_equal_rows(H))), ("best scaling found", best)))
    return Finding(
        "κ(DH) over the best κ(D₀H) found",
        len(p_star) ** 0.5,
        _kappa(_equal_rows(H)) / best,
        0.0,
        "≤",
        on="logistic regression, scaled wine",
        figure=figure,
    )


@CHAPTER.statement(
    "equal-columns",
    "Theorem 2",
    "The same for the features of data, which are the columns of Aᵀ.",
)
def _van_der_sluis_data() -> Finding:
    worst, bound, shown = 0.0, 0.0, ""
    for name in ("wine", "breast cancer"):
        A = extended(raw(name)[0])
        ratio = _kappa(_equal_rows(A)) / _best_scaling(_equal_rows(A))
        if ratio / len(A) ** 0.5 > (worst / bound if bound else 0):
            worst, bound, shown = ratio, len(A) ** 0.5, name
    return Finding(
        "κ at equal norms over the best found, the worse of two sets",
        bound,
        worst,
        0.0,
        "≤",
        on=f"X_e of raw wine and breast cancer; {shown} shown",
    )


@CHAPTER.statement(
    "inverse-rows",
    "after Theorem 2",
    "M = diag(m) with m_i the inverse of the norm of the i-th row of H improves κ.",
    "Printed: m_i of the magnitude of the row. It is its inverse, as the rest of the section has it; the magnitude itself makes κ worse.",
)
def _inverse_rows() -> Finding:
    problem, _ = unscaled()
    H = hessian(problem.objective()).to_dense()
    norms = H.norm(dim=1)
    kappa = lambda m: condition_number(m.sqrt()[:, None] * H * m.sqrt()).kappa  # noqa: E731
    before, after, printed = condition_number(H).kappa, kappa(1 / norms), kappa(norms)
    figure = Bars("κ(PᵀHP)", (("H", before), ("m_i = 1/‖h_i‖", after), ("m_i = ‖h_i‖, as printed", printed)))
    return Finding("κ(PᵀHP)", before, after, 0.0, "≤", printed=printed, on="logistic regression, scaled wine", figure=figure)


def _gradients_around(problem: Problem, p_star: Tensor, count: int) -> Tensor:
    """∇L at points p* + δ, δ a small random vector: (count, n)."""
    delta = 1e-3 * random(count, len(p_star), seed=4)
    return torch.stack([problem.gradient(p_star + d) for d in delta])


def _spread(x: Tensor) -> float:
    return float(x.max() / x.min())


@CHAPTER.statement("gradient-rows", "Taylor expansion", "|g_i|, averaged over many points near p*, is proportional to ‖h_i‖.")
def _rows() -> Finding:
    problem, p_star = unscaled()
    norms = hessian(problem.objective()).to_dense().norm(dim=1)
    g = _gradients_around(problem, p_star, 2000)
    counts = [2**k for k in range(11)]
    spreads = [_spread(g[:n].square().mean(0).sqrt() / norms) for n in counts]
    figure = Plot(
        "points averaged over",
        "largest over smallest |g_i|/‖h_i‖",
        (Line("measured", tuple(map(float, counts)), tuple(spreads), True),),
        "xy",
    )
    ratio = g.square().mean(0).sqrt() / norms
    return Finding(
        "largest over smallest of ḡ_i/‖h_i‖, 2000 points",
        1.0,
        _spread(ratio),
        0.2,
        on="logistic regression, scaled wine",
        figure=figure,
    )


@CHAPTER.statement(
    "gradient-iterates", "Taylor expansion", "The same average over the iterates of a training tells the row norms apart."
)
def _rows_of_iterates() -> Finding:
    problem, p_star = unscaled()
    norms = hessian(problem.objective()).to_dense().norm(dim=1)
    problem.set(torch.zeros_like(p_star))
    H = problem.hessian(p_star)
    points = problem.iterates(
        PreconditionedGD(problem.model, float(1 / torch.linalg.eigvalsh(H)[-1]), preconditioner=Fixed()), 500
    )
    problem.set(p_star)
    mean = torch.stack([problem.gradient(p) for p in points]).square().mean(0).sqrt()
    pair = torch.stack([mean.log(), norms.log()])
    line = tuple(float(x) for x in norms)
    figure = Plot("‖h_i‖", "ḡ_i over 500 iterates", (Line("parameters", line, tuple(mean.tolist()), True),), "xy")
    return Finding(
        "correlation of log ḡ_i with log ‖h_i‖",
        0.7,
        float(torch.corrcoef(pair)[0, 1]),
        0.0,
        "≥",
        on="GD from 0, logistic regression, scaled wine",
        figure=figure,
    )


@CHAPTER.statement(
    "single-gradient", "after the expansion", "A single gradient is no estimate: M = diag(1/|g|) leaves sign(g)."
)
def _single() -> Finding:
    problem = tanh_network()
    p, g = problem.p, problem.gradient(problem.p)
    moved = problem.iterates(PreconditionedGD(problem.model, 0.01, preconditioner=RMS(decay=0.0, eps=0.0)), 1)[-1]
    return Finding(
        "largest |Mg − sign(g)|", 0.0, float(((p - moved) / 0.01 - g.sign()).abs().max()), 1e-12, on="tanh network, one step"
    )


@CHAPTER.statement(
    "single-gradient-kappa",
    "after the expansion",
    "The average over many points conditions better than a single gradient does.",
)
def _single_kappa() -> Finding:
    problem, p_star = unscaled()
    H = hessian(problem.objective()).to_dense()
    g = _gradients_around(problem, p_star, 200).abs()
    kappa = lambda d: condition_number(d.rsqrt()[:, None] * H * d.rsqrt()).kappa  # noqa: E731
    singles = torch.tensor([kappa(one) for one in g])
    averaged = kappa(g.square().mean(0).sqrt())
    figure = Bars(
        "κ(PᵀHP)",
        (
            ("H", condition_number(H).kappa),
            ("a single gradient (median of 200)", float(singles.median())),
            ("the average of 200", averaged),
        ),
    )
    return Finding("κ(PᵀHP)", float(singles.median()), averaged, 0.0, "≤", on="logistic regression, scaled wine", figure=figure)
