"""Layer, RMS and group normalization, which take a sample's mean and size out of it; and what is left to BNP behind them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from precond.analysis.curvature import condition_number, neuron_hessians
from precond.analysis.normalization import SampleScaling, collapse_affine
from precond.lab.evidence.problems import (
    Problem,
    extended,
    neuron_error,
    random,
    raw,
    relative,
    remembered,
    seeded,
    standardized,
)
from precond.lab.evidence.statement import Bars, Chapter, Finding

CHAPTER = Chapter("Normalization per sample: layer, RMS and group normalization")

ON = "GELU network 64–16–10 at initialization, digits"
WHERE = "beyond the paper"
SAMPLES = 16

_Norm = Callable[[bool], nn.Module]
_Sized = Callable[[int], nn.Module]
KINDS: dict[str, _Norm] = {
    "LayerNorm": lambda affine: nn.LayerNorm(SAMPLES, elementwise_affine=affine),
    "RMSNorm": lambda affine: nn.RMSNorm(SAMPLES, eps=1e-5, elementwise_affine=affine),
    "GroupNorm": lambda affine: nn.GroupNorm(4, SAMPLES, affine=affine),
}
"""By name, of ``affine``."""


def network_behind(norm: nn.Module, activation: type[nn.Module] = nn.GELU) -> Problem:
    """64–16–10 on digits, the normalization behind the activation."""
    pixels, y = raw("digits", constant=True)
    model = seeded(lambda: nn.Sequential(nn.Linear(64, SAMPLES), activation(), nn.Linear(SAMPLES, 10)), 0)
    assert isinstance(model, nn.Sequential)
    with torch.no_grad():
        for seed, p in enumerate(norm.parameters(), 8):
            p.copy_((p.ndim == 1 and seed == 8) + 0.5 * random(*p.shape, seed=seed))
    whole = nn.Sequential(model[0], model[1], norm.double(), model[2])
    return Problem(whole.eval(), nn.functional.cross_entropy, pixels / 16, y)


@remembered
def network_of_kind(kind: str, affine: bool = False, activation: type[nn.Module] = nn.GELU) -> Problem:
    return network_behind(KINDS[kind](affine) if kind != "none" else nn.Identity(), activation)


def outputs_of_layers(problem: Problem, layers: int) -> Tensor:
    """What the first layers make of the data, one row a sample."""
    assert isinstance(problem.model, nn.Sequential)
    with torch.no_grad():
        return problem.model[:layers](problem.x)


def neuron_matrices(problem: Problem) -> list[Tensor]:
    """The Hessians of the output neurons."""
    return [neuron.to_dense() for neuron in neuron_hessians(problem.objective(), "3")]


def median_kappa(matrices: list[Tensor], P: Tensor | None = None) -> float:
    """The median of κ₊(PᵀHP): normalizations that center have null directions, which no step follows."""
    products = matrices if P is None else [P.T @ A @ P for A in matrices]
    return float(torch.tensor([condition_number(A, null_tol=1e-11).kappa_positive for A in products]).median())


@CHAPTER.statement(
    "sample-hessian",
    "Theorem 3",
    "In a network of layer, RMS and group normalizations the Hessian of every neuron is H_e S H_eᵀ with a diagonal S, gradients through the "
    "statistics and all: these are a sample's own, and need not be held constant as those of BN.",
)
def _hessian() -> Finding:
    x, y = standardized("wine")
    kinds: tuple[_Sized, ...] = (nn.LayerNorm, lambda n: nn.RMSNorm(n, eps=1e-5), lambda n: nn.GroupNorm(2, n))
    problems = [Problem(seeded(partial(_deep, kind), 0), nn.functional.cross_entropy, x, y) for kind in kinds]
    worst = max(neuron_error(problem, ("0", "3", "6")) for problem in problems)
    return Finding("largest error over 51 neurons of 3 networks, relative", 0.0, worst, 1e-11, on="tanh network 13–8–6–3, wine")


def _deep(norm: _Sized) -> nn.Module:
    return nn.Sequential(nn.Linear(13, 8), norm(8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), norm(6), nn.Linear(6, 3))


@CHAPTER.statement(
    "sample-affine",
    "(22), (23)",
    "As of BN, γ and β of normalizations per sample are an over-parameterization: Ŵ = W diag(γ), b̂ = Wβ + b is the same network.",
)
def _affine() -> Finding:
    worst = 0.0
    for kind in KINDS:
        problem = network_of_kind(kind, affine=True)
        collapsed = collapse_affine(problem.model)
        left = sum(p.numel() for p in collapsed.parameters()) - sum(
            p.numel() for p in network_of_kind("none").model.parameters()
        )
        with torch.no_grad():
            worst = max(worst, relative(collapsed(problem.x), problem.model(problem.x)), float(left != 0))
    return Finding(
        "largest error of the outputs, relative, with as many parameters as without normalization", 0.0, worst, 1e-12, on=ON
    )


@CHAPTER.statement(
    "sample-columns",
    WHERE,
    "They make samples alike, not features: all columns of H̃ get the norm √n, up to ε, so that the mean eigenvalue of H̃H̃ᵀ/N is 1; rows "
    "keep their means and scales.",
)
def _columns() -> Finding:
    worst, spread = 0.0, []
    for kind in KINDS:
        problem = network_of_kind(kind)
        h, scaling = outputs_of_layers(problem, 3), SampleScaling.of(KINDS[kind](False), outputs_of_layers(problem, 2))
        ratio = (scaling.squares / scaling.sizes.square()).mean(0)
        worst = max(worst, float((h.square().mean(1) - ratio).abs().max()))
        rows = extended(h).norm(dim=1)
        spread.append((f"{kind}: largest over smallest norm of a row", float(rows.max() / rows.min())))
    return Finding("largest error of a column's mean square", 0.0, worst, 1e-12, on=ON, figure=Bars("ratio", tuple(spread)))


@CHAPTER.statement(
    "sample-product", WHERE, "H̃ = C H D: C acts on rows, as a preconditioner does, and D on columns, as none does."
)
def _product() -> Finding:
    worst = 0.0
    for kind in KINDS:
        problem = network_of_kind(kind)
        h = outputs_of_layers(problem, 2)
        scaling = SampleScaling.of(KINDS[kind](False), h)
        each = SAMPLES // len(scaling.sizes)
        product = scaling.center @ h.T / scaling.sizes.repeat_interleave(each, 0)
        worst = max(worst, relative(product, outputs_of_layers(problem, 3).T))
    return Finding("largest error against the modules, relative", 0.0, worst, 1e-12, on=ON)


@CHAPTER.statement(
    "sample-sizes",
    WHERE,
    "What D takes out of κ are the samples' sizes: behind the normalization the Hessian does not change when they do.",
)
def _sizes() -> Finding:
    pixels, _ = raw("digits", constant=True)
    sizes = 10 ** random(len(pixels), 1, seed=3).clamp(-2, 2).div(2)
    found = {}
    for name, norm in (("none", nn.Identity()), ("LayerNorm", nn.LayerNorm(64, eps=0.0, elementwise_affine=False))):
        for what, x in (("as they are", pixels / 16), ("of other sizes", sizes * pixels / 16)):
            norm_ = norm.double()
            inputs = norm_(x)[:, ::3]  # without the null direction of all 64
            inputs = inputs[:, inputs.std(0) > 0]
            found[name, what] = extended(inputs) @ extended(inputs).T / len(x)
    error = relative(found["LayerNorm", "of other sizes"], found["LayerNorm", "as they are"])
    bars = tuple((f"{name}, samples {what}", median_kappa([A])) for (name, what), A in found.items())
    return Finding(
        "error of the Hessian, relative",
        0.0,
        error,
        1e-12,
        on="linear regression, digits, sizes from 0.1 to 10",
        figure=Bars("κ", bars),
    )


@CHAPTER.statement(
    "sample-null",
    WHERE,
    "C makes the Hessian behind it singular: one null direction for layer normalization, one a group for group normalization, none for "
    "RMS normalization.",
)
def _null() -> Finding:
    found = {
        kind: SAMPLES + 1 - int(torch.linalg.matrix_rank(extended(outputs_of_layers(network_of_kind(kind), 3)), rtol=1e-10))
        for kind in KINDS
    }
    wrong = sum(abs(found[kind] - count) for kind, count in (("LayerNorm", 1), ("GroupNorm", 4), ("RMSNorm", 0)))
    return Finding("error of the number of null directions, all three", 0.0, float(wrong), on=ON)


@CHAPTER.statement(
    "sample-front",
    WHERE,
    "The layer in front of a layer normalization has a null direction for each of its inputs and for its bias, W + evᵀ; and HŴ = −∇L, which is "
    "one more at a minimum.",
)
def _front() -> Finding:
    x, y = standardized("wine")
    model = seeded(
        lambda: nn.Sequential(nn.Linear(13, 8), nn.LayerNorm(8, eps=0.0, elementwise_affine=False), nn.Tanh(), nn.Linear(8, 3)),
        0,
    )
    problem = Problem(model, nn.functional.cross_entropy, x, y)
    p = problem.p
    H, g = problem.hessian(p), problem.gradient(p)
    layer = 8 * 14
    shifts = torch.cat([torch.eye(13, dtype=p.dtype).repeat(1, 8), torch.zeros(13, 8, dtype=p.dtype)], 1)
    shifts = torch.cat([shifts, torch.cat([torch.zeros(8 * 13, dtype=p.dtype), torch.ones(8, dtype=p.dtype)])[None]])
    null = float((H[:layer, :layer] @ shifts.T).norm() / H[:layer, :layer].norm())
    return Finding(
        "the larger of ‖H [evᵀ]‖/‖H‖ and the error of HŴ = −∇L",
        0.0,
        max(null, relative(H[:layer, :layer] @ p[:layer], -g[:layer])),
        1e-10,
        on="tanh network 13–8–3, wine",
    )


@CHAPTER.statement(
    "sample-no-p",
    WHERE,
    "No preconditioner plays their part as BNP plays BN's: no P makes PᵀH_e = H̃_e, since Pᵀ combines rows and D scales columns.",
)
def _no_preconditioner() -> Finding:
    least, bars = 1.0, []
    for kind in KINDS:
        H_e, H = extended(outputs_of_layers(network_of_kind(kind), 2)), extended(outputs_of_layers(network_of_kind(kind), 3))
        P = torch.linalg.lstsq(H_e.T, H.T).solution
        off = float((P.T @ H_e - H).norm() / H[1:].norm())
        least = min(least, off)
        bars.append((f"{kind}, %", 100 * off))
    return Finding(
        "‖PᵀH_e − H̃_e‖/‖H̃‖ at the best P, the least of 3 (BNP and BN: 0)", 0.02, least, 0.0, "≥", on=ON,
        figure=Bars("what the best P leaves, in percent", tuple(bars)),
    )  # fmt: skip


@CHAPTER.statement(
    "sample-nearest",
    WHERE,
    "The nearest one that does not depend on the samples, P = diag(1, cC), misses by σ_s/√(mean of s²), s_j the size of sample j: where sizes "
    "are alike, layer normalization is one step size for w beside that of b.",
)
def _nearest() -> Finding:
    worst = 0.0
    for kind in ("LayerNorm", "RMSNorm"):
        h = outputs_of_layers(network_of_kind(kind), 2)
        norm: nn.Module = nn.LayerNorm(SAMPLES, eps=0.0) if kind == "LayerNorm" else nn.RMSNorm(SAMPLES, eps=0.0)
        scaling = SampleScaling.of(norm, h)
        s = ((h - h.mean(1, keepdim=True)) if kind == "LayerNorm" else h).square().mean(1).sqrt()
        H = scaling.center @ h.T / s
        off = (scaling.nearest().T @ extended(h))[1:] - H
        predicted = float(s.std(correction=0) / s.square().mean().sqrt())
        worst = max(worst, abs(float(off.norm() / H.norm()) / predicted - 1), abs(scaling.miss / predicted - 1))
    return Finding("largest error of the miss, relative", 0.0, worst, 1e-10, on=ON)
