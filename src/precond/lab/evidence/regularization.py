"""Penalties in p and in z."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from precond.algebra.maps import Dense, Diagonal
from precond.analysis.diagnostics import preconditioner_of
from precond.lab.evidence.problems import Problem, random, relative, tanh_network
from precond.lab.evidence.statement import Chapter, Finding
from precond.optim.optimizer import PreconditionedGD
from precond.optim.optimizer.closures import LossClosure
from precond.optim.preconditioners import Fixed, Preconditioner
from precond.optim.recipes import adamw
from precond.optim.regularizers import L2, Regularizer

CHAPTER = Chapter("Regularization with preconditioning")

_ALPHA = 0.05
ON = "tanh network 13–6–3, wine"


def wine_network() -> Problem:
    return tanh_network(penalty=0.0)


def full_root(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64) + 0.5 * n**-0.5 * random(n, n, seed=2)


def one_step(problem: Problem, preconditioner: Preconditioner, regularizers: Sequence[Regularizer] = ()) -> Tensor:
    """(p − p⁺)/α of one step of the library's optimizer; p is as before afterwards."""
    p = problem.p
    optimizer = PreconditionedGD(problem.model, _ALPHA, preconditioner=preconditioner, regularizers=regularizers, engine="loop")
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
    problem, lam = wine_network(), 0.1
    P = full_root(len(problem.p))
    decayed = P @ P.T @ problem.gradient(problem.p) + 2 * lam * problem.p
    in_z = _gradient_in_z(problem, P, lambda z: lam * z.square().sum())
    ours = one_step(problem, Fixed(Dense(P)), [L2(lam, space="z")])
    return Finding(
        "error of the step, the larger of two forms, relative",
        0.0,
        max(relative(ours, decayed), relative(ours, in_z)),
        1e-11,
        on=f"{ON}, a full P",
    )


@CHAPTER.statement("l2-z-adamw", "(9)", "Adam with λ‖z‖² is torch.optim.AdamW with weight_decay = 2λ.")
def _l2_is_adamw() -> Finding:
    ours, peer = wine_network(), wine_network()
    a = ours.iterates(adamw(ours.model, 0.01, weight_decay=0.2, engine="loop"), 100)
    b = peer.iterates(torch.optim.AdamW(peer.model.parameters(), 0.01, weight_decay=0.2), 100)
    return Finding(
        "distance after 100 steps, relative to the way",
        0.0,
        float((a[-1] - b[-1]).norm() / (b[-1] - b[0]).norm()),
        1e-12,
        on=ON,
    )


@CHAPTER.statement(
    "l2-other",
    "Regularization with Preconditioning",
    "With M ≠ cI no λ′ makes λ′‖p‖² in the preconditioned loss equal to weight decay 2λp.",
)
def _no_equal_lambda() -> Finding:
    problem = wine_network()
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
        on=f"{ON}, M of AdamW after 100 steps",
    )


@CHAPTER.statement(
    "scale-adjusted",
    "Regularization with Preconditioning",
    "With M = diag(1/r), weight decay is preconditioned GD on L + λ‖p√r‖².",
)
def _scale_adjusted() -> Finding:
    problem, lam = wine_network(), 0.1
    r = random(len(problem.p), seed=5).exp()
    p = problem.p.requires_grad_()
    (g,) = torch.autograd.grad(problem.at(p) + lam * (p * r.sqrt()).square().sum(), p)
    diagonal = Diagonal(problem.pieces(r.rsqrt()))
    return Finding(
        "error of the step, relative",
        0.0,
        relative(one_step(problem, Fixed(diagonal), [L2(lam, space="z")]), g / r),
        1e-12,
        on=f"{ON}, a random r",
    )


@CHAPTER.statement(
    "l2-p",
    "(10)",
    "GD in z on L(Pz) + λ‖Pz‖² is p ← p − αM(∇L + 2λp).",
    "Printed: ∇L − 2λp. The line above it in the paper has the plus.",
)
def _l2_in_p() -> Finding:
    problem, lam = wine_network(), 0.1
    P = full_root(len(problem.p))
    in_z = _gradient_in_z(problem, P, lambda z: lam * (P @ z).square().sum())
    ours = one_step(problem, Fixed(Dense(P)), [L2(lam, space="p")])
    printed = P @ P.T @ (problem.gradient(problem.p) - 2 * lam * problem.p)
    return Finding(
        "error of the step, relative", 0.0, relative(ours, in_z), 1e-11, printed=relative(printed, in_z), on=f"{ON}, a full P"
    )


@CHAPTER.statement(
    "l2-gd",
    "Regularization with Preconditioning",
    "L2 regularization of plain GD is weight decay.",
    "Printed: “learning rate decay”. No learning rate makes up for the penalty: its term does not lie along the gradient.",
)
def _l2_of_gd() -> Finding:
    problem, lam = wine_network(), 0.1
    g, step = problem.gradient(problem.p), one_step(problem, Fixed(), [L2(lam, space="p")])
    best = (step @ g) / (g @ g) * g
    return Finding(
        "error of the step, relative (printed: at the best learning rate)", 0.0, relative(step, g + 2 * lam * problem.p), 1e-12,
        printed=relative(best, step), on=ON,
    )  # fmt: skip
