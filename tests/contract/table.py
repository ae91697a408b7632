"""All configurations of the optimizer in one table: a new recipe is one row and inherits every sweep."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import precond
from precond import (
    BNP,
    EMA,
    KFAC,
    L1,
    L2,
    RMS,
    SAM,
    SOAP,
    AdaGrad,
    Auto,
    Cautious,
    CautiousL2,
    EMANesterov,
    Fixed,
    GradientNorm,
    Hyperball,
    Momentum,
    Muon,
    Polar,
    PreconditionedGD,
    RadialBrake,
    Route,
    RowFloor,
    Shampoo,
    TimesLr,
    Warmup,
    Whitening,
    is_matrix,
)

DEVICE = torch.device(os.environ.get("PRECOND_DEVICE", "cpu"))
"""Where the nets and batches of the contract are: ``pytest --device cuda tests/contract``."""


@dataclass(frozen=True)
class Twin:
    """A recipe and torch's class of the same name, with the options that both take."""

    recipe: str
    torch: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.recipe}({', '.join(f'{k}={v}' for k, v in self.options.items())})"

    def ours(self, params: Any, **more: Any) -> PreconditionedGD:
        return precond.RECIPES[self.recipe](params, **{**self.options, **more})

    def theirs(self, params: Any, **more: Any) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.torch)(params, **{**self.options, **more})


TWINS = [
    Twin("sgd", "SGD", {"lr": 0.05}),
    Twin("sgd", "SGD", {"lr": 0.05, "weight_decay": 0.1}),
    Twin("sgd", "SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    Twin("sgd", "SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3}),
    Twin("sgd", "SGD", {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    Twin("sgd", "SGD", {"lr": 0.001, "momentum": 0.5, "maximize": True}),
    Twin("adagrad", "Adagrad", {"lr": 0.05}),
    Twin(
        "adagrad", "Adagrad", {"lr": 0.05, "lr_decay": 0.01, "weight_decay": 0.1, "initial_accumulator_value": 0.1, "eps": 1e-6}
    ),
    Twin("adagrad", "Adagrad", {"lr": 0.001, "maximize": True}),
    Twin("rmsprop", "RMSprop", {"lr": 0.005}),
    Twin("rmsprop", "RMSprop", {"lr": 0.005, "alpha": 0.9, "eps": 1e-6, "weight_decay": 0.1}),
    Twin("rmsprop", "RMSprop", {"lr": 0.001, "momentum": 0.9}),
    Twin("rmsprop", "RMSprop", {"lr": 0.001, "centered": True, "momentum": 0.5, "weight_decay": 0.01, "eps": 1e-4}),
    Twin("rmsprop", "RMSprop", {"lr": 0.001, "maximize": True}),
    Twin("adam", "Adam", {"lr": 0.005}),
    Twin("adam", "Adam", {"lr": 0.005, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    Twin("adam", "Adam", {"lr": 0.005, "amsgrad": True}),
    Twin("adam", "Adam", {"lr": 0.005, "betas": (0.0, 0.9)}),
    Twin("adam", "Adam", {"lr": 0.001, "maximize": True, "weight_decay": 0.1}),
    Twin("adamw", "AdamW", {"lr": 0.005}),
    Twin("adamw", "AdamW", {"lr": 0.005, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.5, "amsgrad": True}),
    Twin("adamw", "AdamW", {"lr": 0.001, "maximize": True}),
]


def _gd(preconditioner: Any, *regularizers: Any, **options: Any) -> Callable[..., PreconditionedGD]:
    def make(params: Any, **more: Any) -> PreconditionedGD:
        return PreconditionedGD(
            params, **{"lr": 0.01, "preconditioner": preconditioner, "regularizers": regularizers, **options, **more}
        )

    return make


OWN: dict[str, Callable[..., PreconditionedGD]] = {
    "bnp": lambda p, **more: precond.bnp(p, **{"lr": 0.01, **more}),
    "bnp, momentum, decay": lambda p, **more: precond.bnp(p, **{"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, **more}),
    "bnp, patch": lambda p, **more: precond.bnp(p, **{"lr": 0.01, "conv": "patch", **more}),
    "adamw in BNP's coordinates": lambda p, **more: precond.adamw(p, **{"lr": 0.003, "inputs": BNP(), **more}),
    "whitening": lambda p, **more: precond.whitening(p, **{"lr": 0.003, "inputs": Whitening(every=7, observe_steps=2), **more}),
    "whitening, cholesky, amsgrad": lambda p, **more: precond.whitening(
        p,
        **{
            "lr": 0.003,
            "inputs": Whitening(root="cholesky", every=3, observe_steps=2, samples=1.0),
            "amsgrad": True,
            "weight_decay": 0.1,
            **more,
        },
    ),
    "adamw, SAM in z": lambda p, **more: precond.adamw(p, **{"lr": 0.003, "regularizers": [SAM(0.02)], **more}),
    "adamw, SAM in p": lambda p, **more: precond.adamw(p, **{"lr": 0.003, "regularizers": [SAM(0.05, space="p")], **more}),
    "RMS, SAM in z": _gd(RMS(), SAM(0.01), L2(0.01)),
    "RMS, adaptive SAM in z": _gd(RMS(), SAM(0.01, adaptive=True)),
    "RMS, momentum, gradient norm in z": _gd(RMS(), GradientNorm(1e-3), momentum=Momentum(0.9)),
    "RMS from the first gradient": _gd(RMS(start="first_gradient"), momentum=Momentum(0.9, start="first_gradient")),
    "AdaGrad, gradient norm in p, central": _gd(AdaGrad(), GradientNorm(1e-3, space="p", method="central"), max_norm=1.0),
    "RMS, proximal L1": _gd(RMS(), L1(1e-3, proximal=True)),
    "composition": _gd(AdaGrad() @ RMS(), L2(0.01), max_norm=5.0),
    "BNP with AdaGrad, SAM in z": _gd(BNP() @ AdaGrad(), SAM(0.01)),
    "route": _gd(Route([("*bias", AdaGrad(), 0.5)], otherwise=RMS()), momentum=Momentum(0.5)),
    "route, SAM in p, warm-up": _gd(
        Route([(is_matrix, AdaGrad())], otherwise=RMS()), SAM(Warmup(0.05, 10), space="p"), L1(1e-4), momentum=Momentum(0.9)
    ),
    "RMS, gradient norm of power 1, q = 1, times lr": _gd(RMS(), GradientNorm(TimesLr(0.5), power=1, q=1)),
    "momentum of tangents, amsgrad": _gd(RMS(amsgrad=True), L1(1e-3), momentum=Momentum(0.9, of="tangent"), max_norm=3.0),
    "muon": lambda p, **more: precond.muon(p, **{"lr": 0.01, "where": is_matrix, **more}),
    "muon, SAM in z": lambda p, **more: precond.muon(
        p, **{"lr": 0.01, "where": is_matrix, "regularizers": [SAM(0.02)], **more}
    ),
    "muon with whitening": lambda p, **more: precond.muon(
        p,
        **{"lr": 0.01, "where": is_matrix, "inputs": Whitening(every=7, observe_steps=2), "nesterov": False, **more},
    ),
    "Muon, exact root, L2 in p": _gd(Muon(root="eigh"), L2(0.01, "p"), momentum=Momentum(0.9)),
    "soap": lambda p, **more: precond.soap(p, **{"lr": 0.01, "precondition_frequency": 3, "max_precond_dim": 4, **more}),
    "soap, one side, drift, gradient norm in z": lambda p, **more: precond.soap(
        p,
        **{
            "lr": 0.01,
            "sides": "smaller",
            "drift": 0.3,
            "precondition_frequency": 2,
            "factor_frequency": 2,
            "regularizers": [GradientNorm(1e-3)],
            **more,
        },
    ),
    "soap, rank": lambda p, **more: precond.soap(
        p, **{"lr": 0.01, "rank": 1, "precondition_frequency": 3, "factor_frequency": 2, **more}
    ),
    "soap with whitening": lambda p, **more: precond.soap(
        p,
        **{
            "lr": 0.01,
            "inputs": Whitening(every=7, observe_steps=2),
            "precondition_frequency": 3,
            "max_precond_dim": 4,
            **more,
        },
    ),
    "SOAP, SAM in z, heavy ball": _gd(SOAP(every=2), SAM(0.01), L1(1e-4), momentum=Momentum(0.9, "heavy_ball"), max_norm=2.0),
    "shampoo": lambda p, **more: precond.shampoo(p, **{"lr": 0.01, "precondition_frequency": 3, **more}),
    "shampoo, sums, tiles, adaptive SAM in z": lambda p, **more: precond.shampoo(
        p,
        **{
            "lr": 0.01,
            "precondition_frequency": 2,
            "shampoo_beta": -1,
            "block_size": 5,
            "graft": "adagrad",
            "method": "newton",
            "regularizers": [SAM(0.01, adaptive=True)],
            **more,
        },
    ),
    "Shampoo, one side, qr, proximal L1": _gd(
        Shampoo(0.5, 0.9, sides="left", method="qr", every=2, graft="sgd"), L1(1e-3, proximal=True)
    ),
    "KFAC on whitening": _gd(KFAC(every=7, output_every=3), momentum=Momentum(0.9, "heavy_ball")),
    "auto": lambda p, **more: precond.auto(
        p,
        **{
            "choice": Auto(max_inputs=9, whitening=Whitening(every=7, observe_steps=2, rank=1), polar=Polar(3)),
            **more,
        },
    ),
    "auto, SAM in p": lambda p, **more: precond.auto(p, **{"lr": 0.003, "regularizers": [SAM(0.02, space="p")], **more}),
    "Polar, gradient norm in z, clipped": _gd(
        Polar(every=4, damping=0.01), GradientNorm(1e-3), momentum=Momentum(0.5), max_norm=2.0
    ),
    "BNP with Polar, heavy ball": _gd(BNP() @ Polar(every=3), L2(0.01), momentum=Momentum(0.5, "heavy_ball")),
    "RMS, cautious, on the hyperball": _gd(RMS(), Hyperball(), Cautious(), CautiousL2(0.01), momentum=Momentum(0.9)),
    "BNP with AdaGrad, bent in z": _gd(
        BNP() @ AdaGrad(), RadialBrake(space="z"), RowFloor(0.1, "z"), Hyperball(space="z"), momentum=Momentum(0.9)
    ),
    "auto, hyperball, SAM in p": lambda p, **more: precond.auto(
        p, **{"lr": 0.01, "regularizers": [Hyperball(), SAM(0.02, space="p")], **more}
    ),
    "adamw, average of the weights": lambda p, **more: precond.adamw(p, **{"average": EMA(0.9, start=3), **more}),
    "soap, lookahead": lambda p, **more: precond.soap(
        p, **{"lr": 0.01, "precondition_frequency": 3, "average": EMANesterov(2.0, 0.9), **more}
    ),
    "muon after SOAP": lambda p, **more: precond.muon(
        p, **{"lr": 0.01, "where": is_matrix, "after": SOAP(every=3, sides="smaller"), **more}
    ),
    "muon after whitening of power 1/2, SAM in z": lambda p, **more: precond.muon(
        p,
        **{
            "lr": 0.01,
            "where": is_matrix,
            "after": Whitening(every=7, observe_steps=2, power=0.5),
            "regularizers": [SAM(0.02)],
            **more,
        },
    ),
    "muon of power 1/2": lambda p, **more: precond.muon(p, **{"lr": 0.01, "where": is_matrix, "power": 0.5, **more}),
    "plain": _gd(Fixed(), L2(0.1), momentum=Momentum(0.9, "nesterov")),
}

EVERY: dict[str, Callable[..., PreconditionedGD]] = {**{str(t): t.ours for t in TWINS}, **OWN}


class Net(nn.Module):
    """A small convolutional net with what second passes can spoil: dropout and batch normalization."""

    def __init__(self, dropout: float = 0.2):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.norm(torch.tanh(self.conv(x)))).flatten(1))


def net(dtype: torch.dtype = torch.float64, dropout: float = 0.2) -> Net:
    torch.manual_seed(0)
    return Net(dropout).to(DEVICE, dtype)


def batches(count: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(8, 1, 4, 4, generator=generator, dtype=torch.float64).to(DEVICE, dtype),
            torch.randint(0, 3, (8,), generator=generator).to(DEVICE),
        )
        for _ in range(count)
    ]


def closure(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[torch.Tensor, torch.Tensor]):
    def run():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss

    return run


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data, hook=None) -> None:
    """A step per batch; random numbers are a function of the step alone."""
    for t, batch in enumerate(data):
        torch.manual_seed(100 + t)
        optimizer.step(closure(model, optimizer, batch))
        if hook is not None:
            hook(t)


def rounding(name: str) -> float:
    """How far other orders of the same sums may take the parameters in ten steps, relative to them, in float64.

    1e-12 is some thousand roundings of 2e-16. A finite difference divides them by its step, 1e-7 of the parameters, to 2e-9 of the
    penalty's term, and with lr = 0.01 at most a tenth of that arrives.
    """
    return 2e-10 if "gradient norm" in name else 1e-12


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def snapshot(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [t.clone() for entries in optimizer.state.values() for t in entries.values() if isinstance(t, torch.Tensor)]
