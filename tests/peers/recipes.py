"""Every recipe on one small model, for the tests of this folder: a new recipe is one row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import precond
from precond import BNP, L2, RMS, Momentum, PreconditionedGD, Whitening, is_matrix

Make = Callable[..., PreconditionedGD]


def _gd(params: Any, **options: Any) -> PreconditionedGD:
    return PreconditionedGD(
        params, **{"preconditioner": RMS(), "momentum": Momentum(0.9), "regularizers": [L2(0.01)], **options}
    )


RECIPES: dict[str, tuple[Make, dict[str, Any]]] = {
    "sgd": (precond.sgd, {"lr": 0.01, "momentum": 0.9}),
    "adagrad": (precond.adagrad, {"lr": 0.05}),
    "rmsprop": (precond.rmsprop, {"lr": 0.003, "momentum": 0.5, "centered": True}),
    "adam": (precond.adam, {"lr": 0.01, "amsgrad": True}),
    "adamw": (precond.adamw, {"lr": 0.01}),
    "bnp": (precond.bnp, {"lr": 0.01, "momentum": 0.5}),
    "whitening": (precond.whitening, {"lr": 0.01, "inputs": Whitening(every=5, observe_steps=2)}),
    "shampoo": (precond.shampoo, {"lr": 0.01, "precondition_frequency": 3}),
    "soap": (precond.soap, {"lr": 0.01, "precondition_frequency": 3}),
    "muon": (precond.muon, {"lr": 0.01, "where": is_matrix}),
    "auto": (precond.auto, {"lr": 0.01}),
    "adam in BNP's coordinates": (precond.adam, {"lr": 0.01, "inputs": BNP()}),
    "PreconditionedGD": (_gd, {"lr": 0.01}),
}


def make(recipe: str, params: Any, **options: Any) -> PreconditionedGD:
    function, usual = RECIPES[recipe]
    return function(params, **{**usual, **options})


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two layers, a bias and a scale: a matrix, vectors, observed inputs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def batch(seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(9, 5, generator=generator, dtype=torch.float64).to(dtype), torch.arange(9) % 3


def loss_of(model: nn.Module, seed: int = 1) -> Tensor:
    x, y = batch(seed, next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(x), y)


def closure(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 1) -> Callable[[], Tensor]:
    def run() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, seed)
        loss.backward()
        return loss

    return run


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for t in range(start, start + steps):
        optimizer.step(closure(model, optimizer, t))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])
