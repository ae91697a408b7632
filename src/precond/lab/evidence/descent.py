"""Theorem 1, and gradient descent in z."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from precond.algebra.maps import Dense
from precond.analysis.convergence import predict
from precond.analysis.curvature import Conditioning, condition_number, hessian
from precond.lab.evidence.problems import (
    Problem,
    half_square,
    logistic_regression,
    random,
    remembered,
    seeded,
    standardized,
    tanh_network,
)
from precond.lab.evidence.statement import Chapter, Finding, Line, Plot
from precond.optim.optimizer import PreconditionedGD
from precond.optim.preconditioners import Fixed

CHAPTER = Chapter("Preconditioned gradient descent")

# The error of a run falls from 1e-4·‖p*‖ by this much: from where the Hessian is that at p*, to where rounding is not yet felt.
_FALL = 1e-6


@remembered
def at_minimum(name: str) -> tuple[Problem, Tensor]:
    problem = {
        "logistic": lambda: logistic_regression(penalty=0.005),
        "network": tanh_network,
        "scale-invariant": _relu_network,
    }[name]()
    return problem, problem.minimum()


def _relu_network() -> Problem:
    """6–2–1 with ReLU and without biases, the classes of wine as numbers: a network with a minimum off the kinks.

    Its two units fire for different samples, or the search begins elsewhere: of units that never fire, always, or alike, more is null.
    """
    x, classes = standardized("wine")
    x = x[:, [0, 3, 6, 9, 10, 12]]
    for attempt in range(5, 55):
        model = seeded(lambda: nn.Sequential(nn.Linear(6, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)), attempt)
        problem = Problem(model, half_square, x, classes[:, None] - 1.0)
        search = torch.optim.LBFGS(
            model.parameters(), max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-14, tolerance_change=1e-16
        )
        search.step(problem.closure())
        assert isinstance(model, nn.Sequential)
        fires = model[0](x) > 0
        patterns = torch.cat([fires, ~fires, fires[:, :1] ^ fires[:, 1:]], 1).double().mean(0)
        if float(patterns.min()) > 0.1:
            return problem
    raise RuntimeError("no network of 50 has two units that fire for different samples")


def errors_of(problem: Problem, p_star: Tensor, alpha: float, r: float, P: Tensor | None = None) -> Tensor:
    """‖z_t − z*‖ of a run of the library's optimizer from near p*, where the bound is attained: in the slowest directions."""
    P = torch.eye(len(p_star), dtype=torch.float64) if P is None else P
    problem.set(p_star + P @ slowest_directions(P.T @ problem.hessian(p_star) @ P, 1e-4 * p_star.norm()))
    steps = steps_to_fall(r)
    moved = problem.iterates(PreconditionedGD(problem.model, alpha, preconditioner=Fixed(Dense(P))), steps) - p_star
    problem.set(p_star)
    return torch.linalg.solve(P, moved.T).norm(dim=0)


def slowest_directions(H: Tensor, length: Tensor) -> Tensor:
    """The sum of the eigenvectors of the smallest positive and of the largest eigenvalue."""
    lam, V = torch.linalg.eigh(H)
    lowest = int((lam > 1e-10 * lam[-1]).nonzero()[0])
    return length * (V[:, lowest] + V[:, -1]) / 2**0.5


def steps_to_fall(r: float) -> int:
    """Until errors have fallen as far as they should, an even number; of slow runs a part tells the rate."""
    return min(2 * math.ceil(math.log(_FALL) / math.log(r) / 2), 2000)


def slowest_rate(errors: Tensor) -> float:
    """The geometric mean over the last half of a run."""
    half = (len(errors) - 1) // 2
    return float((errors[-1] / errors[-1 - half]) ** (1 / half))


def _ends(name: str) -> tuple[Problem, Tensor, Conditioning]:
    """A problem at its minimum with the ends of its spectrum as the library finds them."""
    problem, p_star = at_minimum(name)
    return problem, p_star, condition_number(hessian(problem.objective()), tol=1e-9)


@CHAPTER.statement(
    "rate", "Theorem 1, (3)", "Near a minimum, GD with α = 2/(λ_min + λ_max) contracts the error by r = (κ − 1)/(κ + 1) a step."
)
def _rate_of_regression() -> Finding:
    problem, p_star, ends = _ends("logistic")
    best = predict(ends)
    r, kappa = best.rate, best.kappa
    errors = errors_of(problem, p_star, best.lr, r)
    t = torch.arange(len(errors), dtype=torch.float64)
    figure = Plot(
        "steps",
        "‖p − p*‖",
        (
            Line("measured", tuple(t.tolist()), tuple(errors.tolist())),
            Line("predicted slope", tuple(t.tolist()), tuple((errors[0] * r**t).tolist())),
        ),
        "y",
    )
    return Finding(
        "contraction per step",
        r,
        slowest_rate(errors),
        0.02 * (1 - r),
        on=f"logistic regression, breast cancer, κ = {kappa:.4g}",
        figure=figure,
    )


@CHAPTER.statement("rate-network", "Theorem 1, (3)", "The same for a network, at a minimum of its non-convex loss.")
def _rate_of_network() -> Finding:
    problem, p_star, ends = _ends("network")
    best = predict(ends)
    measured = slowest_rate(errors_of(problem, p_star, best.lr, best.rate))
    return Finding(
        "contraction per step",
        best.rate,
        measured,
        0.02 * (1 - best.rate),
        on=f"tanh network 13–6–3, wine, κ = {best.kappa:.4g}",
    )


@CHAPTER.statement("rate-alpha", "Theorem 1, (2)", "With any α, GD contracts by r = max(|1 − αλ_min|, |1 − αλ_max|).")
def _rates() -> Finding:
    problem, p_star, ends = _ends("logistic")
    alphas = [predict(ends).lr * s for s in (0.4, 0.6, 0.8, 0.9, 0.95, 1.0, 1.01, 1.02, 1.03)]
    predicted = [predict(ends, a).rate for a in alphas]
    observed = [slowest_rate(errors_of(problem, p_star, a, r)) for a, r in zip(alphas, predicted, strict=True)]
    off = max(abs(o - r) / (1 - r) for o, r in zip(observed, predicted, strict=True))
    figure = Plot(
        "α",
        "1 − contraction per step",
        (
            Line("predicted", tuple(alphas), tuple(1 - r for r in predicted)),
            Line("measured", tuple(alphas), tuple(1 - o for o in observed), True),
        ),
    )
    return Finding(
        "largest error of 1 − r, relative, over 9 values of α",
        0.0,
        off,
        0.02,
        on="logistic regression, breast cancer",
        figure=figure,
    )


@CHAPTER.statement("rate-bound", "Theorem 1, (2)", "From any start nearby no step contracts by less than r + ε.")
def _bound() -> Finding:
    problem, p_star, ends = _ends("network")
    best, worst = predict(ends), 0.0
    for seed in range(10):
        start = random(len(p_star), seed=seed)
        problem.set(p_star + 1e-4 * p_star.norm() * start / start.norm())
        errors = (problem.iterates(PreconditionedGD(problem.model, best.lr, preconditioner=Fixed()), 50) - p_star).norm(dim=1)
        worst = max(worst, float((errors[1:] / errors[:-1]).max()))
    problem.set(p_star)
    return Finding(
        "largest ratio of successive errors, 10 random starts", best.rate, worst, 1e-3, "≤", on="tanh network 13–6–3, wine"
    )


@CHAPTER.statement("best-alpha", "Theorem 1", "α = 2/(λ_min + λ_max) is the best learning rate.")
def _best_alpha() -> Finding:
    problem, p_star, ends = _ends("logistic")
    best = predict(ends).lr
    scales = [0.9 + 0.01 * i for i in range(11)] + [1 + 0.001 * i for i in range(1, 5)]
    observed = {s: slowest_rate(errors_of(problem, p_star, s * best, predict(ends, s * best).rate)) for s in scales}
    return Finding(
        "fastest of 15 values, as a multiple of the predicted α",
        1.0,
        min(observed, key=lambda s: observed[s]),
        0.0051,
        on="logistic regression, breast cancer",
    )
