"""Recommenders: embeddings of users, items and contexts, most of which a batch does not see."""

from __future__ import annotations

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond.lab.workloads.data import Part
from precond.lab.workloads.pool.member import Member, in_parts, standard
from precond.lab.workloads.pool.tabular import MLP
from precond.lab.workloads.problem import Tensors


def _embedding(rows: int, width: int) -> nn.Embedding:
    found = nn.Embedding(rows, width)
    nn.init.normal_(found.weight, std=0.05)
    return found


class NeuralCollaborativeFiltering(nn.Module):
    """Products of two embeddings beside an MLP of two others (He et al., 2017): (user, item) (N, 2) ↦ (N, 1)."""

    def __init__(self, users: int, items: int, width: int = 16) -> None:
        super().__init__()
        self.users, self.items = _embedding(users, width), _embedding(items, width)
        self.mlp_users, self.mlp_items = _embedding(users, width), _embedding(items, width)
        self.mlp = nn.Sequential(nn.Linear(2 * width, 32), nn.ReLU(), nn.Linear(32, width), nn.ReLU())
        self.head = nn.Linear(2 * width, 1)

    def forward(self, pairs: Tensor) -> Tensor:
        user, item = pairs.unbind(1)
        deep = self.mlp(torch.cat([self.mlp_users(user), self.mlp_items(item)], 1))
        return self.head(torch.cat([self.users(user) * self.items(item), deep], 1))


class TwoTowers(nn.Module):
    """⟨f(user), g(item)⟩ + b(item), f and g MLPs of embeddings: (user, item) (N, 2) ↦ logits (N, 1)."""

    def __init__(self, users: int, items: int, width: int = 16) -> None:
        super().__init__()
        self.users, self.items, self.bias = _embedding(users, width), _embedding(items, width), _embedding(items, 1)
        self.user_tower, self.item_tower = MLP(width, 32, width), MLP(width, 32, width)

    def forward(self, pairs: Tensor) -> Tensor:
        user, item = pairs.unbind(1)
        score = self.user_tower(self.users(user)) * self.item_tower(self.items(item))
        return score.sum(1, keepdim=True) + self.bias(item)


class ClickNet(nn.Module):
    """Products of all pairs of fields' embeddings, and an MLP above them (Naumov et al., 2019).

    (N, numbers + fields) ↦ logits (N, 1); the numbers are one more field.
    """

    pairs: Tensor

    def __init__(self, numbers: int, fields: tuple[int, ...], width: int = 8) -> None:
        super().__init__()
        self.numbers = numbers
        self.bottom = MLP(numbers, 32, width)
        self.fields = nn.ModuleList(_embedding(rows, width) for rows in fields)
        pairs = torch.triu_indices(len(fields) + 1, len(fields) + 1, 1)
        self.register_buffer("pairs", pairs, persistent=False)
        self.top = MLP(width + pairs.shape[1], 48, 1)

    def forward(self, x: Tensor) -> Tensor:
        codes, numbers = x[:, self.numbers :].long(), self.bottom(x[:, : self.numbers])
        vectors = torch.stack([numbers, *(field(codes[:, i]) for i, field in enumerate(self.fields))], 1)
        products = vectors @ vectors.transpose(1, 2)
        return self.top(torch.cat([numbers, products[:, self.pairs[0], self.pairs[1]]], 1))


def _pairs(seed: int, users: int, items: int, n: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """Users and items by Zipf's frequencies, and a score of each pair from biases and a product of rank 4."""
    g = torch.Generator().manual_seed(seed)
    user = torch.multinomial(torch.arange(1, users + 1.0) ** -0.7, n, replacement=True, generator=g)
    item = torch.multinomial(torch.arange(1, items + 1.0) ** -0.9, n, replacement=True, generator=g)
    u, v = torch.randn(users, 4, generator=g), torch.randn(items, 4, generator=g)
    score = 0.5 * torch.randn(users, generator=g)[user] + 0.7 * torch.randn(items, generator=g)[item]
    return torch.stack([user, item], 1), score + (u[user] * v[item]).sum(1) / 2, g


@cache
def _ratings() -> Tensors:
    pairs, score, g = _pairs(83, 500, 300, 14_000)
    ratings = standard((2 * score + 0.5 * torch.randn(len(score), generator=g)).round().clamp(-4, 4)[:, None])
    return Tensors(
        "ratings",
        "Ratings of 300 items by 500 users: biases and a product of rank 4, rounded, with noise (seed 83); standardized.",
        in_parts(Part(pairs, ratings), (12_000, 1000, 1000)),
        partial(NeuralCollaborativeFiltering, 500, 300),
        F.mse_loss,
        "R²",
        256,
        512,
        "neural collaborative filtering, embeddings of 16, MLP 32-32-16",
        "mean squared error",
    )


@cache
def _implicit() -> Tensors:
    pairs, score, g = _pairs(84, 600, 400, 14_000)
    taken = (score - 0.5 + torch.randn(len(score), generator=g) * 0.5 > 0).float()[:, None]
    return Tensors(
        "implicit",
        "Which of 400 items 600 users took: the sign of biases and a product of rank 4 with noise (seed 84).",
        in_parts(Part(pairs, taken), (12_000, 1000, 1000)),
        partial(TwoTowers, 600, 400),
        F.binary_cross_entropy_with_logits,
        None,
        256,
        512,
        "two towers, embeddings of 16, MLP 16-32-16",
        "sigmoid cross entropy",
    )


@cache
def _clicks() -> Tensors:
    g, fields, n = torch.Generator().manual_seed(85), (50, 120, 300, 8, 800), 14_000
    numbers = standard(torch.randn(n, 4, generator=g).exp().log1p())
    codes = [torch.multinomial(1 / torch.arange(1, f + 1.0), n, replacement=True, generator=g) for f in fields]
    hidden = [torch.randn(f, 3, generator=g)[code] for f, code in zip(fields, codes, strict=True)]
    score = numbers @ torch.randn(4, generator=g) * 0.5 - 1
    for i, a in enumerate(hidden):
        score = score + 0.3 * a[:, 0] + sum(((a * b).sum(1) for b in hidden[i + 1 :]), torch.zeros(n)) * 0.3
    clicked = (torch.rand(n, generator=g) < torch.sigmoid(2 * score)).float()[:, None]
    inputs = torch.cat([numbers, torch.stack(codes, 1).float()], 1)
    about = (
        "Clicks by 4 numbers and fields of 50, 120, 300, 8 and 800 values with Zipf's frequencies: products of the fields' hidden vectors "
        "(seed 85)."
    )
    parts, model = in_parts(Part(inputs, clicked), (12_000, 1000, 1000)), partial(ClickNet, 4, fields)
    net = "products of embeddings of 8 and an MLP of width 48 above (DLRM)"
    loss = F.binary_cross_entropy_with_logits
    return Tensors("clicks", about, parts, model, loss, None, 256, 512, net, "sigmoid cross entropy")


MEMBERS = (
    Member("collaborative filtering, ratings", "recommenders", 600, _ratings),
    Member("two towers, implicit feedback", "recommenders", 600, _implicit),
    Member("click prediction, products of fields", "recommenders", 600, _clicks),
)
