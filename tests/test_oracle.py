"""The optimizer against explicit gradient descent in z (tests/oracle.py): preconditioners × penalties × spaces."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import nn

import oracle
from matrix import oracles
from precond import (
    L1,
    L2,
    RMS,
    SAM,
    SOAP,
    AdaGrad,
    BlockDiagonal,
    Dense,
    Diagonal,
    Fixed,
    GradientNorm,
    Kronecker,
    LossClosure,
    Momentum,
    Muon,
    Orthogonalized,
    OutputFactor,
    PreconditionedGD,
    Route,
    Scaled,
    Schatten,
    Shampoo,
    Standardizing,
    TimesLr,
    Warmup,
    is_matrix,
)

INF = math.inf
LR = 0.03
STEPS = 3


DRAW = torch.Generator().manual_seed(3)


def draw(*shape):
    return torch.randn(shape, generator=DRAW, dtype=torch.float64)


SHAPES = {"scale": (), "first.weight": (4, 3), "first.bias": (4,), "second.weight": (2, 4), "second.bias": (2,)}
START = [0.6 * draw(*shape) for shape in SHAPES.values()]
X, TARGET = draw(7, 3) * torch.tensor([1.0, 3.0, 0.3]) + 0.5, draw(7, 2)


def loss(scale, W, b, V, c):
    """A smooth network of five tensors: two layers and a scale of one element."""
    return nn.functional.softplus(scale * (torch.tanh(X @ W.T + b) @ V.T + c) - TARGET).square().mean()


class Net(nn.Module):
    """The same network as a module."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4, dtype=torch.float64), nn.Linear(4, 2, dtype=torch.float64)
        self.scale = nn.Parameter(START[0].clone())
        with torch.no_grad():
            for p, value in zip(self.parameters(), START, strict=True):
                p.copy_(value)

    def loss(self):
        return loss(*self.parameters())


N = sum(p.numel() for p in START)
TENSORS = list(torch.arange(N).split([p.numel() for p in START]))
SCALE, W, B, V, C = TENSORS
ALL = torch.arange(N)


def views(flat):
    """A flat vector as tensors."""
    return tuple(part.view(p.shape) for part, p in zip(flat.split([p.numel() for p in START]), START, strict=True))


def flat_loss(p):
    """L as a function of one flat vector."""
    return loss(*views(p))


def flat(params):
    return torch.cat([p.detach().reshape(-1) for p in params])


def matrix(n, seed, spread=0.3):
    """A well-conditioned matrix without symmetry."""
    make = torch.Generator().manual_seed(seed)
    return torch.eye(n, dtype=torch.float64) + spread * torch.randn(n, n, generator=make, dtype=torch.float64) / n**0.5


def per_tensor(*values):
    """One number per tensor → one per entry."""
    return torch.cat([torch.full((len(i),), float(v), dtype=torch.float64) for i, v in zip(TENSORS, values, strict=True)])


P1, P2, A, K = matrix(N, 1), matrix(N, 2), matrix(4, 3), matrix(3, 4)
D = torch.linspace(0.5, 2, N, dtype=torch.float64) * (-1.0) ** ALL
MU, SD = torch.tensor([0.5, -0.2, 0.1, 0.3]).double(), torch.tensor([1.5, 0.4, 0.8, 0.6]).double()


def structured():
    """Kronecker on the first weight, BNP's arrow on the second layer, the rest left alone; and its matrix and blocks."""
    blocks = [((1,), Kronecker(A, K, (START[1],))), ((3, 4), Standardizing(MU, SD, (START[3], START[4])))]
    P = torch.eye(N, dtype=torch.float64)
    P[W[:, None], W] = torch.kron(A, K)
    for row in range(2):
        w, b = V.view(2, 4)[row], C[row]
        P[w, w], P[b, w] = 1 / SD, -MU / SD
    arrows = [torch.cat([V.view(2, 4)[row], C[row : row + 1]]) for row in range(2)]
    return BlockDiagonal(blocks, tuple(START)), oracle.Given(P, [SCALE, W, B, *arrows])


def within(i, *tensors):
    """Tensors as index ranges of a part i of the vector."""
    return [torch.searchsorted(i, t) for t in tensors]


def adagrad_on_biases():
    """AdaGrad on the biases, RMS on the rest."""
    biases, rest = torch.cat([B, C]), torch.cat([SCALE, W, V])
    parts = [(biases, oracle.adagrad()(within(biases, B, C))), (rest, oracle.rms(0.9)(within(rest, SCALE, W, V)))]
    return oracle.Parts(parts)


def given_diagonal(d):
    return oracle.Given(torch.diag(d), TENSORS, diagonal=True)


# name → (the library's, the oracle's)
PRECONDITIONERS = {
    "identity": (Fixed(), lambda: oracle.Given(torch.eye(N).double(), TENSORS, diagonal=True)),
    "scaled": (Fixed(Scaled(Diagonal(views(D)), 3.0)), lambda: given_diagonal(3 * D)),
    "diagonal": (Fixed(Diagonal(views(D))), lambda: given_diagonal(D)),
    "dense": (Fixed(Dense(P1)), lambda: oracle.Given(P1)),
    "structured": (Fixed(structured()[0]), lambda: structured()[1]),
    "adagrad": (AdaGrad(), lambda: oracle.adagrad()(TENSORS)),
    "adagrad-options": (AdaGrad(1e-3, 0.1, 0.2), lambda: oracle.adagrad(1e-3, 0.1, 0.2)(TENSORS)),
    "rms": (RMS(0.9), lambda: oracle.rms(0.9)(TENSORS)),
    "rms-uncorrected": (RMS(0.9, bias_correction=False), lambda: oracle.rms(0.9, bias_correction=False)(TENSORS)),
    "rms-first": (RMS(0.9, start="first_gradient"), lambda: oracle.rms(0.9, start="first_gradient")(TENSORS)),
    "rms-centered": (
        RMS(0.9, 1e-2, bias_correction=False, centered=True),
        lambda: oracle.rms(0.9, 1e-2, bias_correction=False, centered=True)(TENSORS),
    ),
    "rms-amsgrad": (RMS(0.5, amsgrad=True), lambda: oracle.rms(0.5, amsgrad=True)(TENSORS)),
    "sign": (RMS(0.0), lambda: oracle.rms(0.0)(TENSORS)),
    "dense@rms": (Fixed(Dense(P1)) @ RMS(0.9), lambda: oracle.Chain(oracle.Given(P1), oracle.rms(0.9)(TENSORS), TENSORS)),
    "rms@dense": (RMS(0.9) @ Fixed(Dense(P1)), lambda: oracle.Chain(oracle.rms(0.9)(TENSORS), oracle.Given(P1), TENSORS)),
    "rms@adagrad": (
        RMS(0.9) @ AdaGrad(),
        lambda: oracle.Chain(oracle.rms(0.9)(TENSORS), oracle.adagrad()(TENSORS), TENSORS),
    ),
    "dense@(rms@dense)": (
        Fixed(Dense(P1)) @ (RMS(0.9) @ Fixed(Dense(P2))),
        lambda: oracle.Chain(oracle.Given(P1), oracle.Chain(oracle.rms(0.9)(TENSORS), oracle.Given(P2), TENSORS), TENSORS),
    ),
    "(dense@rms)@dense": (
        (Fixed(Dense(P1)) @ RMS(0.9)) @ Fixed(Dense(P2)),
        lambda: oracle.Chain(oracle.Chain(oracle.Given(P1), oracle.rms(0.9)(TENSORS), TENSORS), oracle.Given(P2), TENSORS),
    ),
    "route@dense": (
        Route([("*.bias", AdaGrad())], otherwise=RMS(0.9)) @ Fixed(Dense(P1)),
        lambda: oracle.Chain(adagrad_on_biases(), oracle.Given(P1), TENSORS, structured=True),
    ),
    "dense@route": (
        Fixed(Dense(P1)) @ Route([("*.bias", AdaGrad())], otherwise=RMS(0.9)),
        lambda: oracle.Chain(oracle.Given(P1), adagrad_on_biases(), TENSORS, structured=True),
    ),
    "structured@rms": (
        Fixed(structured()[0]) @ RMS(0.9),
        lambda: oracle.Chain(structured()[1], oracle.rms(0.9)(TENSORS), TENSORS, structured=True),
    ),
    "route": (
        Route([("*.bias", AdaGrad()), (is_matrix, RMS(0.9), 0.5)]),
        lambda: oracle.Parts(
            [
                (SCALE, oracle.Given(torch.eye(1).double(), diagonal=True)),
                (torch.cat([W, V]), oracle.rms(0.9)([torch.arange(12), torch.arange(12, 20)])),
                (torch.cat([B, C]), oracle.adagrad()([torch.arange(4), torch.arange(4, 6)])),
            ]
        ),
    ),
    "route@rms": (
        Route([("*.bias", Fixed(Dense(matrix(6, 5))))], otherwise=AdaGrad()) @ RMS(0.9),
        lambda: oracle.Parts(
            [
                (
                    torch.cat([B, C]),
                    oracle.Chain(
                        oracle.Given(matrix(6, 5)), oracle.rms(0.9)([torch.arange(4), torch.arange(4, 6)]), [torch.arange(6)]
                    ),
                ),
                *(
                    (i, oracle.Chain(oracle.adagrad()([ALL[: len(i)]]), oracle.rms(0.9)([ALL[: len(i)]]), [ALL[: len(i)]]))
                    for i in (SCALE, W, V)
                ),
            ],
            diagonal=False,
        ),
    ),
}


def second_in_turn(matrix):
    """The oracle of a matrix of the second shape, which is due a step before the first."""
    matrix.turn = 1
    return matrix


def with_matrices(make, others):
    """One oracle for each of the two weights, another for the three tensors that are none."""
    rest = [SCALE, B, C]
    index = torch.cat(rest)
    parts = [(W, make(4, 3)), (V, second_in_turn(make(2, 4))), (index, others(within(index, *rest)))]
    return oracle.Parts(parts, diagonal=False)


PRECONDITIONERS |= {
    "shampoo": (
        Shampoo(decay=0.9, damping=0.1, every=2),
        lambda: with_matrices(lambda *s: oracles.Shampoo(*s, decay=0.9, damping=0.1, every=2), oracle.rms(0.999)),
    ),
    "shampoo-left": (
        Shampoo(0.5, sides="left", every=1, damping=0.1, graft="sgd"),
        lambda: with_matrices(
            lambda *s: oracles.Grafted(oracles.Shampoo(*s, 0.5, damping=0.1, sides="left")), oracle.adagrad(1e-8)
        ),
    ),
    # The larger side of one gradient has a null space, in which a basis is whatever rounding makes it.
    "soap": (
        SOAP(0.9, every=2, sides="smaller"),
        lambda: with_matrices(
            lambda r, c: oracles.SOAP(r, c, 0.9, every=2, sides=("left",) if r <= c else ("right",)), oracle.rms(0.9)
        ),
    ),
    "dense@soap": (
        Fixed(Dense(P1)) @ SOAP(0.9, every=2, sides="smaller"),
        lambda: oracle.Chain(
            oracle.Given(P1),
            with_matrices(
                lambda r, c: oracles.SOAP(r, c, 0.9, every=2, sides=("left",) if r <= c else ("right",)), oracle.rms(0.9)
            ),
            TENSORS,
            structured=True,
        ),
    ),
    "outputs": (
        OutputFactor(0.5, 0.9, damping=0.1, every=2),
        lambda: oracle.Parts(
            [
                (torch.cat([W, B]), oracles.OutputFactor(4, 3, 0.5, 0.9, 0.1, 2)),
                (torch.cat([V, C]), second_in_turn(oracles.OutputFactor(2, 4, 0.5, 0.9, 0.1, 2))),
                (SCALE, oracle.Given(torch.eye(1).double(), diagonal=True)),
            ],
            diagonal=False,
        ),
    ),
    "muon": (
        Route([(is_matrix, Muon())], otherwise=RMS(0.9)),
        lambda: with_matrices(lambda r, c: oracles.Muon(r, c, scale=max(1.0, r / c) ** 0.5), oracle.rms(0.9)),
    ),
}
PRECONDITIONERS |= {
    "orthogonalized soap": (
        Orthogonalized(SOAP(0.9, every=2, sides="smaller"), Muon("eigh")),
        lambda: with_matrices(
            lambda r, c: oracles.Orthogonalized(
                oracles.SOAP(r, c, 0.9, every=2, sides=("left",) if r <= c else ("right",)), max(1.0, r / c) ** 0.5
            ),
            oracle.rms(0.9),
        ),
    ),
    "schatten": (
        Route([(is_matrix, Schatten(0.3))], otherwise=RMS(0.9)),
        lambda: with_matrices(lambda r, c: oracles.Schatten(r, c, 0.3, max(1.0, r / c) ** 0.5), oracle.rms(0.9)),
    ),
}
ALPHAS = {"route": LR * per_tensor(1, 0.5, 1, 0.5, 1)}
"""Learning rates per entry, where they differ."""


def penalties():
    """name → (the library's, the oracle's), in p and in z, whatever is exact."""
    out = {"none": ((), ())}
    for space in "pz":
        out[f"L2-{space}"] = L2(0.1, space), oracle.L2(0.1, space)
        out[f"L1-{space}"] = L1(0.1, space), oracle.L1(0.1, space)
        out[f"L1-{space}-prox"] = L1(0.5, space, proximal=True), oracle.L1(0.5, space, proximal=True)
        out[f"SAM-{space}"] = SAM(0.1, space, damping=0.3), oracle.SAM(0.1, space, damping=0.3)
        for power in (1, 2):
            ours = GradientNorm(0.02, space, power, method="exact", damping=0.3)
            out[f"GN-{space}-{power}"] = ours, oracle.GradientNorm(0.02, space, power=power, damping=0.3)
            for q in (1, 3, INF):
                ours = GradientNorm(0.02, space, power, q, "exact", damping=0.3)
                theirs = oracle.GradientNorm(0.02, space, power=power, q=q, damping=0.3)
                out[f"GN-{space}-{power}-{q}"] = ours, theirs
        out[f"ASAM-{space}"] = SAM(0.1, space, True, damping=0.3), oracle.SAM(0.1, space, adaptive=True, damping=0.3)
    for name, damping in (("advised", None), ("undamped", 0.0)):
        out[f"GN-{name}"] = GradientNorm(0.01, method="exact", damping=damping), oracle.GradientNorm(0.01, damping=damping)
        out[f"SAM-{name}"] = SAM(0.05, damping=damping), oracle.SAM(0.05, damping=damping)
        out[f"ASAM-{name}"] = SAM(0.05, adaptive=True, damping=damping), oracle.SAM(0.05, adaptive=True, damping=damping)
        for q in (1, INF):
            ours = GradientNorm(0.01, q=q, method="exact", damping=damping)
            out[f"GN-{name}-{q}"] = ours, oracle.GradientNorm(0.01, q=q, damping=damping)
    return out


PENALTIES = penalties()


def run(preconditioner, ours, params=None, lr=LR, steps=STEPS, **options):
    """The optimizer's parameters after each step."""
    net = Net()
    given = net if params is None else params(net)
    opt = PreconditionedGD(given, lr, preconditioner=preconditioner, regularizers=ours, **options)
    for _ in range(steps):
        opt.step(LossClosure(net.loss))
        yield flat(net.parameters())


def compare(name, ours, theirs, momentum=None, objective=flat_loss, statistics_from="loss", max_norm=None, **options):
    """The optimizer and the oracle from the same start, to 1e-10 of the largest parameter; returns where they end.

    ``momentum`` is the arguments of both sides' Momentum.
    """
    preconditioner, explicit = PRECONDITIONERS[name]
    options |= {"statistics_from": statistics_from, "max_norm": max_norm}
    descent = oracle.Descent(
        objective, flat(START), ALPHAS.get(name, LR), explicit(), theirs, statistics_from=statistics_from, max_norm=max_norm
    )
    if momentum is not None:
        descent.momentum, options["momentum"] = oracle.Momentum(**momentum), Momentum(**momentum)
    for p in run(preconditioner, ours, **options):
        expected = descent.step()
        assert (p - expected).abs().max() <= 1e-10 * (1 + expected.abs().max())
    return expected


def refused(name, penalty):
    try:
        penalty.validate(PRECONDITIONERS[name][0])
    except ValueError:
        return True
    return False


@cache
def plain(name):
    """The end without a penalty."""
    return compare(name, (), ())


def defined(name, penalty):
    if name in ("muon", "schatten"):  # M alone: no root, and none where z itself is asked for
        return PENALTIES[penalty][0] == () or not refused(name, PENALTIES[penalty][0])
    if name == "orthogonalized soap" and getattr(PENALTIES[penalty][0], "damping", None):
        return PENALTIES[penalty][0].space == "p"  # it is not damped
    ours, explicit = PENALTIES[penalty][0], PRECONDITIONERS[name][1]()
    if penalty == "L1-p-prox":  # a threshold in p
        return explicit.diagonal
    # Of a damped arrow the library takes another root than the oracle: the same for what depends on M alone.
    own_root = getattr(ours, "q", 2) != 2 or getattr(ours, "adaptive", False)
    return name != "structured" or not (own_root and getattr(ours, "damping", None) and ours.space == "z")


@pytest.mark.parametrize(("name", "penalty"), [(n, r) for n in PRECONDITIONERS for r in PENALTIES if defined(n, r)])
def test_sweep(name, penalty):
    if penalty == "none":
        assert (plain(name) - flat(START)).abs().max() > 1e-3
        return
    ours, theirs = PENALTIES[penalty]
    end = compare(name, [ours], [theirs])
    assert (end - plain(name)).abs().max() > 1e-5  # the penalty was felt


SOME = ["identity", "rms", "dense", "dense@rms", "rms@dense", "structured@rms", "route", "soap", "dense@soap"]
EVERYTHING = (
    [L2(0.1), L1(0.05), L2(0.03, "p"), L1(0.02, "p"), GradientNorm(0.01, method="exact", damping=0.2)],
    [
        oracle.L2(0.1), oracle.L1(0.05), oracle.L2(0.03, "p"), oracle.L1(0.02, "p"), oracle.GradientNorm(0.01, damping=0.2)
    ],
)  # fmt: skip
MOMENTA = [
    {},
    {"start": "first_gradient", "bias_correction": False},
    {"bias_correction": False},
    {"kind": "heavy_ball"},
    {"kind": "heavy_ball", "dampening": 0.3},
    {"kind": "heavy_ball", "start": "first_gradient", "dampening": 0.3},
    {"kind": "nesterov"},
    {"kind": "nesterov", "start": "first_gradient"},
]


@pytest.mark.parametrize("of", ["cotangent", "tangent"])
@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
@pytest.mark.parametrize("name", SOME)
def test_momentum_averages_cotangents_and_the_terms_in_z_pass_it_by(name, momentum, of):
    # bias_correction is stated on both sides: what None means is tests/test_momentum.py's.
    defaults = {"bias_correction": momentum.get("kind", "ema") == "ema"}
    compare(name, *EVERYTHING, momentum=defaults | momentum | {"beta": 0.7, "of": of})


def by_layer(net):
    """Groups of their own for the scale, the first and the second layer."""
    return [{"params": [net.scale]}, {"params": net.first}, {"params": net.second}]


def with_options(key, *values):
    return lambda net: [g | {key: x} for g, x in zip(by_layer(net), values, strict=True)]


def warm(value, steps):
    return lambda t: min(1.0, t / steps) * value


LEFT_OUT, GROUPS = per_tensor(1, 1, 0, 1, 0), per_tensor(1, 3, 3, 0, 0)
TENSOR_LR = torch.tensor(LR, dtype=torch.float64)
# What a penalty is told: λ here and there, who takes part here and there, and options of the optimizer.
TOLD = {
    "where": (0.04, 0.04, lambda leaf: not leaf.name.endswith("bias"), LEFT_OUT, {}),
    "where-pattern": (0.04, 0.04, "*.bias", 1 - LEFT_OUT, {}),
    "groups": (0.02, 0.02, None, GROUPS, {}),
    "TimesLr": (TimesLr(0.5), 0.5 * LR, None, 1.0, {}),
    "TimesLr-tensor": (TimesLr(0.5), 0.5 * LR, None, 1.0, {"lr": TENSOR_LR}),
    "TimesLr-tensor-where": (TimesLr(0.5), 0.5 * LR, lambda leaf: not leaf.name.endswith("bias"), LEFT_OUT, {"lr": TENSOR_LR}),
    "Warmup": (Warmup(0.06, 3), warm(0.06, 3), None, 1.0, {}),
    "Warmup-TimesLr": (Warmup(TimesLr(1.0), 3), warm(LR, 3), None, 1.0, {}),
}
KINDS = {
    "L2": (L2, oracle.L2, "l2.lam", {}),
    "L1": (L1, oracle.L1, "l1.lam", {}),
    "L1-prox": (L1, oracle.L1, "l1.lam", {"proximal": True}),
    "GN-1": (GradientNorm, oracle.GradientNorm, "gradientnorm.lam", {"power": 1, "damping": 0.1}),
    "GN-2": (GradientNorm, oracle.GradientNorm, "gradientnorm.lam", {"power": 2, "damping": 0.1}),
    "GN-2-1": (GradientNorm, oracle.GradientNorm, "gradientnorm.lam", {"power": 2, "q": 1, "damping": 0.1}),
    "SAM": (SAM, oracle.SAM, "sam.rho", {"damping": 0.1}),
    "ASAM": (SAM, oracle.SAM, "sam.rho", {"adaptive": True, "damping": 0.1}),
}


@pytest.mark.parametrize("space", ["p", "z"])
@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in ("rms", "dense@rms", "structured@rms") for k in KINDS],
)
def test_parts_groups_and_schedules(name, kind, told, space):
    (ours, theirs, key, more), (lam, explicit, where, each, options) = KINDS[kind], TOLD[told]
    if kind == "L1-prox" and name != "rms":
        space = "z"  # a threshold in p needs a diagonal M
    exact = {"method": "exact"} if ours is GradientNorm else {}
    if told == "groups":
        options = {"params": with_options(key, 0.02, 0.06, 0.0)}
    compare(name, [ours(lam, space, where=where, **more, **exact)], [theirs(explicit, space, each, **more)], **options)


OPTIONS = {
    "max_norm": {"max_norm": 0.3},
    "maximize": {"params": lambda net: [{"params": net, "maximize": True}], "objective": lambda p: -flat_loss(p)},
    "loop": {"engine": "loop"},
    "momentum": {"momentum": {"beta": 0.7}},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("penalty", ["none", "L2-z", "L2-p", "GN-z-2", "SAM-z"])
@pytest.mark.parametrize("name", SOME)
def test_options(name, penalty, options):
    ours, theirs = ([x] for x in PENALTIES[penalty]) if penalty != "none" else ((), ())
    compare(name, ours, theirs, **OPTIONS[options])


@pytest.mark.parametrize("penalty", ["L2-p", "L1-p", "GN-p-1", "GN-p-2-1", "SAM-p", "ASAM-p"])
@pytest.mark.parametrize("name", ["adagrad", "rms", "rms-first", "dense@rms", "structured@rms", "route"])
def test_statistics_of_the_regularized_gradient(name, penalty):
    ours, theirs = PENALTIES[penalty]
    end = compare(name, [ours], [theirs], statistics_from="total")
    assert (end - compare(name, [ours], [theirs])).abs().max() > 1e-5


@pytest.mark.parametrize("penalty", ["GN-z-1", "GN-z-2-1", "GN-advised", "SAM-z", "ASAM-z"])
@pytest.mark.parametrize("name", ["adagrad", "rms", "rms-first", "dense@rms", "structured@rms", "route"])
def test_statistics_of_the_regularized_gradient_with_the_p_before(name, penalty):
    ours, theirs = PENALTIES[penalty]
    end = compare(name, [ours], [theirs], statistics_from="lagged")
    assert (end - compare(name, [ours], [theirs])).abs().max() > 1e-5


@pytest.mark.parametrize("penalty", ["L2-z", "L1-p", "GN-p-1", "SAM-p"])
def test_without_a_penalty_that_needs_p_nothing_lags(penalty):
    ours = [PENALTIES[penalty][0]]
    lagged, total = (list(run(RMS(0.9), ours, statistics_from=x)) for x in ("lagged", "total"))
    assert all(map(torch.equal, lagged, total))


FUSED = {
    "identity": [None, {"kind": "heavy_ball"}, {"kind": "nesterov", "start": "first_gradient"}],
    "adagrad": [None],
    "adagrad-options": [None],
    "rms": [{}],
    "rms-amsgrad": [{}],
    "rms-uncorrected": [None],
}


@pytest.mark.parametrize("decay", ["none", "p", "z"])
@pytest.mark.parametrize(("name", "momentum"), [(n, m) for n, momenta in FUSED.items() for m in momenta], ids=str)
def test_fused_kernels(name, momentum, decay):
    # No kernel lets a decay in z pass these by: the loop takes over.
    loop = decay == "z" and (name in ("adagrad", "adagrad-options", "rms-uncorrected") or "kind" in (momentum or {}))
    if momentum is not None:
        momentum = {"bias_correction": "kind" not in momentum} | momentum
    ours, theirs = ((), ()) if decay == "none" else ([L2(0.1, decay)], [oracle.L2(0.1, decay)])
    compare(
        name, ours, theirs, momentum, statistics_from="total" if decay == "p" else "loss", engine="auto" if loop else "fused"
    )


@pytest.mark.parametrize(("method", "order"), [("forward", 1), ("backward", 1), ("central", 2)])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("q", [1, 2, INF])
@pytest.mark.parametrize("space", ["p", "z"])
@pytest.mark.parametrize("name", SOME)
def test_finite_differences_converge_in_their_order(name, space, q, power, method, order):
    def end(method, step=None):
        penalty = GradientNorm(0.05, space, power, q, method, step, damping=0.1)
        return list(run(PRECONDITIONERS[name][0], [penalty], steps=1))[-1]

    exact = end("exact")
    coarse, fine = ((end(method, step) - exact).norm() for step in (4e-4, 2e-4))
    assert coarse / fine == pytest.approx(2**order, rel=0.15)
    assert (end(method) - exact).norm() < 1e-2 * fine  # the default step


@pytest.mark.parametrize("penalty", ["SAM-p", "SAM-z", "ASAM-p", "ASAM-z", "forward", "backward", "central"])
@pytest.mark.parametrize("name", ["identity", "rms", "dense@rms", "structured@rms", "route"])
def test_both_closures_and_the_two_call_form_are_bitwise_the_same(name, penalty):
    ours = PENALTIES[penalty][0] if penalty in PENALTIES else GradientNorm(0.05, method=penalty)
    preconditioner = PRECONDITIONERS[name][0]

    def standard(net, opt):
        def closure():
            opt.zero_grad()
            loss = net.loss()
            loss.backward()
            return loss

        opt.step(closure)

    def two_calls(net, opt):
        opt.zero_grad()
        net.loss().backward()
        while opt.probe():
            net.loss().backward()
        opt.step()

    ends = [list(run(preconditioner, [ours], momentum=Momentum(0.7)))[-1]]
    for advance in (standard, two_calls):
        net = Net()
        opt = PreconditionedGD(net, LR, preconditioner=preconditioner, regularizers=[ours], momentum=Momentum(0.7))
        for _ in range(STEPS):
            advance(net, opt)
        ends.append(flat(net.parameters()))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])
