"""Normalization per sample: what it does to κ, and what BNP does behind it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from precond.algebra.maps import Dense
from precond.analysis.curvature import neuron_hessian, neuron_hessians
from precond.analysis.normalization import SampleScaling
from precond.lab.evidence.persample import (
    KINDS,
    ON,
    SAMPLES,
    WHERE,
    median_kappa,
    network_behind,
    network_of_kind,
    neuron_matrices,
    outputs_of_layers,
)
from precond.lab.evidence.problems import (
    Problem,
    extended,
    map_in_force,
    of_first_neuron,
    random,
    raw,
    relative,
    seeded,
    standardized,
)
from precond.lab.evidence.statement import Bars, Chapter, Finding
from precond.optim.optimizer import PreconditionedGD
from precond.optim.preconditioners import BNP, Fixed

CHAPTER = Chapter("Normalization per sample: layer, RMS and group normalization")


@CHAPTER.statement(
    "sample-weights",
    WHERE,
    "What plays D's part is a weight for each sample: without bias, H̃SH̃ᵀ behind RMS normalization is H(DSD)Hᵀ, the Hessian of the layer "
    "without it when sample j counts 1/s_j².",
)
def _weights() -> Finding:
    problem = network_of_kind("RMSNorm")
    h, H = outputs_of_layers(problem, 2), outputs_of_layers(problem, 3).T
    weights = SampleScaling.of(KINDS["RMSNorm"](False), h).weights[0]
    worst = 0.0
    for neuron in neuron_hessians(problem.objective(), "3"):
        explicit = (h.T * (neuron.s * weights)) @ h
        worst = max(worst, relative(neuron.to_dense()[1:, 1:], explicit), relative((H * neuron.s) @ H.T, explicit))
    return Finding("largest error over 10 neurons, relative", 0.0, worst, 1e-11, on=ON)


@CHAPTER.statement(
    "sample-one",
    WHERE,
    "So with batches of one there is a preconditioner, P = I/s_j, another one for each sample: the step of a layer behind RMS normalization "
    "is that of normalized least mean squares.",
)
def _one() -> Finding:
    x, _ = standardized("wine")
    w, y, worst = random(13, seed=3), random(len(x), seed=4), 0.0
    for sample, target in zip(x[:20, None], y[:20], strict=True):
        size = sample.square().mean().sqrt()
        moved = []
        for inputs, start, P in ((sample / size, w, 1.0), (sample, w / size, float(1 / size))):
            layer = nn.Linear(13, 1, bias=False).double()
            with torch.no_grad():
                layer.weight.copy_(start)
            problem = Problem(layer, lambda out, y: 0.5 * (out[:, 0] - y).square().sum(), inputs, target[None])
            problem.iterates(
                PreconditionedGD(layer, 0.05, preconditioner=Fixed(Dense(P * torch.eye(13, dtype=torch.float64)))), 5
            )
            moved.append(problem.p * (1 if P == 1.0 else size))
        worst = max(worst, relative(moved[1], moved[0]))
    return Finding("largest distance after 5 steps, 20 samples, relative", 0.0, worst, 1e-12, on="linear regression, wine")


@CHAPTER.statement(
    "sample-tanh",
    WHERE,
    "By itself it need not improve κ of the layer behind: in a tanh network, whose samples have like sizes, it makes κ worse.",
)
def _tanh() -> Finding:
    kappas = {kind: median_kappa(neuron_matrices(network_of_kind(kind, activation=nn.Tanh))) for kind in ("none", *KINDS)}
    return Finding(
        "least κ₊ with it over κ without, of 3, median of 10 neurons", 1.0, min(kappas[kind] for kind in KINDS) / kappas["none"], 0.0, "≥",
        on="tanh network 64–16–10 at initialization, digits", figure=Bars("κ₊", tuple(kappas.items())),
    )  # fmt: skip


@CHAPTER.statement("sample-batch", WHERE, "BN in its place conditions the layer behind better, at least tenfold.")
def _against_batch() -> Finding:
    kappas = {kind: median_kappa(neuron_matrices(network_of_kind(kind))) for kind in ("none", *KINDS)}
    h = outputs_of_layers(network_of_kind("none"), 3)
    norm = nn.BatchNorm1d(SAMPLES, affine=False, eps=0.0).double()
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_(h.mean(0))
    norm.running_var.copy_(h.var(0, correction=0))
    kappas["BatchNorm"] = median_kappa(neuron_matrices(network_behind(norm)))
    return Finding(
        "least κ₊ with it over κ with BN, of 3, median of 10 neurons", 10.0, min(kappas[kind] for kind in KINDS) / kappas["BatchNorm"], 0.0, "≥",
        on=ON, figure=Bars("κ₊", tuple(kappas.items())),
    )  # fmt: skip


@CHAPTER.statement(
    "sample-means",
    WHERE,
    "Rows are not centered by it, and that is what κ behind it is made of: centering alone improves κ at least tenfold.",
)
def _means() -> Finding:
    least = torch.inf
    bars = []
    for kind in KINDS:
        matrices, h = neuron_matrices(network_of_kind(kind)), outputs_of_layers(network_of_kind(kind), 3)
        U = torch.eye(SAMPLES + 1, dtype=torch.float64)
        U[0, 1:] = -h.mean(0)
        before, after = median_kappa(matrices), median_kappa(matrices, U)
        bars += [(kind, before), (f"{kind}, centered", after)]
        least = min(least, before / after)
    return Finding(
        "least κ(H)/κ(UᵀHU) of 3, median of 10 neurons", 10.0, least, 0.0, "≥", on=ON, figure=Bars("κ₊", tuple(bars))
    )


def _bnp(problem: Problem) -> Tensor:
    """P of the library's BNP in the last layer, one neuron's [b; w] as rows."""
    return of_first_neuron(map_in_force(problem, BNP(decay=0.0, damping=0.0), ["3.weight", "3.bias"]), SAMPLES)


@CHAPTER.statement(
    "sample-bnp",
    WHERE,
    "BNP in the layer behind still improves κ, at least tenfold: it standardizes what normalization per sample leaves.",
)
def _bnp_behind() -> Finding:
    bars, worst = [], 0.0
    for kind in ("none", *KINDS):
        matrices = neuron_matrices(network_of_kind(kind))
        before, after = median_kappa(matrices), median_kappa(matrices, _bnp(network_of_kind(kind)))
        bars += [(kind, before), (f"{kind}, BNP behind it", after)]
        worst = max(worst, after / before) if kind != "none" else worst
    return Finding(
        "largest κ(PᵀHP)/κ(H) of 3, median of 10 neurons", 0.1, worst, 0.0, "≤", on=ON, figure=Bars("κ₊", tuple(bars))
    )


@CHAPTER.statement(
    "sample-bnp-affine",
    WHERE,
    "BNP behind them does not see γ and β: whatever they are, G_e = PᵀH_e is the same, up to the signs of γ.",
)
def _bnp_and_affine() -> Finding:
    worst = 0.0
    for kind in KINDS:
        plain, affine = network_of_kind(kind), network_of_kind(kind, affine=True)
        G, G_affine = (_bnp(p).T @ extended(outputs_of_layers(p, 3)) for p in (plain, affine))
        norm = affine.model[2]  # type: ignore[index]
        signs = torch.cat([torch.ones(1, dtype=torch.float64), norm.weight.detach().sign()])
        worst = max(worst, relative(signs[:, None] * G_affine, G))
    return Finding("largest error of G_e, relative", 0.0, worst, 1e-10, on=ON)


@CHAPTER.statement(
    "sample-instance",
    WHERE,
    "With as many groups as channels normalization per sample is instance normalization, which standardizes channels, too: BNP behind it is "
    "the identity.",
)
def _instance() -> Finding:
    pixels, y = raw("digits", constant=True)
    model = seeded(
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 6, 3), nn.Tanh(), nn.GroupNorm(6, 6, eps=0.0, affine=False),
            nn.Conv2d(6, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 10),
        ),
        0,
    )  # fmt: skip
    problem = Problem(model, nn.functional.cross_entropy, pixels[:200] / 16, y[:200])
    P = map_in_force(problem, BNP(decay=0.0, damping=0.0), ["4.weight", "4.bias"])
    return Finding("‖P − I‖/‖I‖", 0.0, relative(P, torch.eye(len(P), dtype=P.dtype)), 1e-11, on="conv net on 200 digits")


@CHAPTER.statement(
    "sample-centering-bias",
    WHERE,
    "Without a bias in the layer behind, BNP cannot center, and gains less there.",
)
def _without_bias() -> Finding:
    least = torch.inf
    for kind in KINDS:
        whole = [neuron_hessian(network_of_kind(kind).objective(), "3", unit).to_dense()[1:, 1:] for unit in range(10)]
        h = outputs_of_layers(network_of_kind(kind), 3)
        scaled = median_kappa(whole, torch.diag(h.square().mean(0).rsqrt()))
        least = min(least, scaled / median_kappa(neuron_matrices(network_of_kind(kind)), _bnp(network_of_kind(kind))))
    return Finding("least κ scaled without bias over κ of BNP with it, of 3", 1.0, least, 0.0, "≥", on=ON)
