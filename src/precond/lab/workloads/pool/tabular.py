"""Tables: raw and standardized features, and categories as embeddings."""

from __future__ import annotations

import itertools
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond.lab.workloads.catalog import load_data
from precond.lab.workloads.data import Part, standardized
from precond.lab.workloads.pool.member import Member, in_parts, standard
from precond.lab.workloads.problem import Tensors


class Tabular(nn.Module):
    """Numbers and embedded categories, (N, numeric + categories) ↦ (N, outputs): an MLP with residual blocks x + W₂ relu(W₁x).

    Args:
        numeric: how many of the columns are numbers; the others are categories, stored as floating numbers.
        cardinalities: of the categories.
        width, blocks: of the MLP.
        outputs: classes or values.
        embedding: entries of a category's vector.
    """

    def __init__(
        self, numeric: int, cardinalities: tuple[int, ...], width: int, blocks: int, outputs: int, embedding: int = 8
    ) -> None:
        super().__init__()
        self.numeric = numeric
        self.embeddings = nn.ModuleList(nn.Embedding(c, embedding) for c in cardinalities)
        self.first = nn.Linear(numeric + embedding * len(cardinalities), width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)) for _ in range(blocks)
        )
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        codes = x[:, self.numeric :].long()
        x = self.first(torch.cat([x[:, : self.numeric], *(e(codes[:, i]) for i, e in enumerate(self.embeddings))], 1))
        for block in self.blocks:
            x = x + block(F.relu(x))
        return self.head(F.relu(x))


class MLP(nn.Sequential):
    """Linear layers with ReLU between them, the last one called ``head``."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        for i, (a, b) in enumerate(itertools.pairwise(widths[:-1])):
            self.add_module(f"hidden{i}", nn.Linear(a, b))
            self.add_module(f"relu{i}", nn.ReLU())
        self.add_module("head", nn.Linear(widths[-2], widths[-1]))


@cache
def _diabetes() -> Tensors:
    data = load_data("diabetes")
    return Tensors(
        "diabetes",
        data.about,
        data.parts,
        partial(MLP, 10, 64, 64, 1),
        F.mse_loss,
        "R²",
        32,
        264,
        "MLP 10-64-64-1, ReLU",
        "mean squared error",
    )


@cache
def _friedman() -> Tensors:
    g = torch.Generator().manual_seed(71)
    x = torch.rand(3072, 10, generator=g)
    y = 10 * (torch.pi * x[:, 0] * x[:, 1]).sin() + 20 * (x[:, 2] - 0.5).square() + 10 * x[:, 3] + 5 * x[:, 4]
    y = y + torch.randn(len(x), generator=g)
    scales = 10 ** (4 * torch.rand(10, generator=g) - 2)
    shifts = 3 * torch.randn(10, generator=g)
    parts = standardized(in_parts(Part((x + shifts) * scales, y[:, None])))
    return Tensors(
        "friedman",
        "Friedman's function of 10 uniform features, 5 of which matter, with noise; each feature is shifted and has a scale of its own "
        "between 0.01 and 100 (seed 71). Targets standardized.",
        parts,
        partial(MLP, 10, 96, 96, 1),
        F.mse_loss,
        "R²",
        64,
        512,
        "MLP 10-96-96-1, ReLU",
        "mean squared error",
    )


def _mixed(seed: int, cardinalities: tuple[int, ...], numeric: int, classes: int, n: int = 4096) -> Part:
    """Standardized numbers with heavy tails, categories of unequal frequencies, and targets from effects of both and their products."""
    g = torch.Generator().manual_seed(seed)
    numbers = torch.randn(n, numeric, generator=g)
    numbers = standard(numbers + 0.3 * numbers.pow(3))
    codes, effects = [], torch.zeros(n, classes)
    for c in cardinalities:
        frequency = 1 / torch.arange(1, c + 1.0)
        code = torch.multinomial(frequency, n, replacement=True, generator=g)
        effects += torch.randn(c, classes, generator=g)[code]
        slopes = torch.randn(c, numeric, generator=g)[code]
        effects += ((slopes * numbers).sum(1, keepdim=True) / numeric**0.5).tanh() * torch.randn(classes, generator=g)
        codes.append(code)
    effects += numbers.tanh() @ torch.randn(numeric, classes, generator=g)
    inputs = torch.cat([numbers, torch.stack(codes, 1).float()], 1)
    if classes == 1:
        return Part(inputs, standard(effects) + 0.3 * torch.randn(n, 1, generator=g))
    gumbel = -(-torch.rand(n, classes, generator=g).clamp_min(1e-6).log()).log()
    return Part(inputs, (2 * effects / effects.std() + 0.5 * gumbel).argmax(1))


@cache
def _embedded_regression() -> Tensors:
    parts = in_parts(_mixed(72, (12, 40, 200), 8, 1), (3072, 512, 512))
    return Tensors(
        "mixed",
        "8 standardized numbers with heavy tails and categories of 12, 40 and 200 values with Zipf's frequencies; the target is a sum of "
        "their effects and products, with noise (seed 72).",
        parts,
        partial(Tabular, 8, (12, 40, 200), 64, 2, 1),
        F.mse_loss,
        "R²",
        128,
        512,
        "embeddings of 8, residual MLP of width 64 with 2 blocks",
        "mean squared error",
    )


@cache
def _embedded_classes() -> Tensors:
    parts = in_parts(_mixed(73, (6, 25, 60, 400), 5, 6), (3072, 512, 512))
    about = (
        "5 standardized numbers with heavy tails and categories of 6, 25, 60 and 400 values with Zipf's frequencies; 6 classes by "
        "their effects and products (seed 73)."
    )
    net, model = "embeddings of 8, residual MLP of width 80 with 1 block", partial(Tabular, 5, (6, 25, 60, 400), 80, 1, 6)
    return Tensors("mixed-classes", about, parts, model, F.cross_entropy, "accuracy", 64, 512, net, "cross entropy")


MEMBERS = (
    Member("diabetes, raw", "tabular", 800, _diabetes),
    Member("mixed table, embeddings, regression", "tabular", 500, _embedded_regression),
    Member("Friedman, raw scales", "tabular", 800, _friedman),
    Member("mixed table, embeddings, classes", "tabular", 500, _embedded_classes),
)
