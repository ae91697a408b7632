"""The calibration study: what ``diagnose`` predicts against what trainings at fitted rates show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond.analysis.curvature import Objective
from precond.lab.workloads.models import Architecture
from precond.lab.workloads.networks import CharacterTransformer, VisionTransformer, autoencoder
from precond.lab.workloads.packaged import PACKAGED
from precond.lab.workloads.text import ALPHABET, library_text
from precond.optim import recipes

BASES: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer] | None] = {
    "gd": None,  # gradient descent with momentum 0.9, what diagnose assumes without an optimizer
    "adam": lambda model, lr: recipes.adam(model, lr=lr),
}
"""Optimizers that remedies are added to."""


@dataclass(frozen=True)
class Setting:
    """A task with an architecture.

    Attributes:
        task: what the data are; of one task no other setting's outcome is used to judge its prediction.
        model: the architecture, in words.
        make: () ↦ objective, from the global generator.
        dim: dimension of the features of the data, where they are numbers; None: every entry is one; ``"none"``: they are no numbers.
    """

    task: str
    model: str
    make: Callable[[], Objective]
    dim: int | str | None = None

    @property
    def name(self) -> str:
        """Of both."""
        return f"{self.task}, {self.model}"


class LastState(nn.Module):
    """A recurrent layer over the rows of an image, and classes from its last state."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], features: int, width: int, outputs: int) -> None:
        super().__init__()
        self.recurrent = kind(features, width, batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


_EXAMPLES, _BATCH = 512, 64


def settings() -> tuple[Setting, ...]:
    """Small tasks times architectures."""
    found = []
    mlps = {
        "linear": Architecture("linear"),
        "MLP ReLU": Architecture("mlp", (32, 32)),
        "MLP tanh": Architecture("mlp", (32, 32), activation="tanh"),
        "MLP LayerNorm": Architecture("mlp", (32, 32), "layer"),
    }
    for task in ("wine", "breast-cancer", "diabetes"):
        found += [Setting(task, name, _packaged(task, a.build)) for name, a in mlps.items()]
    images: Mapping[str, tuple[Callable[[tuple[int, ...], int], nn.Module], int | None]] = {
        "MLP ReLU": (Architecture("mlp", (64, 64)).build, None),
        "MLP BatchNorm": (Architecture("mlp", (64, 64), "batch").build, None),
        "convnet": (Architecture("convnet", (8, 16)).build, 1),
        "convnet BatchNorm": (Architecture("convnet", (8, 16), "batch").build, 1),
        "vision transformer": (lambda shape, n: VisionTransformer(n, side=8, patch=2, width=32, layers=2), 1),
        "LSTM": (lambda shape, n: nn.Sequential(nn.Flatten(1, 2), LastState(nn.LSTM, 8, 32, n)), None),
        "GRU": (lambda shape, n: nn.Sequential(nn.Flatten(1, 2), LastState(nn.GRU, 8, 32, n)), None),
    }
    found += [Setting("digits", name, _packaged("digits", build), dim) for name, (build, dim) in images.items()]
    found += [
        Setting("digits, reconstructed", "autoencoder", _reconstruction),
        Setting("Python sources", "character transformer", _characters, "none"),
        Setting("teacher, spread features", "MLP tanh", _teacher),
    ]
    return tuple(found)


def _batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:_EXAMPLES]
    return list(zip(x[order].split(_BATCH), y[order].split(_BATCH), strict=True))


def _packaged(task: str, build: Callable[[tuple[int, ...], int], nn.Module]) -> Callable[[], Objective]:
    def make() -> Objective:
        data = PACKAGED[task](0)
        part = data.parts["train"]
        loss = F.cross_entropy if data.task == "classification" else F.mse_loss
        return Objective(build(data.input_shape, data.outputs), loss, _batches(part.inputs, part.targets))

    return make


def _reconstruction() -> Objective:
    x = PACKAGED["digits"](0).parts["train"].inputs.flatten(1)
    return Objective(autoencoder((64, 32, 8, 32, 64)), F.binary_cross_entropy_with_logits, _batches(x, x / 16))


def _characters() -> Objective:
    part = library_text(32, 600_000)["train"]
    model = CharacterTransformer(len(ALPHABET), 32, width=32, layers=2)
    return Objective(model, F.cross_entropy, _batches(part.inputs[:_EXAMPLES], part.targets[:_EXAMPLES]))


def _teacher() -> Objective:
    draw = torch.Generator().manual_seed(1)
    mix = torch.eye(12) + 0.3 * torch.randn(12, 12, generator=draw)
    x = torch.randn(_EXAMPLES, 12, generator=draw) @ mix * torch.logspace(-1, 1, 12) + 2
    teacher = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 1))
    for p in teacher.parameters():
        p.data.copy_(torch.randn(p.shape, generator=draw) / p.shape[-1] ** 0.5)
    z = (x - x.mean(0)) / x.std(0)
    with torch.no_grad():
        y = teacher(z)
    student = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 1))
    return Objective(student, F.mse_loss, _batches(x, (y - y.mean()) / y.std()))
