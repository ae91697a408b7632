"""Theorem 3, and normalization of the inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from precond.analysis.curvature import neuron_hessian, neuron_hessians
from precond.analysis.normalization import MinMax, Standardize
from precond.lab.evidence.problems import (
    Problem,
    extended,
    generator,
    half_square,
    logistic,
    neuron_block,
    neuron_error,
    random,
    raw,
    relative,
    remembered,
    seeded,
    standardized,
)
from precond.lab.evidence.statement import Bars, Chapter, Finding, Line, Plot

CHAPTER = Chapter("Normalization as preconditioning: Theorem 3 and the inputs")

_SETS = ("wine", "breast cancer", "digits")
_ON_SETS = "wine, breast cancer, digits"


@remembered
def _deep() -> Problem:
    x, y = standardized("wine")
    model = seeded(lambda: nn.Sequential(nn.Linear(13, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)), 0)
    return Problem(model, nn.functional.cross_entropy, x, y)


@remembered
def _convolutional() -> Problem:
    pixels, y = raw("digits", constant=True)
    model = seeded(
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 3, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 10)
        ),
        0,
    )
    return Problem(model, nn.functional.cross_entropy, pixels[:200] / 16, y[:200])


@CHAPTER.statement(
    "neuron", "Theorem 3, (16)", "The Hessian by a neuron's weights is H_e S H_eᵀ with S = diag(L″)/N, in every layer."
)
def _theorem3() -> Finding:
    return Finding(
        "largest error over 17 neurons of 3 layers, relative",
        0.0,
        neuron_error(_deep(), ("0", "2", "4")),
        1e-11,
        on="tanh network 13–8–6–3, wine",
    )


@CHAPTER.statement(
    "neuron-conv",
    "Theorem 3, (16)",
    "The same for a convolution.",
    "Printed for layers that meet a sample once. A convolution meets it at T positions: S has one T×T block per sample, and its diagonal "
    "alone is wrong.",
)
def _theorem3_conv() -> Finding:
    problem = _convolutional()
    H = problem.hessian(problem.p)
    diagonal = 0.0
    for neuron in neuron_hessians(problem.objective(), "1"):
        s = neuron.s.diagonal(dim1=1, dim2=2).flatten()
        diagonal = max(diagonal, relative((neuron.H_e * s) @ neuron.H_e.T, neuron_block(problem, H, "1", neuron.unit)))
    return Finding(
        "largest error over 3 channels, relative",
        0.0,
        neuron_error(problem, ("1",)),
        1e-11,
        printed=diagonal,
        on="conv net on 200 digits",
    )


@CHAPTER.statement("linear-regression", "after Theorem 3", "Linear regression: ∇²L = X_e X_eᵀ/N.")
def _linear_regression() -> Finding:
    x, _ = raw("breast cancer")
    problem = Problem(seeded(lambda: nn.Linear(x.shape[1] - 1, 1), 0), half_square, x[:, 1:], x[:, :1])
    X_e = extended(x[:, 1:])
    ours = neuron_hessian(problem.objective(), "", 0).to_dense()
    return Finding("error, relative", 0.0, relative(ours, X_e @ X_e.T / len(x)), 1e-12, on="breast cancer, raw")


@CHAPTER.statement("logistic-regression", "after Theorem 3", "Logistic regression: ∇²L = X_e S X_eᵀ, S = diag(ŷ(1 − ŷ))/N.")
def _logistic_regression() -> Finding:
    problem = _classifier("breast cancer", standardized("breast cancer")[0])
    X_e = extended(problem.x)
    s = torch.sigmoid(problem.model(problem.x)[:, 0].detach())
    explicit = X_e @ torch.diag(s * (1 - s) / len(s)) @ X_e.T
    ours = neuron_hessian(problem.objective(), "", 0).to_dense()
    return Finding("error, relative", 0.0, relative(ours, explicit), 1e-12, on="breast cancer, standardized")


def _classifier(name: str, x: Tensor) -> Problem:
    """Logistic regression of one class against the rest with random weights."""
    return Problem(seeded(lambda: nn.Linear(x.shape[1], 1), 1), logistic, x, (raw(name)[1] == 0).double())


@CHAPTER.statement("bound", "after (20)", "κ(∇²L) ≤ κ(X_e)²κ(S).")
def _bound() -> Finding:
    worst = 0.0
    for name in ("wine", "breast cancer"):
        for x in (standardized(name)[0], MinMax().fit(raw(name)[0]).transform(raw(name)[0])):
            neuron = neuron_hessian(_classifier(name, x).objective(), "", 0)
            worst = max(worst, neuron.conditioning().kappa / neuron.bound)
    return Finding(
        "largest κ(∇²L)/(κ(X_e)²κ(S)) of 4",
        1.0,
        worst,
        0.0,
        "≤",
        on="logistic regression, wine and breast cancer, standardized and min–max",
    )


@CHAPTER.statement(
    "bound-hidden",
    "after (20)",
    "In hidden layers S is seldom definite, so that the bound does not apply there.",
    "Printed without the condition that S be positive definite, which S of a convex output layer is, and of a hidden layer need not be.",
)
def _bound_hidden() -> Finding:
    objective = _deep().objective()
    hidden = [*neuron_hessians(objective, "0"), *neuron_hessians(objective, "2")]
    negative = sum(n.signs.negative for n in hidden) / sum(len(n.curvatures) for n in hidden)
    output = neuron_hessians(objective, "4")
    return Finding(
        "share of negative L″ in hidden layers (printed: of the output layer)", 0.05, negative, 0.0, "≥",
        printed=sum(n.signs.negative for n in output) / sum(len(n.curvatures) for n in output),
        on="tanh network 13–8–6–3 at initialization, wine",
    )  # fmt: skip


def _kappa(A: Tensor) -> float:
    s = torch.linalg.svdvals(A)
    return float(s[0] / s[-1])


def _full_rank(name: str) -> Tensor:
    """Raw features whose X_e has full row rank; those of digits that are active in at least 50 samples."""
    x, _ = raw(name)
    return x[:, (x != x[0]).sum(0) >= 50] if name == "digits" else x


@CHAPTER.statement(
    "rows-standardized", "Input Data Normalization", "Standardized, all rows of X̃_e have norm √N, also the row of ones."
)
def _rows() -> Finding:
    worst = 0.0
    for name in _SETS:
        x = _full_rank(name)
        norms = extended(Standardize().fit(x).transform(x)).norm(dim=1)
        worst = max(worst, float((norms / len(x) ** 0.5 - 1).abs().max()))
    return Finding("largest error of a norm, relative", 0.0, worst, 1e-12, on=_ON_SETS)


@CHAPTER.statement("centering", "Theorem 4", "Centering never worsens κ(X_e).")
def _theorem4() -> Finding:
    draw = generator(6)
    ratios = []
    for name in _SETS:
        x = _full_rank(name)
        for _ in range(200):
            count = int(torch.randint(2, x.shape[1] + 1, (), generator=draw))
            part = x[:, torch.randperm(x.shape[1], generator=draw)[:count]]
            ratios.append(_kappa(extended(part - part.mean(0))) / _kappa(extended(part)))
    return Finding("largest κ(centered)/κ(raw) over 600 random subsets of features", 1.0, max(ratios), 1e-9, "≤", on=_ON_SETS)


@CHAPTER.statement(
    "centering-amount",
    "after Theorem 4",
    "How much centering improves depends on how large μ is; centered data stay as they are.",
)
def _amount() -> Finding:
    x, _ = standardized("wine")
    shifts = [10.0 ** (k / 4) for k in range(-8, 9)]
    kappas = [_kappa(extended(x + shift)) for shift in shifts]
    centered = _kappa(extended(x))
    falls = [kappas[i] - kappas[i + 1] for i in range(len(kappas) - 1)]
    figure = Plot(
        "mean of every feature, in standard deviations",
        "κ(X_e)",
        (Line("shifted", tuple(shifts), tuple(kappas), True), Line("centered", (shifts[0], shifts[-1]), (centered, centered))),
        "xy",
    )
    return Finding(
        "largest fall of κ(X_e) as μ grows, relative",
        0.0,
        max(falls) / centered,
        1e-9,
        "≤",
        on="wine, standardized and shifted",
        figure=figure,
    )


@CHAPTER.statement("standardization", "after Theorem 4", "Standardization improves κ(X_e).")
def _standardization() -> Finding:
    bars, worst = [], 0.0
    for name in _SETS:
        x = _full_rank(name)
        before, centered = _kappa(extended(x)), _kappa(extended(x - x.mean(0)))
        after = _kappa(extended(Standardize().fit(x).transform(x)))
        bars += [(f"{name}, raw", before), (f"{name}, centered", centered), (f"{name}, standardized", after)]
        worst = max(worst, after / before)
    return Finding("largest κ(standardized)/κ(raw) of 3", 1.0, worst, 0.0, "≤", on=_ON_SETS, figure=Bars("κ(X_e)", tuple(bars)))


@CHAPTER.statement(
    "min-max",
    "after Theorem 4",
    "Min–max normalized entries lie in [0, 1], rows of X̃_e have 1-norms up to N and 2-norms up to √N.",
)
def _min_max() -> Finding:
    worst = -math.inf
    for name in _SETS:
        x = _full_rank(name)
        X_e = extended(MinMax().fit(x).transform(x))
        n = len(x)
        worst = max(
            worst,
            float(-X_e.min()),
            float(X_e.max()) - 1,
            float(X_e.norm(1, dim=1).max()) / n - 1,
            float(X_e.norm(dim=1).max()) / n**0.5 - 1,
        )
    return Finding("largest excess over a bound", 0.0, worst, 1e-12, "≤", on=_ON_SETS)


@CHAPTER.statement(
    "min-max-kappa", "after Theorem 4", "Min–max normalization evens out row norms and so should improve κ(X_e)."
)
def _min_max_kappa() -> Finding:
    bars, worst = [], 0.0
    for name in _SETS:
        x = _full_rank(name)
        before, after = _kappa(extended(x)), _kappa(extended(MinMax().fit(x).transform(x)))
        bars += [(f"{name}, raw", before), (f"{name}, min–max", after)]
        worst = max(worst, after / before)
    return Finding("largest κ(min–max)/κ(raw) of 3", 1.0, worst, 0.0, "≤", on=_ON_SETS, figure=Bars("κ(X_e)", tuple(bars)))


@CHAPTER.statement("input-normalization", "(20)", "Standardizing the inputs improves κ of the Hessian of the input layer.")
def _input_layer() -> Finding:
    x = raw("wine")[0]
    w = random(14, seed=7) / 4
    # The same function of the data before and after: only the coordinates of ŵ change, and with them κ.
    standard = Standardize().fit(x)
    before = _classifier("wine", x)
    after = _classifier("wine", standard.transform(x))
    after.set(torch.cat([w[1:], w[:1]]))
    with torch.no_grad():
        before.set(torch.cat([w[1:] / standard.width, w[:1] - (w[1:] * standard.offset / standard.width).sum()]))
    kappas = [neuron_hessian(p.objective(), "", 0).conditioning().kappa for p in (before, after)]
    return Finding(
        "κ(∇²L) standardized, at most raw",
        kappas[0],
        kappas[1],
        0.0,
        "≤",
        on="logistic regression, wine",
        figure=Bars("κ(∇²L)", (("raw", kappas[0]), ("standardized", kappas[1]))),
    )
