"""Layer, RMS and group normalization, which take a sample's mean and size out of it; and what is left to BNP behind them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from precond.algebra.maps import Dense
from precond.analysis.curvature import condition_number, neuron_hessian, neuron_hessians
from precond.analysis.normalization import SampleScaling, collapse_affine
from precond.lab.evidence.problems import (
    Problem,
    extended,
    map_in_force,
    neuron_error,
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

CHAPTER = Chapter("Normalization per sample: layer, RMS and group normalization")

_ON = "GELU network 64–16–10 at initialization, digits"
_WHERE = "beyond the paper"
_N = 16

_Norm = Callable[[bool], nn.Module]
_Sized = Callable[[int], nn.Module]
KINDS: dict[str, _Norm] = {
    "LayerNorm": lambda affine: nn.LayerNorm(_N, elementwise_affine=affine),
    "RMSNorm": lambda affine: nn.RMSNorm(_N, eps=1e-5, elementwise_affine=affine),
    "GroupNorm": lambda affine: nn.GroupNorm(4, _N, affine=affine),
}
"""By name, of ``affine``."""


def _behind(norm: nn.Module, activation: type[nn.Module] = nn.GELU) -> Problem:
    """64–16–10 on digits, the normalization behind the activation."""
    pixels, y = raw("digits", constant=True)
    model = seeded(lambda: nn.Sequential(nn.Linear(64, _N), activation(), nn.Linear(_N, 10)), 0)
    assert isinstance(model, nn.Sequential)
    with torch.no_grad():
        for seed, p in enumerate(norm.parameters(), 8):
            p.copy_((p.ndim == 1 and seed == 8) + 0.5 * random(*p.shape, seed=seed))
    whole = nn.Sequential(model[0], model[1], norm.double(), model[2])
    return Problem(whole.eval(), nn.functional.cross_entropy, pixels / 16, y)


@remembered
def _network(kind: str, affine: bool = False, activation: type[nn.Module] = nn.GELU) -> Problem:
    return _behind(KINDS[kind](affine) if kind != "none" else nn.Identity(), activation)


def _through(problem: Problem, layers: int) -> Tensor:
    """What the first layers make of the data, one row a sample."""
    assert isinstance(problem.model, nn.Sequential)
    with torch.no_grad():
        return problem.model[:layers](problem.x)


def _matrices(problem: Problem) -> list[Tensor]:
    """The Hessians of the output neurons."""
    return [neuron.to_dense() for neuron in neuron_hessians(problem.objective(), "3")]


def _kappa(matrices: list[Tensor], P: Tensor | None = None) -> float:
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
        problem = _network(kind, affine=True)
        collapsed = collapse_affine(problem.model)
        left = sum(p.numel() for p in collapsed.parameters()) - sum(p.numel() for p in _network("none").model.parameters())
        with torch.no_grad():
            worst = max(worst, relative(collapsed(problem.x), problem.model(problem.x)), float(left != 0))
    return Finding(
        "largest error of the outputs, relative, with as many parameters as without normalization", 0.0, worst, 1e-12, on=_ON
    )


@CHAPTER.statement(
    "sample-columns",
    _WHERE,
    "They make samples alike, not features: all columns of H̃ get the norm √n, up to ε, so that the mean eigenvalue of H̃H̃ᵀ/N is 1; rows "
    "keep their means and scales.",
)
def _columns() -> Finding:
    worst, spread = 0.0, []
    for kind in KINDS:
        problem = _network(kind)
        h, scaling = _through(problem, 3), SampleScaling.of(KINDS[kind](False), _through(problem, 2))
        ratio = (scaling.squares / scaling.sizes.square()).mean(0)
        worst = max(worst, float((h.square().mean(1) - ratio).abs().max()))
        rows = extended(h).norm(dim=1)
        spread.append((f"{kind}: largest over smallest norm of a row", float(rows.max() / rows.min())))
    return Finding("largest error of a column's mean square", 0.0, worst, 1e-12, on=_ON, figure=Bars("ratio", tuple(spread)))


@CHAPTER.statement(
    "sample-product", _WHERE, "H̃ = C H D: C acts on rows, as a preconditioner does, and D on columns, as none does."
)
def _product() -> Finding:
    worst = 0.0
    for kind in KINDS:
        problem = _network(kind)
        h = _through(problem, 2)
        scaling = SampleScaling.of(KINDS[kind](False), h)
        each = _N // len(scaling.sizes)
        product = scaling.center @ h.T / scaling.sizes.repeat_interleave(each, 0)
        worst = max(worst, relative(product, _through(problem, 3).T))
    return Finding("largest error against the modules, relative", 0.0, worst, 1e-12, on=_ON)


@CHAPTER.statement(
    "sample-sizes",
    _WHERE,
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
    bars = tuple((f"{name}, samples {what}", _kappa([A])) for (name, what), A in found.items())
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
    _WHERE,
    "C makes the Hessian behind it singular: one null direction for layer normalization, one a group for group normalization, none for "
    "RMS normalization.",
)
def _null() -> Finding:
    found = {kind: _N + 1 - int(torch.linalg.matrix_rank(extended(_through(_network(kind), 3)), rtol=1e-10)) for kind in KINDS}
    wrong = sum(abs(found[kind] - count) for kind, count in (("LayerNorm", 1), ("GroupNorm", 4), ("RMSNorm", 0)))
    return Finding("error of the number of null directions, all three", 0.0, float(wrong), on=_ON)


@CHAPTER.statement(
    "sample-front",
    _WHERE,
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
    _WHERE,
    "No preconditioner plays their part as BNP plays BN's: no P makes PᵀH_e = H̃_e, since Pᵀ combines rows and D scales columns.",
)
def _no_preconditioner() -> Finding:
    least, bars = 1.0, []
    for kind in KINDS:
        H_e, H = extended(_through(_network(kind), 2)), extended(_through(_network(kind), 3))
        P = torch.linalg.lstsq(H_e.T, H.T).solution
        off = float((P.T @ H_e - H).norm() / H[1:].norm())
        least = min(least, off)
        bars.append((f"{kind}, %", 100 * off))
    return Finding(
        "‖PᵀH_e − H̃_e‖/‖H̃‖ at the best P, the least of 3 (BNP and BN: 0)", 0.02, least, 0.0, "≥", on=_ON,
        figure=Bars("what the best P leaves, in percent", tuple(bars)),
    )  # fmt: skip


@CHAPTER.statement(
    "sample-nearest",
    _WHERE,
    "The nearest one that does not depend on the samples, P = diag(1, cC), misses by σ_s/√(mean of s²), s_j the size of sample j: where sizes "
    "are alike, layer normalization is one step size for w beside that of b.",
)
def _nearest() -> Finding:
    worst = 0.0
    for kind in ("LayerNorm", "RMSNorm"):
        h = _through(_network(kind), 2)
        norm: nn.Module = nn.LayerNorm(_N, eps=0.0) if kind == "LayerNorm" else nn.RMSNorm(_N, eps=0.0)
        scaling = SampleScaling.of(norm, h)
        s = ((h - h.mean(1, keepdim=True)) if kind == "LayerNorm" else h).square().mean(1).sqrt()
        H = scaling.center @ h.T / s
        off = (scaling.nearest().T @ extended(h))[1:] - H
        predicted = float(s.std(correction=0) / s.square().mean().sqrt())
        worst = max(worst, abs(float(off.norm() / H.norm()) / predicted - 1), abs(scaling.miss / predicted - 1))
    return Finding("largest error of the miss, relative", 0.0, worst, 1e-10, on=_ON)


@CHAPTER.statement(
    "sample-weights",
    _WHERE,
    "What plays D's part is a weight for each sample: without bias, H̃SH̃ᵀ behind RMS normalization is H(DSD)Hᵀ, the Hessian of the layer "
    "without it when sample j counts 1/s_j².",
)
def _weights() -> Finding:
    problem = _network("RMSNorm")
    h, H = _through(problem, 2), _through(problem, 3).T
    weights = SampleScaling.of(KINDS["RMSNorm"](False), h).weights[0]
    worst = 0.0
    for neuron in neuron_hessians(problem.objective(), "3"):
        explicit = (h.T * (neuron.s * weights)) @ h
        worst = max(worst, relative(neuron.to_dense()[1:, 1:], explicit), relative((H * neuron.s) @ H.T, explicit))
    return Finding("largest error over 10 neurons, relative", 0.0, worst, 1e-11, on=_ON)


@CHAPTER.statement(
    "sample-one",
    _WHERE,
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
    _WHERE,
    "By itself it need not improve κ of the layer behind: in a tanh network, whose samples have like sizes, it makes κ worse.",
)
def _tanh() -> Finding:
    kappas = {kind: _kappa(_matrices(_network(kind, activation=nn.Tanh))) for kind in ("none", *KINDS)}
    return Finding(
        "least κ₊ with it over κ without, of 3, median of 10 neurons", 1.0, min(kappas[kind] for kind in KINDS) / kappas["none"], 0.0, "≥",
        on="tanh network 64–16–10 at initialization, digits", figure=Bars("κ₊", tuple(kappas.items())),
    )  # fmt: skip


@CHAPTER.statement("sample-batch", _WHERE, "BN in its place conditions the layer behind better, at least tenfold.")
def _against_batch() -> Finding:
    kappas = {kind: _kappa(_matrices(_network(kind))) for kind in ("none", *KINDS)}
    h = _through(_network("none"), 3)
    norm = nn.BatchNorm1d(_N, affine=False, eps=0.0).double()
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_(h.mean(0))
    norm.running_var.copy_(h.var(0, correction=0))
    kappas["BatchNorm"] = _kappa(_matrices(_behind(norm)))
    return Finding(
        "least κ₊ with it over κ with BN, of 3, median of 10 neurons", 10.0, min(kappas[kind] for kind in KINDS) / kappas["BatchNorm"], 0.0, "≥",
        on=_ON, figure=Bars("κ₊", tuple(kappas.items())),
    )  # fmt: skip


@CHAPTER.statement(
    "sample-means",
    _WHERE,
    "Rows are not centered by it, and that is what κ behind it is made of: centering alone improves κ at least tenfold.",
)
def _means() -> Finding:
    least = torch.inf
    bars = []
    for kind in KINDS:
        matrices, h = _matrices(_network(kind)), _through(_network(kind), 3)
        U = torch.eye(_N + 1, dtype=torch.float64)
        U[0, 1:] = -h.mean(0)
        before, after = _kappa(matrices), _kappa(matrices, U)
        bars += [(kind, before), (f"{kind}, centered", after)]
        least = min(least, before / after)
    return Finding(
        "least κ(H)/κ(UᵀHU) of 3, median of 10 neurons", 10.0, least, 0.0, "≥", on=_ON, figure=Bars("κ₊", tuple(bars))
    )


def _bnp(problem: Problem) -> Tensor:
    """P of the library's BNP in the last layer, one neuron's [b; w] as rows."""
    return of_first_neuron(map_in_force(problem, BNP(decay=0.0, damping=0.0), ["3.weight", "3.bias"]), _N)


@CHAPTER.statement(
    "sample-bnp",
    _WHERE,
    "BNP in the layer behind still improves κ, at least tenfold: it standardizes what normalization per sample leaves.",
)
def _bnp_behind() -> Finding:
    bars, worst = [], 0.0
    for kind in ("none", *KINDS):
        matrices = _matrices(_network(kind))
        before, after = _kappa(matrices), _kappa(matrices, _bnp(_network(kind)))
        bars += [(kind, before), (f"{kind}, BNP behind it", after)]
        worst = max(worst, after / before) if kind != "none" else worst
    return Finding(
        "largest κ(PᵀHP)/κ(H) of 3, median of 10 neurons", 0.1, worst, 0.0, "≤", on=_ON, figure=Bars("κ₊", tuple(bars))
    )


@CHAPTER.statement(
    "sample-bnp-affine",
    _WHERE,
    "BNP behind them does not see γ and β: whatever they are, G_e = PᵀH_e is the same, up to the signs of γ.",
)
def _bnp_and_affine() -> Finding:
    worst = 0.0
    for kind in KINDS:
        plain, affine = _network(kind), _network(kind, affine=True)
        G, G_affine = (_bnp(p).T @ extended(_through(p, 3)) for p in (plain, affine))
        norm = affine.model[2]  # type: ignore[index]
        signs = torch.cat([torch.ones(1, dtype=torch.float64), norm.weight.detach().sign()])
        worst = max(worst, relative(signs[:, None] * G_affine, G))
    return Finding("largest error of G_e, relative", 0.0, worst, 1e-10, on=_ON)


@CHAPTER.statement(
    "sample-instance",
    _WHERE,
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
    _WHERE,
    "Without a bias in the layer behind, BNP cannot center, and gains less there.",
)
def _without_bias() -> Finding:
    least = torch.inf
    for kind in KINDS:
        whole = [neuron_hessian(_network(kind).objective(), "3", unit).to_dense()[1:, 1:] for unit in range(10)]
        h = _through(_network(kind), 3)
        scaled = _kappa(whole, torch.diag(h.square().mean(0).rsqrt()))
        least = min(least, scaled / _kappa(_matrices(_network(kind)), _bnp(_network(kind))))
    return Finding("least κ scaled without bias over κ of BNP with it, of 3", 1.0, least, 0.0, "≥", on=_ON)
