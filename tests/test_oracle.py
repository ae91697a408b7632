"""The optimizer against explicit gradient descent in z (tests/oracle.py): preconditioners × penalties × spaces."""

from __future__ import annotations

import math
from functools import cache

import oracle
import pytest
import torch
from precond import (
    L1,
    L2,
    RMS,
    SAM,
    AdaGrad,
    BlockDiagonal,
    Dense,
    Diagonal,
    Fixed,
    GradientNorm,
    Kronecker,
    LossClosure,
    Momentum,
    PreconditionedGD,
    Route,
    Scaled,
    Standardizing,
    TimesLr,
    Warmup,
    is_matrix,
)
from torch import nn

INF = math.inf
LR = 0.03
STEPS = 4


class Net(nn.Module):
    """A smooth network of five tensors: two layers and a scale of one element."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.double()
        make = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=make, dtype=p.dtype) * 0.6)
        self.x = torch.randn(7, 3, generator=make, dtype=torch.float64) * torch.tensor([1.0, 3.0, 0.3]) + 0.5
        self.target = torch.randn(7, 2, generator=make, dtype=torch.float64)

    def forward(self, scale, W, b, V, c):
        hidden = torch.tanh(self.x @ W.T + b)
        return nn.functional.softplus(scale * (hidden @ V.T + c) - self.target).square().mean()

    def loss(self):
        return self(*self.parameters())


PARAMS = list(Net().parameters())
NAMES = [name for name, _ in Net().named_parameters()]
N = sum(p.numel() for p in PARAMS)
TENSORS = list(torch.arange(N).split([p.numel() for p in PARAMS]))
SCALE, W, B, V, C = TENSORS
ALL = torch.arange(N)


def flat_loss(p):
    """L as a function of one flat vector."""
    net = Net()
    return net(*(part.view(q.shape) for part, q in zip(p.split([len(i) for i in TENSORS]), PARAMS, strict=True)))


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
    like = tuple(p.detach() for p in PARAMS)
    blocks = [((1,), Kronecker(A, K, (like[1],))), ((3, 4), Standardizing(MU, SD, (like[3], like[4])))]
    P = torch.eye(N, dtype=torch.float64)
    P[W[:, None], W] = torch.kron(A, K)
    for row in range(2):
        w, b = V.view(2, 4)[row], C[row]
        P[w, w], P[b, w] = 1 / SD, -MU / SD
    arrows = [torch.cat([V.view(2, 4)[row], C[row : row + 1]]) for row in range(2)]
    return BlockDiagonal(blocks, like), oracle.Given(P, [SCALE, W, B, *arrows])


def given_diagonal(d):
    return oracle.Given(torch.diag(d), TENSORS, diagonal=True)


def views(d):
    return tuple(part.view(p.shape) for part, p in zip(d.split([len(i) for i in TENSORS]), PARAMS, strict=True))


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
        lambda: oracle.Chain(
            oracle.Given(P1), oracle.Chain(oracle.rms(0.9)(TENSORS), oracle.Given(P2), TENSORS), TENSORS
        ),
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


def compare(preconditioner, explicit, ours=(), theirs=(), alpha=LR, steps=STEPS, params=None, momentum=(None, None), **options):
    """Both from the same start; largest difference allowed: 1e-10 of the largest parameter."""
    net = Net()
    opt = PreconditionedGD(
        net if params is None else params(net), LR, preconditioner=preconditioner, regularizers=ours, momentum=momentum[0],
        **options,
    )  # fmt: skip
    told = {k: v for k, v in options.items() if k in ("statistics_from", "max_norm")}
    descent = oracle.Descent(flat_loss, flat(PARAMS), alpha, explicit, theirs, momentum[1], **told)
    for _ in range(steps):
        opt.step(LossClosure(net.loss))
        expected = descent.step()
        assert (flat(net.parameters()) - expected).abs().max() <= 1e-10 * (1 + expected.abs().max())
    return expected


@cache
def plain(name):
    """The end without a penalty."""
    ours, explicit = PRECONDITIONERS[name]
    return compare(ours, explicit(), alpha=ALPHAS.get(name, LR))


def defined(name, penalty):
    ours, explicit = PENALTIES[penalty][0], PRECONDITIONERS[name][1]()
    if penalty == "L1-p-prox":  # a threshold in p
        return explicit.diagonal
    # Of a damped arrow the library takes another root than the oracle: the same for what depends on M alone.
    own_root = getattr(ours, "q", 2) != 2 or getattr(ours, "adaptive", False)
    return name != "structured" or not (own_root and getattr(ours, "damping", None) and ours.space == "z")


@pytest.mark.parametrize(("name", "penalty"), [(n, r) for n in PRECONDITIONERS for r in PENALTIES if defined(n, r)])
def test_sweep(name, penalty):
    if penalty == "none":
        assert (plain(name) - flat(PARAMS)).abs().max() > 1e-3
        return
    (ours, explicit), (term, R) = PRECONDITIONERS[name], PENALTIES[penalty]
    end = compare(ours, explicit(), [term], [R], alpha=ALPHAS.get(name, LR))
    assert (end - plain(name)).abs().max() > 1e-5  # the penalty was felt
