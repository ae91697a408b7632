"""Adaptive learning rates: AdaGrad, RMSProp and Adam, and what their P does to κ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from precond.analysis.curvature import condition_number, hessian
from precond.analysis.diagnostics import preconditioner_of
from precond.lab.evidence.adaptive import unscaled
from precond.lab.evidence.problems import (
    Problem,
    generator,
    relative,
    tanh_network,
)
from precond.lab.evidence.statement import Bars, Chapter, Finding
from precond.optim.momentum import Momentum
from precond.optim.optimizer import PreconditionedGD
from precond.optim.preconditioners import RMS, AdaGrad
from precond.optim.recipes import adam

CHAPTER = Chapter("Adaptive learning rates")


def _history(
    make: Callable[[nn.Module], PreconditionedGD], steps: int = 50
) -> tuple[Problem, PreconditionedGD, Tensor, Tensor]:
    """A run: the problem, the optimizer, its iterates, and the gradients that it has seen, one row a step."""
    problem = tanh_network()
    optimizer = make(problem.model)
    points = problem.iterates(optimizer, steps)
    return problem, optimizer, points, torch.stack([problem.gradient(p) for p in points[:-1]])


def _denominator(optimizer: PreconditionedGD, n: int) -> Tensor:
    """M⁻¹ of a diagonal M."""
    like = tuple(p.detach() for group in optimizer.param_groups for p in group["params"])
    ones = tuple(torch.ones_like(q) for q in like)
    return 1 / torch.cat([m.flatten() for m in preconditioner_of(optimizer).gram(ones)])[:n]


@CHAPTER.statement(
    "adagrad",
    "AdaGrad",
    "AdaGrad's √r_t is √t·ḡ with ḡ the root mean square of the gradients so far: M = diag(1/ḡ), and a learning rate that falls as 1/√t.",
    "Printed: r_{t+1} ← r_t + g_t², by which M_t would lack the newest gradient, against r_t = Σ_{i≤t} g_i² in the next line. "
    "It is r_t ← r_{t−1} + g_t².",
)
def _adagrad() -> Finding:
    _, optimizer, _, g = _history(lambda model: PreconditionedGD(model, 0.05, preconditioner=AdaGrad(eps=0.0)))
    t = len(g)
    found = _denominator(optimizer, g.shape[1])
    printed = relative(found, g[:-1].square().sum(0).sqrt())
    return Finding(
        "error of √r_t against √t·ḡ, relative",
        0.0,
        relative(found, t**0.5 * g.square().mean(0).sqrt()),
        1e-13,
        printed=printed,
        on="tanh network, 50 steps",
    )


@CHAPTER.statement("adagrad-rate", "AdaGrad", "The √t is a decay of the learning rate: with α√t AdaGrad is p ← p − αg/ḡ.")
def _adagrad_rate() -> Finding:
    problem = tanh_network()
    start = problem.p
    optimizer = PreconditionedGD(problem.model, 0.01, preconditioner=AdaGrad(eps=0.0))
    p, squares = start, torch.zeros_like(start)
    for t in range(1, 51):
        optimizer.param_groups[0]["lr"] = 0.01 * t**0.5
        optimizer.step(problem.closure())
        g = problem.gradient(p)
        squares = squares + g.square()
        p = p - 0.01 * g / (squares / t).sqrt()
    return Finding(
        "distance after 50 steps, relative to the way",
        0.0,
        float((problem.p - p).norm() / (p - start).norm()),
        1e-10,
        on="tanh network",
    )


def _weighted(g: Tensor, decay: float) -> Tensor:
    """Σρ^{t−i}g_i/Σρ^{t−i}."""
    weights = decay ** torch.arange(len(g) - 1, -1, -1, dtype=g.dtype)
    return weights @ g / weights.sum()


@CHAPTER.statement(
    "rmsprop",
    "(6), (7)",
    "RMSProp from r₁ = g₁² has r_t = ρ^{t−1}g₁² + (1 − ρ^{t−1})·(weighted mean of g₂² … g_t²).",
    "Printed: r_{t+1} ← ρr_t + (1 − ρ)g_t² in (6), by which r₂ has no g₂ and (7) does not follow. With r_t ← ρr_{t−1} + (1 − ρ)g_t² it does.",
)
def _rmsprop() -> Finding:
    rho = 0.9
    _, optimizer, _, g = _history(lambda model: PreconditionedGD(model, 0.003, preconditioner=RMS(rho, 0.0, "first_gradient")))
    t = len(g)
    seven = rho ** (t - 1) * g[0].square() + (1 - rho ** (t - 1)) * _weighted(g[1:].square(), rho)
    r = g[0].square()
    for i in range(t - 1):  # r₂, …, r_t as (6) is printed
        r = rho * r + (1 - rho) * g[i].square()
    found = _denominator(optimizer, g.shape[1]).square()
    return Finding(
        "error of r_t against (7), relative",
        0.0,
        relative(found, seven),
        1e-12,
        printed=relative(r, seven),
        on="tanh network, 50 steps, ρ = 0.9",
    )


@CHAPTER.statement("zero-start", "after (8)", "From r₀ = 0, r_t is (1 − ρᵗ) times a weighted mean of g².")
def _zero_start() -> Finding:
    rho = 0.99
    _, optimizer, _, g = _history(
        lambda model: PreconditionedGD(model, 0.001, preconditioner=RMS(rho, 0.0, bias_correction=False)), 20
    )
    explicit = (1 - rho ** len(g)) * _weighted(g.square(), rho)
    return Finding(
        "error of r_t, relative",
        0.0,
        relative(_denominator(optimizer, g.shape[1]).square(), explicit),
        1e-12,
        on="tanh network, 20 steps, ρ = 0.99",
    )


@CHAPTER.statement("bias-correction", "after (8)", "Divided by 1 − ρᵗ it is that weighted mean.")
def _bias_correction() -> Finding:
    rho = 0.99
    _, optimizer, _, g = _history(lambda model: PreconditionedGD(model, 0.001, preconditioner=RMS(rho, 0.0)), 20)
    return Finding(
        "error of r̂_t, relative",
        0.0,
        relative(_denominator(optimizer, g.shape[1]).square(), _weighted(g.square(), rho)),
        1e-12,
        on="tanh network, 20 steps, ρ = 0.99",
    )


@CHAPTER.statement(
    "adam-first", "(8)", "Adam from m₁ = g₁ and r₁ = g₁² steps by averages of the form (7), without a correction."
)
def _adam_first() -> Finding:
    rho, beta, alpha = 0.99, 0.9, 0.003
    P, momentum = RMS(rho, 0.0, "first_gradient"), Momentum(beta, start="first_gradient")
    _, _, points, g = _history(lambda model: PreconditionedGD(model, alpha, preconditioner=P, momentum=momentum))
    t = len(g)
    mean = lambda x, c: c ** (t - 1) * x[0] + (1 - c ** (t - 1)) * _weighted(x[1:], c)  # noqa: E731
    step = alpha * mean(g, beta) / mean(g.square(), rho).sqrt()
    return Finding(
        "error of the 50th step, relative",
        0.0,
        relative(points[-2] - points[-1], step),
        1e-10,
        on="tanh network, ρ = 0.99, ρ̂ = 0.9",
    )


@CHAPTER.statement("adam-zero", "after (8)", "Adam from zero with its bias corrections is torch.optim.Adam.")
def _adam_zero() -> Finding:
    _, _, points, _ = _history(lambda model: adam(model, 0.01, eps=1e-8, engine="loop"), 100)
    peer = tanh_network()
    ends = peer.iterates(torch.optim.Adam(peer.model.parameters(), 0.01, eps=1e-8), 100)
    return Finding(
        "distance after 100 steps, relative to the way",
        0.0,
        float((points[-1] - ends[-1]).norm() / (ends[-1] - ends[0]).norm()),
        1e-12,
        on="tanh network",
    )


_METHODS: dict[str, Callable[[nn.Module], PreconditionedGD]] = {
    "AdaGrad": lambda model: PreconditionedGD(model, 0.1, preconditioner=AdaGrad()),
    "RMSProp": lambda model: PreconditionedGD(model, 0.003, preconditioner=RMS(0.99, 1e-8, "first_gradient")),
    "Adam": lambda model: adam(model, 0.01),
}


def _in_z(problem: Problem, optimizer: PreconditionedGD) -> tuple[float, float]:
    """κ(H) and κ(PᵀHP) at the current parameters."""
    P, H = preconditioner_of(optimizer, problem.objective()), hessian(problem.objective())
    return condition_number(H).kappa, condition_number(P.T @ H @ P).kappa


def _regression(name: str) -> Finding:
    problem, p_star = unscaled()
    problem.set(torch.zeros_like(p_star))
    optimizer = _METHODS[name](problem.model)
    problem.iterates(optimizer, 200)
    problem.set(p_star)
    before, after = _in_z(problem, optimizer)
    return Finding(
        "κ(PᵀHP), at most κ(H)",
        before,
        after,
        0.0,
        "≤",
        on="logistic regression, scaled wine, 200 steps",
        figure=Bars("κ", (("H", before), (f"with P of {name}", after))),
    )


@CHAPTER.statement("rows-network", "Theorem 2", "At the minimum of a network, too, M = diag(1/‖h_i‖) improves κ.")
def _rows_network() -> Finding:
    problem = tanh_network()
    H = problem.hessian(problem.minimum())
    d = H.norm(dim=1).rsqrt()
    return Finding(
        "κ(PᵀHP), at most κ(H)",
        condition_number(H).kappa,
        condition_number(d[:, None] * H * d).kappa,
        0.0,
        "≤",
        on="tanh network 13–6–3, wine",
    )


def _network(name: str, batch: int | None) -> tuple[float, float]:
    """κ(H) and κ(PᵀHP) at the minimum that a training leads to, with the P that it has found on its way."""
    problem = tanh_network()
    optimizer = _METHODS[name](problem.model)
    draw = generator(0)
    for _ in range(2000 if batch else 1000):
        part = torch.randint(len(problem.x), (batch,), generator=draw) if batch else torch.arange(len(problem.x))
        optimizer.step(replace(problem, x=problem.x[part], y=problem.y[part]).closure())
    problem.minimum()
    return _in_z(problem, optimizer)


def _network_finding(name: str) -> Finding:
    mini, full = _network(name, 16), _network(name, None)
    bars = (("H", mini[0]), (f"{name}, batches of 16", mini[1]), ("H", full[0]), (f"{name}, full batches", full[1]))
    return Finding(
        "κ(PᵀHP)/κ(H), batches of 16 (printed: full batches)", 1.0, mini[1] / mini[0], 0.0, "≤",
        printed=full[1] / full[0], on="tanh network 13–6–3, wine", figure=Bars("κ at the minimum reached", bars),
    )  # fmt: skip


for _name in _METHODS:
    CHAPTER.statement(
        f"kappa-{_name.lower()}",
        _name,
        f"{_name}'s P, built on the way to the minimum of a regression, improves κ where scales of features drive it.",
    )(partial(_regression, _name))
for _name in _METHODS:
    CHAPTER.statement(
        f"kappa-{_name.lower()}-network",
        _name,
        f"{_name}'s P improves κ at the minimum of a network.",
        "From full-batch gradients, which the theory is about, it made κ worse: p − p* of a training is no random vector, and ḡ_i need "
        "not follow ‖h_i‖. From mini-batch gradients, whose noise adds to every g_i, it improves κ.",
    )(partial(_network_finding, _name))
