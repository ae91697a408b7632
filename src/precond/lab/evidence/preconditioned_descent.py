"""Preconditioned gradient descent: in z, and where the Hessian has a null space."""

from __future__ import annotations

import torch

from precond.algebra.maps import Dense
from precond.analysis.convergence import predict
from precond.analysis.curvature import Span, condition_number, hessian
from precond.lab.evidence.descent import at_minimum, errors_of, slowest_directions, slowest_rate, steps_to_fall
from precond.lab.evidence.problems import (
    Problem,
    random,
    relative,
    tanh_network,
)
from precond.lab.evidence.statement import Chapter, Finding
from precond.optim.optimizer import PreconditionedGD
from precond.optim.preconditioners import Fixed

CHAPTER = Chapter("Preconditioned gradient descent")


@CHAPTER.statement("implicit", "(4), (5)", "GD in z, p = P z, is p ← p − αM∇L(p) with M = P Pᵀ.")
def _implicit() -> Finding:
    problem = tanh_network()
    n, alpha, start = len(problem.p), 0.05, problem.p
    P = torch.eye(n, dtype=torch.float64) + 0.5 * n**-0.5 * random(n, n, seed=2)
    p = problem.iterates(PreconditionedGD(problem.model, alpha, preconditioner=Fixed(Dense(P))), 200)[-1]
    z = torch.linalg.solve(P, start)
    for _ in range(200):
        z.requires_grad_()
        (g,) = torch.autograd.grad(problem.at(P @ z), z)
        z = (z - alpha * g).detach()
    return Finding(
        "distance after 200 steps, relative to the way",
        0.0,
        float((p - P @ z).norm() / (p - start).norm()),
        1e-11,
        on="tanh network, a full P, not symmetric",
    )


@CHAPTER.statement("hessian-z", "after (4)", "The Hessian in z is PᵀHP.")
def _hessian_in_z() -> Finding:
    problem = tanh_network()
    n = len(problem.p)
    P = torch.eye(n, dtype=torch.float64) + 0.5 * n**-0.5 * random(n, n, seed=2)
    like = tuple(q.detach() for q in problem.model.parameters())
    map_ = Dense(P, like)
    measured = (map_.T @ hessian(problem.objective()) @ map_).to_dense()
    explicit = torch.autograd.functional.hessian(lambda z: problem.at(P @ z), torch.linalg.solve(P, problem.p))
    return Finding("error, relative", 0.0, relative(measured, explicit), 1e-11, on="tanh network at initialization, a full P")


@CHAPTER.statement("spectra", "after (5)", "PᵀHP and MH have the same eigenvalues.")
def _spectra() -> Finding:
    problem, _ = at_minimum("network")
    n = len(problem.p)
    P = torch.eye(n, dtype=torch.float64) + 0.5 * n**-0.5 * random(n, n, seed=2)
    map_ = Dense(P, tuple(q.detach() for q in problem.model.parameters()))
    H = hessian(problem.objective())
    symmetric = torch.linalg.eigvalsh((map_.T @ H @ map_).to_dense())
    product = torch.linalg.eigvals(P @ P.T @ problem.hessian(problem.p)).real.sort().values
    return Finding(
        "largest relative error of an eigenvalue",
        0.0,
        float(((product - symmetric) / symmetric).abs().max()),
        1e-9,
        on="tanh network at its minimum, a full P",
    )


@CHAPTER.statement(
    "rate-preconditioned", "after (5)", "Preconditioned GD contracts by r_M = (κ_M − 1)/(κ_M + 1), κ_M = κ(PᵀHP), in z."
)
def _rate_preconditioned() -> Finding:
    problem, p_star = at_minimum("network")
    n = len(p_star)
    # Scaled to a unit diagonal, as Jacobi's preconditioner does, then mixed: neither diagonal nor symmetric.
    H = problem.hessian(p_star)
    P = torch.diag(H.diagonal().rsqrt()) @ (torch.eye(n, dtype=torch.float64) + 0.1 * n**-0.5 * random(n, n, seed=3))
    map_ = Dense(P, tuple(q.detach() for q in problem.model.parameters()))
    best = predict(condition_number(map_.T @ hessian(problem.objective()) @ map_, tol=1e-9))
    measured = slowest_rate(errors_of(problem, p_star, best.lr, best.rate, P))
    before = condition_number(hessian(problem.objective())).kappa
    return Finding(
        "contraction per step",
        best.rate,
        measured,
        0.02 * (1 - best.rate),
        on=f"tanh network, wine, κ from {before:.4g} to κ_M = {best.kappa:.4g}",
    )


def _scalings(problem: Problem) -> Span:
    """Directions that change nothing: the weights into a ReLU grow as those out of it shrink."""
    W, v = (q.detach() for q in problem.model.parameters())
    found = []
    for j in range(len(W)):
        into, out = torch.zeros_like(W), torch.zeros_like(v)
        into[j], out[:, j] = W[j], -v[:, j]
        found.append((into, out))
    return Span(found)


@CHAPTER.statement(
    "null-space",
    "end of the theory",
    "A positively scale-invariant network has a null direction for each of its ReLUs, so that λ_min = 0.",
)
def _null_space() -> Finding:
    problem, _ = at_minimum("scale-invariant")
    ends = condition_number(hessian(problem.objective()), null_tol=1e-10, method="dense")
    return Finding("null eigenvalues at a minimum", 2.0, float(ends.inertia.null), on="ReLU network 6–2–1 without biases, wine")


@CHAPTER.statement("rate-positive", "end of the theory", "There the rate is that of the smallest positive eigenvalue.")
def _rate_positive() -> Finding:
    problem, p_star = at_minimum("scale-invariant")
    best = predict(condition_number(hessian(problem.objective()), deflate=_scalings(problem), tol=1e-9))
    r = best.rate
    problem.set(p_star + slowest_directions(problem.hessian(p_star), 1e-5 * p_star.norm()))
    steps = steps_to_fall(r)
    found = problem.iterates(PreconditionedGD(problem.model, best.lr, preconditioner=Fixed()), steps)
    problem.set(p_star)
    # GD ends in some point of the curve of minima; the gradient tells the way to it.
    gradients = torch.stack([problem.gradient(p).norm() for p in found])
    return Finding(
        "contraction of the gradient per step",
        r,
        slowest_rate(gradients),
        0.02 * (1 - r),
        on=f"ReLU network 6–2–1, κ₊ = {best.kappa:.4g}",
    )
