"""Batch normalization, and batch normalization preconditioning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from precond.analysis.curvature import condition_number, neuron_hessians
from precond.analysis.normalization import collapse_affine, fold_batchnorm
from precond.lab.evidence.problems import (
    Problem,
    extended,
    map_in_force,
    of_first_neuron,
    random,
    raw,
    relative,
    remembered,
    seeded,
    standardized,
)
from precond.lab.evidence.statement import Bars, Chapter, Finding
from precond.optim.optimizer import PreconditionedGD
from precond.optim.preconditioners import BNP, Fixed

CHAPTER = Chapter("Batch normalization and BNP")

_ON = "ReLU network 64–16–10 at initialization, digits"


def _network(x: Tensor) -> nn.Sequential:
    """The first of which every unit fires for a twentieth of the samples."""
    for attempt in range(50):
        model = seeded(lambda: nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), attempt)
        assert isinstance(model, nn.Sequential)
        if bool(((model[0](x) > 0).double().mean(0) > 0.05).all()):
            return model
    raise RuntimeError("each of 50 networks has a unit that hardly fires")


def _problem(with_norm: bool = False, affine: bool = False) -> Problem:
    """64–16–10 with ReLU on digits, of which no unit is dead; with batch normalization behind the ReLU, its statistics those of all samples."""
    pixels, y = raw("digits", constant=True)
    x = pixels / 16
    model = _network(x)
    if with_norm:
        norm = nn.BatchNorm1d(16, eps=1e-5 if affine else 0.0, affine=affine).double()
        with torch.no_grad():
            h = model[1](model[0](x))
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.copy_(h.mean(0))
            norm.running_var.copy_(h.var(0, correction=0))
            if affine:
                norm.weight.copy_(1 + 0.5 * random(16, seed=8))
                norm.bias.copy_(random(16, seed=9))
        model = nn.Sequential(model[0], model[1], norm, model[2])
    return Problem(model.eval(), nn.functional.cross_entropy, x, y)


def _hidden(problem: Problem) -> Tensor:
    """What the last layer sees, one row a sample."""
    assert isinstance(problem.model, nn.Sequential)
    with torch.no_grad():
        return problem.model[:-1](problem.x)


def _factors(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, D and P = U D of (25)."""
    mean, std = h.mean(0), h.std(0, correction=0)
    U = torch.eye(len(mean) + 1, dtype=h.dtype)
    U[0, 1:] = -mean
    D = torch.diag(1 / torch.cat([torch.ones(1, dtype=h.dtype), std]))
    return U, D, U @ D


@dataclass(frozen=True, eq=False)
class _Observed:
    """A problem, and P of the library's BNP in the last layer, one neuron's [b; w] as rows."""

    problem: Problem
    P: Tensor


@remembered
def _observed() -> _Observed:
    problem = _problem()
    whole = map_in_force(problem, BNP(decay=0.0, damping=0.0), ["2.weight", "2.bias"])
    return _Observed(problem, of_first_neuron(whole, 16))


@CHAPTER.statement(
    "affine",
    "after (23)",
    "BN's γ and β are an over-parameterization: Ŵ = W diag(γ), b̂ = Wβ + b and B₀,₁ are the same network.",
)
def _affine() -> Finding:
    problem = _problem(with_norm=True, affine=True)
    problem.model.train()
    with torch.no_grad():
        off = relative(collapse_affine(problem.model).train()(problem.x), problem.model(problem.x))
    return Finding("error of the outputs in training, relative", 0.0, off, 1e-12, on=_ON)


@CHAPTER.statement(
    "affine-inference", "after (23)", "At inference the whole BN, with its running statistics, is a change of Ŵ and b̂."
)
def _folded() -> Finding:
    problem = _problem(with_norm=True, affine=True)
    with torch.no_grad():
        off = relative(fold_batchnorm(problem.model)(problem.x), problem.model(problem.x))
    return Finding("error of the outputs, relative", 0.0, off, 1e-12, on=_ON)


@CHAPTER.statement("bn-hessian", "before (24)", "With constant statistics the Hessian behind BN is H̃_e S H̃_eᵀ, H̃ standardized.")
def _bn_hessian() -> Finding:
    problem = _problem(with_norm=True)
    h = _hidden(_problem())
    H_e = extended((h - h.mean(0)) / h.std(0, correction=0))
    logits = (problem.model(problem.x)).detach().softmax(1)
    worst = 0.0
    for neuron in neuron_hessians(problem.objective(), "3"):
        y = logits[:, neuron.unit]
        worst = max(worst, relative(neuron.to_dense(), (H_e * (y * (1 - y) / len(y))) @ H_e.T))
    return Finding("largest error over 10 neurons, relative", 0.0, worst, 1e-11, on=_ON)


def _median_kappa(matrices: list[Tensor]) -> float:
    return float(torch.tensor([condition_number(A).kappa for A in matrices]).median())


@CHAPTER.statement("bn-kappa", "after (24)", "So BN improves κ of the Hessian behind it.")
def _bn_kappa() -> Finding:
    before = [n.conditioning().kappa for n in neuron_hessians(_problem().objective(), "2")]
    after = [n.conditioning().kappa for n in neuron_hessians(_problem(with_norm=True).objective(), "3")]
    return Finding(
        "largest κ with BN over κ without, 10 neurons",
        1.0,
        max(a / b for a, b in zip(after, before, strict=True)),
        0.0,
        "≤",
        on=_ON,
    )


@CHAPTER.statement("bnp-map", "(25)", "BNP's map is P = U D: centering, then scaling.")
def _bnp_map() -> Finding:
    seen = _observed()
    _, _, P = _factors(_hidden(seen.problem))
    return Finding("error of P, relative", 0.0, relative(seen.P, P), 1e-11, on=_ON)


@CHAPTER.statement("bnp-inputs", "(26)", "G_e = PᵀH_e has a row of ones and the standardized rows of H.")
def _bnp_inputs() -> Finding:
    seen = _observed()
    h = _hidden(seen.problem)
    G_e = seen.P.T @ extended(h)
    return Finding(
        "error of G_e, relative", 0.0, relative(G_e, extended((h - h.mean(0)) / h.std(0, correction=0))), 1e-11, on=_ON
    )


@CHAPTER.statement(
    "bnp-hessian",
    "before (26)",
    "The Hessian in z is G_e S G_eᵀ.",
    "Printed: G_e S G_e, a product that is not defined for 17 × 1797 matrices.",
)
def _bnp_hessian() -> Finding:
    seen = _observed()
    G_e = seen.P.T @ extended(_hidden(seen.problem))
    s = neuron_hessians(seen.problem.objective(), "2", [0])[0].s
    hidden, (*_, W, b) = _hidden(seen.problem), seen.problem.pieces(seen.problem.p)

    def loss(z: Tensor) -> Tensor:  # of the coordinates of neuron 0
        w = seen.P @ z
        others = hidden @ W[1:].T + b[1:]
        return seen.problem.loss(torch.cat([(w[0] + hidden @ w[1:])[:, None], others], 1), seen.problem.y)

    explicit = torch.autograd.functional.hessian(loss, torch.linalg.solve(seen.P, torch.cat([b[:1], W[0]])))
    return Finding("error, relative", 0.0, relative((G_e * s) @ G_e.T, explicit), 1e-10, on=_ON)


@CHAPTER.statement("bnp-kappa", "after (26)", "BNP improves κ of the Hessian, by centering and by scaling: both are needed.")
def _bnp_kappa() -> Finding:
    seen = _observed()
    matrices = [n.to_dense() for n in neuron_hessians(seen.problem.objective(), "2")]
    U, D, _ = _factors(_hidden(seen.problem))
    in_z = {"none": torch.eye(len(U), dtype=torch.float64), "centering": U, "scaling": D, "BNP": seen.P}
    kappas = {name: _median_kappa([P.T @ A @ P for A in matrices]) for name, P in in_z.items()}
    best_half = min(kappas["none"], kappas["centering"], kappas["scaling"])
    return Finding(
        "median κ of 10 neurons, at most that of none or of one half",
        best_half,
        kappas["BNP"],
        0.0,
        "≤",
        on=_ON,
        figure=Bars("κ(PᵀHP), median of 10 neurons", tuple(kappas.items())),
    )


@CHAPTER.statement("bnp-vectors", "(27)", "P and Pᵀ take vector operations alone: dw = (g_w − g_b μ)/σ², db = g_b − μᵀdw.")
def _vectors() -> Finding:
    seen = _observed()
    h = _hidden(seen.problem)
    mean, variance = h.mean(0), h.var(0, correction=0)
    M = seen.P @ seen.P.T
    worst = 0.0
    for g in random(10, len(M), seed=10):
        dw = (g[1:] - g[0] * mean) / variance
        worst = max(worst, relative(torch.cat([(g[0] - mean @ dw)[None], dw]), M @ g))
    return Finding("largest error against PPᵀg, 10 random g, relative", 0.0, worst, 1e-11, on=_ON)


@CHAPTER.statement("bnp-step", "(27)", "A step of BNP in every layer is (27) with the statistics of what the layer sees.")
def _bnp_step() -> Finding:
    problem = _problem()
    problem.model.train()
    model = problem.model
    assert isinstance(model, nn.Sequential)
    p, g = problem.p, problem.pieces(problem.gradient(problem.p))
    expected = []
    for h, gw, gb in ((problem.x, g[0], g[1]), (_hidden(problem), g[2], g[3])):
        mean, variance = h.mean(0), h.var(0, correction=0)
        still = variance == 0  # the pixels in the corners: no gradient, no step
        dw = torch.where(still, 0.0, (gw - gb[:, None] * mean) / variance.masked_fill(still, 1.0))
        expected += [dw.flatten(), gb - dw @ mean]
    optimizer = PreconditionedGD(model, 0.1, preconditioner=BNP(decay=0.0, damping=0.0))
    optimizer.step(problem.closure())
    return Finding("error of the step, relative", 0.0, relative((p - problem.p) / 0.1, torch.cat(expected)), 1e-10, on=_ON)


@CHAPTER.statement("bnp-standardized", "after (26)", "In the input layer BNP is GD on the standardized data, step for step.")
def _bnp_is_standardization() -> Finding:
    x, y = raw("wine")
    z, _ = standardized("wine")
    mean, std = x.mean(0), x.std(0, correction=0)
    plain = Problem(seeded(lambda: nn.Linear(13, 3), 0), nn.functional.cross_entropy, z, y)
    bnp = Problem(seeded(lambda: nn.Linear(13, 3), 0), nn.functional.cross_entropy, x, y)
    W, b = plain.pieces(plain.p)
    bnp.set(torch.cat([(W / std).flatten(), b - (W / std) @ mean]))
    plain.iterates(PreconditionedGD(plain.model, 0.5, preconditioner=Fixed()), 200)
    bnp.iterates(PreconditionedGD(bnp.model, 0.5, preconditioner=BNP(decay=0.0, damping=0.0)), 200)
    with torch.no_grad():
        return Finding(
            "error of the outputs after 200 steps, relative",
            0.0,
            relative(bnp.model(x), plain.model(z)),
            1e-9,
            on="softmax regression, wine, raw",
        )
