"""Regularization with preconditioning: norms of gradients, SAM, and what a finite learning rate adds."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from precond.algebra.maps import Dense
from precond.lab.evidence.problems import Problem, relative
from precond.lab.evidence.regularization import ON, full_root, one_step, wine_network
from precond.lab.evidence.statement import Chapter, Finding, Line, Plot
from precond.optim.optimizer import PreconditionedGD
from precond.optim.preconditioners import RMS, Fixed, Preconditioner
from precond.optim.regularizers import SAM, GradientNorm

CHAPTER = Chapter("Regularization with preconditioning")


def _norm_in_z(problem: Problem, P: Tensor, lam: float) -> Tensor:
    """P∇_z[L(Pz) + λ‖∇_zL(Pz)‖²], by double backprop in z."""
    z = torch.linalg.solve(P, problem.p).requires_grad_()
    loss = problem.at(P @ z)
    (y,) = torch.autograd.grad(loss, z, create_graph=True)
    (g,) = torch.autograd.grad(loss + lam * y.square().sum(), z)
    return P @ g


@CHAPTER.statement("gradient-z", "(12)", "GD in z on L + λ‖∇_zL‖² is p ← p − αM∇L − 2αλM H M∇L.")
def _gradient_in_norm() -> Finding:
    problem, lam = wine_network(), 0.05
    P = full_root(len(problem.p))
    M, g, H = P @ P.T, problem.gradient(problem.p), problem.hessian(problem.p)
    twelve = M @ g + 2 * lam * M @ H @ M @ g
    ours = one_step(problem, Fixed(Dense(P)), [GradientNorm(lam, space="z", method="exact")])
    return Finding(
        "error of the step, the larger of two forms, relative",
        0.0,
        max(relative(ours, twelve), relative(ours, _norm_in_z(problem, P, lam))),
        1e-11,
        on=f"{ON}, a full P, against the exact H",
    )


@CHAPTER.statement("gradient-z-rms", "(12)", "The same with RMSProp's P, which is held still within the step.")
def _gradient_in_norm_rms() -> Finding:
    problem, lam = wine_network(), 1e-3
    p, g, H = problem.p, problem.gradient(problem.p), problem.hessian(problem.p)
    preconditioner = RMS(0.9, 1e-3)
    m = 1 / (g.abs() + 1e-3)  # after one gradient, r̂ = g²
    ours = one_step(problem, preconditioner, [GradientNorm(lam, space="z", method="exact", damping=0.0)])
    problem.set(p)
    return Finding(
        "error of the step, relative",
        0.0,
        relative(ours, m * g + 2 * lam * m * (H @ (m * g))),
        1e-11,
        on=f"{ON}, against the exact H",
    )


@CHAPTER.statement("gradient-p", "(11)", "Regularizing ‖∇_pL‖² instead gives p ← p − αM(∇L + 2λH∇L).")
def _gradient_in_p() -> Finding:
    problem, lam = wine_network(), 0.05
    P = full_root(len(problem.p))
    g, H = problem.gradient(problem.p), problem.hessian(problem.p)
    ours = one_step(problem, Fixed(Dense(P)), [GradientNorm(lam, space="p", method="exact")])
    return Finding(
        "error of the step, relative",
        0.0,
        relative(ours, P @ P.T @ (g + 2 * lam * H @ g)),
        1e-11,
        on=f"{ON}, a full P, against the exact H",
    )


@CHAPTER.statement("differences", "after (11)", "Finite differences of gradients compute the same.")
def _finite_differences() -> Finding:
    problem, lam = wine_network(), 0.05
    P = Fixed(Dense(full_root(len(problem.p))))
    plain = one_step(problem, P)
    exact = one_step(problem, P, [GradientNorm(lam, method="exact")]) - plain
    steps = [10.0 ** (-k / 2) for k in range(2, 19)]
    methods: tuple[Literal["forward", "central"], ...] = ("forward", "central")
    lines = []
    for method in methods:
        errors = [relative(one_step(problem, P, [GradientNorm(lam, method=method, step=s)]) - plain, exact) for s in steps]
        lines.append(Line(method, tuple(steps), tuple(errors), True))
    default = relative(one_step(problem, P, [GradientNorm(lam, method="central")]) - plain, exact)
    return Finding(
        "error of the penalty's part, central, relative",
        0.0,
        default,
        1e-8,
        on=f"{ON}, a full P",
        figure=Plot("length of the difference, relative to ‖p‖", "relative error", tuple(lines), "xy"),
    )


@CHAPTER.statement(
    "sam-p", "Gradient Regularization", "SAM is the penalty ρ‖∇L‖ to first order in its radius ρ: they differ by O(ρ²)."
)
def _sam_order() -> Finding:
    return _order("p", Fixed(), torch.eye(len(wine_network().p), dtype=torch.float64), ON)


@CHAPTER.statement("sam-z", "Gradient Regularization", "SAM in z is the penalty ρ‖Pᵀ∇L‖ to first order, too.")
def _sam_order_z() -> Finding:
    P = full_root(len(wine_network().p))
    return _order("z", Fixed(Dense(P)), P, f"{ON}, a full P")


def _order(space: Literal["p", "z"], preconditioner: Preconditioner, P: Tensor, on: str) -> Finding:
    problem = wine_network()
    M, g, H = P @ P.T, problem.gradient(problem.p), problem.hessian(problem.p)
    sharp = M @ g / (g @ M @ g).sqrt()
    radii = [0.1 * 2.0**-k for k in range(7)]
    off = [
        float((one_step(problem, preconditioner, [SAM(rho, space=space)]) - M @ (g + rho * H @ sharp)).norm()) for rho in radii
    ]
    slope = math.log(off[-2] / off[-1]) / math.log(2)
    figure = Plot(
        "ρ",
        "difference of the steps",
        (
            Line("measured", tuple(radii), tuple(off), True),
            Line("∝ ρ²", tuple(radii), tuple(off[-1] * (r / radii[-1]) ** 2 for r in radii)),
        ),
        "xy",
    )
    return Finding("order of the difference in ρ", 2.0, slope, 0.1, on=on, figure=figure)


@CHAPTER.statement(
    "sam-difference", "Gradient Regularization", "SAM in z is that penalty by one forward difference of length ρ, exactly."
)
def _sam_is_difference() -> Finding:
    problem, rho = wine_network(), 0.05
    P = full_root(len(problem.p))
    g = problem.gradient(problem.p)
    length = float((P @ P.T @ g).norm() / (g @ P @ P.T @ g).sqrt() * rho / problem.p.norm())
    sam = one_step(problem, Fixed(Dense(P)), [SAM(rho, space="z")])
    penalty = one_step(problem, Fixed(Dense(P)), [GradientNorm(rho, space="z", power=1, step=length)])
    return Finding("difference of the steps, relative", 0.0, relative(penalty, sam), 1e-11, on=f"{ON}, a full P")


def _flow(problem: Problem, p: Tensor, M: Tensor, alpha: float, time: float, steps: int) -> Tensor:
    """Runge and Kutta's method on p′ = −M∇(L + (α/4)∇LᵀM∇L)."""

    def velocity(p: Tensor) -> Tensor:
        q = p.detach().requires_grad_()
        (g,) = torch.autograd.grad(problem.at(q), q, create_graph=True)
        (h,) = torch.autograd.grad(g, q, M @ g.detach())  # H M g
        return -M @ (g.detach() + alpha / 2 * h)

    dt = time / steps
    for _ in range(steps):
        a = velocity(p)
        b = velocity(p + dt / 2 * a)
        c = velocity(p + dt / 2 * b)
        p = p + dt / 6 * (a + 2 * b + 2 * c + velocity(p + dt * c))
    return p


def _implicit(P: Tensor, preconditioner: Preconditioner, on: str) -> Finding:
    problem, time = wine_network(), 2.0
    start, M = problem.p, P @ P.T
    counts = [10, 20, 40, 80, 160]
    plain = _flow(problem, start, M, 0.0, time, 200)
    to_plain, to_modified = [], []
    for n in counts:
        problem.set(start)
        end = problem.iterates(PreconditionedGD(problem.model, time / n, preconditioner=preconditioner), n)[-1]
        to_plain.append(float((end - plain).norm()))
        to_modified.append(float((end - _flow(problem, start, M, time / n, time, 200)).norm()))
    alphas = tuple(time / n for n in counts)
    lines = (
        Line("to the flow of L", alphas, tuple(to_plain), True),
        Line("to the flow of L + (α/4)gᵀMg", alphas, tuple(to_modified), True),
    )
    order = math.log(to_modified[-2] / to_modified[-1]) / math.log(2)
    return Finding(
        "order in α of the distance to that flow (to the flow of L: 1)",
        2.0,
        order,
        0.1,
        on=on,
        figure=Plot("α", "distance of GD at time 2", lines, "xy"),
    )


@CHAPTER.statement(
    "implicit-gd",
    "Gradient Regularization",
    "Plain GD regularizes by itself: it follows the gradient flow of L + (α/4)‖∇L‖² to second order in α.",
)
def _implicit_gd() -> Finding:
    n = len(wine_network().p)
    return _implicit(torch.eye(n, dtype=torch.float64), Fixed(), ON)


@CHAPTER.statement("implicit-pgd", "Gradient Regularization", "Preconditioned GD does so in z: it follows L + (α/4)∇LᵀM∇L.")
def _implicit_pgd() -> Finding:
    P = full_root(len(wine_network().p))
    return _implicit(P, Fixed(Dense(P)), f"{ON}, a full P")
