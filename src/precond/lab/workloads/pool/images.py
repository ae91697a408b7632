"""Images to classes: conv nets with and without batch normalization, and vision transformers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache, partial

import torch.nn.functional as F
from torch import Tensor, nn

from precond.lab.workloads.catalog import load_data
from precond.lab.workloads.data import Part
from precond.lab.workloads.networks import VisionTransformer
from precond.lab.workloads.pool.drawings import ABOUT, SHAPES, SIDE, shapes
from precond.lab.workloads.pool.member import Member
from precond.lab.workloads.problem import Tensors


class PlainNet(nn.Module):
    """Convolutions 3×3 with ReLU, a maximum of 2×2 after each, and a linear layer; nothing is normalized."""

    def __init__(self, channels: tuple[int, ...], side: int, classes: int) -> None:
        super().__init__()
        sizes = zip((1, *channels[:-1]), channels, strict=True)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in sizes)
        self.head = nn.Linear(channels[-1] * (side // 2 ** len(channels)) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = F.max_pool2d(F.relu(convolution(x)), 2)
        return self.head(x.flatten(1))


class Residual(nn.Module):
    """x ↦ relu(S(x) + BN(W₂ * relu(BN(W₁ * x)))), S a strided 1×1 convolution where shapes change (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.second, self.second_norm = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        return F.relu(self.skip(x) + y)


class ResNet(nn.Module):
    """A stem and residual blocks, averaged over the image before the last layer."""

    def __init__(self, channels: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, channels[0], 3, 1, 1, bias=False), nn.BatchNorm2d(channels[0])
        pairs = enumerate(zip((channels[0], *channels[:-1]), channels, strict=True))
        self.blocks = nn.Sequential(*(Residual(a, b, 1 if i == 0 else 2) for i, (a, b) in pairs))
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem_norm(self.stem(x)))).mean((2, 3)))


class Separable(nn.Module):
    """Depthwise 3×3 and pointwise convolutions with batch normalization behind each (Howard et al., 2017)."""

    def __init__(self, channels: tuple[int, ...], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, channels[0], 3, padding=1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU()]
        for i, (a, b) in enumerate(itertools.pairwise(channels)):
            layers += [nn.Conv2d(a, a, 3, 1 + i % 2, 1, groups=a, bias=False), nn.BatchNorm2d(a), nn.ReLU()]
            layers += [nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def _digits() -> tuple[str, dict[str, Part]]:
    data = load_data("digits")
    return f"{data.about} Divided by 16.", {k: Part(p.inputs / 16, p.targets) for k, p in data.parts.items()}


@cache
def _on_digits(which: str) -> Tensors:
    about, parts = _digits()
    makes: dict[str, tuple[Callable[[], nn.Module], str]] = {
        "plain": (partial(PlainNet, (16, 32), 8, 10), "conv net, 3×3 of 16 and 32 channels, ReLU, no normalization"),
        "separable": (partial(Separable, (16, 24, 32), 10), "depthwise separable conv net with BN, 16, 24 and 32 channels"),
        "transformer": (
            partial(VisionTransformer, 10, 8, 2, 48, 2, 4),
            "vision transformer, patches of 2 x 2, width 48, 2 layers, 4 heads",
        ),
    }
    make, words = makes[which]
    return Tensors("digits", about, parts, make, F.cross_entropy, "accuracy", 32, 128, words, "cross entropy")


@cache
def _on_shapes(which: str, seed: int) -> Tensors:
    makes: dict[str, tuple[Callable[[], nn.Module], str]] = {
        "plain": (
            partial(PlainNet, (12, 24, 32), SIDE, len(SHAPES)),
            "conv net, 3×3 of 12, 24 and 32 channels, ReLU, no normalization",
        ),
        "ResNet": (partial(ResNet, (8, 16, 32), len(SHAPES)), "ResNet with BN, three blocks of 8, 16 and 32 channels"),
        "transformer": (
            partial(VisionTransformer, len(SHAPES), SIDE, 4, 48, 2, 4),
            "vision transformer, patches of 4 x 4, width 48, 2 layers, 4 heads",
        ),
    }
    make, words = makes[which]
    about = f"{ABOUT} Noise 0.25 (seed {seed})."
    return Tensors("shapes", about, shapes(seed), make, F.cross_entropy, "accuracy", 32, 128, words, "cross entropy")


MEMBERS = (
    Member("conv net, digits", "conv nets", 400, partial(_on_digits, "plain")),
    Member("ResNet with BN, shapes", "conv nets", 200, partial(_on_shapes, "ResNet", 75)),
    Member("conv net, shapes", "conv nets", 300, partial(_on_shapes, "plain", 76)),
    Member("separable conv net with BN, digits", "conv nets", 250, partial(_on_digits, "separable")),
    Member("vision transformer, digits", "vision transformers", 250, partial(_on_digits, "transformer")),
    Member("vision transformer, shapes", "vision transformers", 250, partial(_on_shapes, "transformer", 77)),
)
