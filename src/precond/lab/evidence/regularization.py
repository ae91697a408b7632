"""Penalties in p and in z."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from precond.algebra.maps import Dense, Diagonal
from precond.analysis.diagnostics import preconditioner_of
from precond.lab.evidence.problems import Problem, random, relative, tanh_network
from precond.lab.evidence.statement import Chapter, Finding, Line, Plot
from precond.optim.optimizer import PreconditionedGD
from precond.optim.optimizer.probing import LossClosure
from precond.optim.preconditioners import RMS, Fixed, Preconditioner
from precond.optim.recipes import adamw
from precond.optim.regularizers import L2, SAM, GradientNorm, Regularizer

CHAPTER = Chapter("Regularization with preconditioning")

_ALPHA = 0.05
_ON = "tanh network 13–6–3, wine"


def _network() -> Problem:
    return tanh_network(penalty=0.0)


def _full_root(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64) + 0.5 * n**-0.5 * random(n, n, seed=2)


def _step(problem: Problem, preconditioner: Preconditioner, regularizers: Sequence[Regularizer] = ()) -> Tensor:
    """(p − p⁺)/α of one step of the library's optimizer; p is as before afterwards."""
    p = problem.p
    optimizer = PreconditionedGD(problem.model, _ALPHA, preconditioner=preconditioner, regularizers=regularizers)
    optimizer.step(LossClosure(lambda: problem.loss_with_penalty(problem.model(problem.x), problem.y)))
    moved = (p - problem.p) / _ALPHA
    problem.set(p)
    return moved


def _gradient_in_z(problem: Problem, P: Tensor, penalty) -> Tensor:
    """P∇_z[L(Pz) + penalty(z)] at z = P⁻¹p, by automatic differentiation in z."""
    z = torch.linalg.solve(P, problem.p).requires_grad_()
    (g,) = torch.autograd.grad(problem.at(P @ z) + penalty(z), z)
    return P @ g


@CHAPTER.statement("l2-z", "(9)", "GD in z on L(Pz) + λ‖z‖² is weight decay: p ← p − αM∇L − 2αλp.")
def _l2_in_z() -> Finding:
    problem, lam = _network(), 0.1
    P = _full_root(len(problem.p))
    decayed = P @ P.T @ problem.gradient(problem.p) + 2 * lam * problem.p
    in_z = _gradient_in_z(problem, P, lambda z: lam * z.square().sum())
    ours = _step(problem, Fixed(Dense(P)), [L2(lam, space="z")])
    return Finding(
        "error of the step, the larger of two forms, relative",
        0.0,
        max(relative(ours, decayed), relative(ours, in_z)),
        1e-11,
        on=f"{_ON}, a full P",
    )


@CHAPTER.statement("l2-z-adamw", "(9)", "Adam with λ‖z‖² is torch.optim.AdamW with weight_decay = 2λ.")
def _l2_is_adamw() -> Finding:
    ours, peer = _network(), _network()
    a = ours.iterates(adamw(ours.model, 0.01, weight_decay=0.2, engine="loop"), 100)
    b = peer.iterates(torch.optim.AdamW(peer.model.parameters(), 0.01, weight_decay=0.2), 100)
    return Finding(
        "distance after 100 steps, relative to the way",
        0.0,
        float((a[-1] - b[-1]).norm() / (b[-1] - b[0]).norm()),
        1e-12,
        on=_ON,
    )


@CHAPTER.statement(
    "l2-other",
    "Regularization with Preconditioning",
    "With M ≠ cI no λ′ makes λ′‖p‖² in the preconditioned loss equal to weight decay 2λp.",
)
def _no_equal_lambda() -> Finding:
    problem = _network()
    optimizer = adamw(problem.model, 0.01)
    problem.iterates(optimizer, 100)
    pieces = tuple(q.detach() for q in problem.model.parameters())
    Mp = torch.cat([t.flatten() for t in preconditioner_of(optimizer).gram(pieces)])
    p = problem.p
    # The step differs by 2λp − 2λ′Mp; the best λ′ leaves the part of p that is orthogonal to Mp.
    rest = p - (p @ Mp) / (Mp @ Mp) * Mp
    return Finding(
        "what the best λ′ leaves of 2λp, relative",
        0.1,
        float(rest.norm() / p.norm()),
        0.0,
        "≥",
        on=f"{_ON}, M of AdamW after 100 steps",
    )


@CHAPTER.statement(
    "scale-adjusted",
    "Regularization with Preconditioning",
    "With M = diag(1/r), weight decay is preconditioned GD on L + λ‖p√r‖².",
)
def _scale_adjusted() -> Finding:
    problem, lam = _network(), 0.1
    r = random(len(problem.p), seed=5).exp()
    p = problem.p.requires_grad_()
    (g,) = torch.autograd.grad(problem.at(p) + lam * (p * r.sqrt()).square().sum(), p)
    diagonal = Diagonal(problem.pieces(r.rsqrt()))
    return Finding(
        "error of the step, relative",
        0.0,
        relative(_step(problem, Fixed(diagonal), [L2(lam, space="z")]), g / r),
        1e-12,
        on=f"{_ON}, a random r",
    )


@CHAPTER.statement(
    "l2-p",
    "(10)",
    "GD in z on L(Pz) + λ‖Pz‖² is p ← p − αM(∇L + 2λp).",
    "Printed: ∇L − 2λp. The line above it in the paper has the plus.",
)
def _l2_in_p() -> Finding:
    problem, lam = _network(), 0.1
    P = _full_root(len(problem.p))
    in_z = _gradient_in_z(problem, P, lambda z: lam * (P @ z).square().sum())
    ours = _step(problem, Fixed(Dense(P)), [L2(lam, space="p")])
    printed = P @ P.T @ (problem.gradient(problem.p) - 2 * lam * problem.p)
    return Finding(
        "error of the step, relative", 0.0, relative(ours, in_z), 1e-11, printed=relative(printed, in_z), on=f"{_ON}, a full P"
    )


@CHAPTER.statement(
    "l2-gd",
    "Regularization with Preconditioning",
    "L2 regularization of plain GD is weight decay.",
    "Printed: “learning rate decay”. No learning rate makes up for the penalty: its term does not lie along the gradient.",
)
def _l2_of_gd() -> Finding:
    problem, lam = _network(), 0.1
    g, step = problem.gradient(problem.p), _step(problem, Fixed(), [L2(lam, space="p")])
    best = (step @ g) / (g @ g) * g
    return Finding(
        "error of the step, relative (printed: at the best learning rate)", 0.0, relative(step, g + 2 * lam * problem.p), 1e-12,
        printed=relative(best, step), on=_ON,
    )  # fmt: skip


def _norm_in_z(problem: Problem, P: Tensor, lam: float) -> Tensor:
    """P∇_z[L(Pz) + λ‖∇_zL(Pz)‖²], by double backprop in z."""
    z = torch.linalg.solve(P, problem.p).requires_grad_()
    loss = problem.at(P @ z)
    (y,) = torch.autograd.grad(loss, z, create_graph=True)
    (g,) = torch.autograd.grad(loss + lam * y.square().sum(), z)
    return P @ g


@CHAPTER.statement("gradient-z", "(12)", "GD in z on L + λ‖∇_zL‖² is p ← p − αM∇L − 2αλM H M∇L.")
def _gradient_in_norm() -> Finding:
    problem, lam = _network(), 0.05
    P = _full_root(len(problem.p))
    M, g, H = P @ P.T, problem.gradient(problem.p), problem.hessian(problem.p)
    twelve = M @ g + 2 * lam * M @ H @ M @ g
    ours = _step(problem, Fixed(Dense(P)), [GradientNorm(lam, space="z", method="exact")])
    return Finding(
        "error of the step, the larger of two forms, relative",
        0.0,
        max(relative(ours, twelve), relative(ours, _norm_in_z(problem, P, lam))),
        1e-11,
        on=f"{_ON}, a full P, against the exact H",
    )


@CHAPTER.statement("gradient-z-rms", "(12)", "The same with RMSProp's P, which is held still within the step.")
def _gradient_in_norm_rms() -> Finding:
    problem, lam = _network(), 1e-3
    p, g, H = problem.p, problem.gradient(problem.p), problem.hessian(problem.p)
    preconditioner = RMS(0.9, 1e-3)
    m = 1 / (g.abs() + 1e-3)  # after one gradient, r̂ = g²
    ours = _step(problem, preconditioner, [GradientNorm(lam, space="z", method="exact", damping=0.0)])
    problem.set(p)
    return Finding(
        "error of the step, relative",
        0.0,
        relative(ours, m * g + 2 * lam * m * (H @ (m * g))),
        1e-11,
        on=f"{_ON}, against the exact H",
    )


@CHAPTER.statement("gradient-p", "(11)", "Regularizing ‖∇_pL‖² instead gives p ← p − αM(∇L + 2λH∇L).")
def _gradient_in_p() -> Finding:
    problem, lam = _network(), 0.05
    P = _full_root(len(problem.p))
    g, H = problem.gradient(problem.p), problem.hessian(problem.p)
    ours = _step(problem, Fixed(Dense(P)), [GradientNorm(lam, space="p", method="exact")])
    return Finding(
        "error of the step, relative",
        0.0,
        relative(ours, P @ P.T @ (g + 2 * lam * H @ g)),
        1e-11,
        on=f"{_ON}, a full P, against the exact H",
    )


@CHAPTER.statement("differences", "after (11)", "Finite differences of gradients compute the same.")
def _finite_differences() -> Finding:
    problem, lam = _network(), 0.05
    P = Fixed(Dense(_full_root(len(problem.p))))
    plain = _step(problem, P)
    exact = _step(problem, P, [GradientNorm(lam, method="exact")]) - plain
    steps = [10.0 ** (-k / 2) for k in range(2, 19)]
    methods: tuple[Literal["forward", "central"], ...] = ("forward", "central")
    lines = []
    for method in methods:
        errors = [relative(_step(problem, P, [GradientNorm(lam, method=method, step=s)]) - plain, exact) for s in steps]
        lines.append(Line(method, tuple(steps), tuple(errors), True))
    default = relative(_step(problem, P, [GradientNorm(lam, method="central")]) - plain, exact)
    return Finding(
        "error of the penalty's part, central, relative",
        0.0,
        default,
        1e-8,
        on=f"{_ON}, a full P",
        figure=Plot("length of the difference, relative to ‖p‖", "relative error", tuple(lines), "xy"),
    )


@CHAPTER.statement(
    "sam-p", "Gradient Regularization", "SAM is the penalty ρ‖∇L‖ to first order in its radius ρ: they differ by O(ρ²)."
)
def _sam_order() -> Finding:
    return _order("p", Fixed(), torch.eye(len(_network().p), dtype=torch.float64), _ON)


@CHAPTER.statement("sam-z", "Gradient Regularization", "SAM in z is the penalty ρ‖Pᵀ∇L‖ to first order, too.")
def _sam_order_z() -> Finding:
    P = _full_root(len(_network().p))
    return _order("z", Fixed(Dense(P)), P, f"{_ON}, a full P")


def _order(space: Literal["p", "z"], preconditioner: Preconditioner, P: Tensor, on: str) -> Finding:
    problem = _network()
    M, g, H = P @ P.T, problem.gradient(problem.p), problem.hessian(problem.p)
    sharp = M @ g / (g @ M @ g).sqrt()
    radii = [0.1 * 2.0**-k for k in range(7)]
    off = [float((_step(problem, preconditioner, [SAM(rho, space=space)]) - M @ (g + rho * H @ sharp)).norm()) for rho in radii]
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
    problem, rho = _network(), 0.05
    P = _full_root(len(problem.p))
    g = problem.gradient(problem.p)
    length = float((P @ P.T @ g).norm() / (g @ P @ P.T @ g).sqrt() * rho / problem.p.norm())
    sam = _step(problem, Fixed(Dense(P)), [SAM(rho, space="z")])
    penalty = _step(problem, Fixed(Dense(P)), [GradientNorm(rho, space="z", power=1, step=length)])
    return Finding("difference of the steps, relative", 0.0, relative(penalty, sam), 1e-11, on=f"{_ON}, a full P")


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
    problem, time = _network(), 2.0
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
    n = len(_network().p)
    return _implicit(torch.eye(n, dtype=torch.float64), Fixed(), _ON)


@CHAPTER.statement("implicit-pgd", "Gradient Regularization", "Preconditioned GD does so in z: it follows L + (α/4)∇LᵀM∇L.")
def _implicit_pgd() -> Finding:
    P = _full_root(len(_network().p))
    return _implicit(P, Fixed(Dense(P)), f"{_ON}, a full P")
