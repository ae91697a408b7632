"""Models of numbers and codes of the seventh set, written as users of PyTorch write them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FTTransformer(nn.Module):
    """Every number and code as a token, behind a transformer whose first token is read (Gorishniy et al., 2021): (N, numbers + codes) ↦ (N, 1).

    Args:
        numbers: columns of numbers, in front.
        codes: how many values each of the other columns has.
        width, layers, heads: of the transformer.
        dropout: in its layers.
    """

    offsets: Tensor

    def __init__(self, numbers: int, codes: Sequence[int], width: int, layers: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.numbers, bound = numbers, 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(numbers, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(numbers + len(codes), width).uniform_(-bound, bound))
        self.class_token = nn.Parameter(torch.empty(width).uniform_(-bound, bound))
        self.table = nn.Embedding(sum(codes), width)
        nn.init.uniform_(self.table.weight, -bound, bound)
        self.register_buffer("offsets", torch.tensor([0, *codes[:-1]]).cumsum(0))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 2 * width, dropout, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, columns: Tensor) -> Tensor:
        numbers, codes = columns[:, : self.numbers, None], columns[:, self.numbers :].long()
        tokens = torch.cat([numbers * self.weight, self.table(codes + self.offsets)], 1) + self.bias
        x = torch.cat([self.class_token.expand(len(columns), 1, -1), tokens], 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0])


class DLRM(nn.Module):
    """Numbers through an MLP, codes and a bag of them by tables, all products of two of these, and an MLP (Naumov et al., 2019): ↦ (N, 2).

    Columns are numbers, one code for each table, and codes of the first table, whose vectors in a table of bags are averaged.
    """

    def __init__(self, numbers: int, codes: Sequence[int], width: int, hidden: int) -> None:
        super().__init__()
        self.numbers, self.codes = numbers, len(codes)
        self.bottom = nn.Sequential(nn.Linear(numbers, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.ReLU())
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for rows in codes)
        self.bag = nn.EmbeddingBag(codes[0], width, mode="mean")
        for table in (*self.tables, self.bag):
            bound = 1 / math.sqrt(table.num_embeddings)
            nn.init.uniform_(table.weight, -bound, bound)
        vectors = len(codes) + 2
        pairs = vectors * (vectors - 1) // 2
        self.top = nn.Sequential(nn.Linear(width + pairs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, 2)
        for layer in (*self.bottom, *self.top):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.normal_(layer.bias, std=math.sqrt(1 / layer.out_features))

    def forward(self, columns: Tensor) -> Tensor:
        dense, codes = self.bottom(columns[:, : self.numbers]), columns[:, self.numbers :].long()
        vectors = [dense, self.bag(codes[:, self.codes :]), *(table(codes[:, i]) for i, table in enumerate(self.tables))]
        x = torch.stack(vectors, 1)
        first, second = torch.triu_indices(len(vectors), len(vectors), 1)
        return self.head(self.top(torch.cat([dense, (x @ x.transpose(1, 2))[:, first, second]], 1)))


class Selective(nn.Module):
    """A linear recurrence whose step, input and output depend on the input (Gu & Dao, 2023): (N, T, width) ↦ the same.

    h ← exp(Δ A) h + Δ B u and y = C·h + D u, with Δ, B and C of u itself and a diagonal A < 0; u is behind a short convolution.
    """

    def __init__(self, width: int, inner: int, state: int, rank: int) -> None:
        super().__init__()
        self.state, self.rank = state, rank
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, state + 1.0).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        # Steps begin between 0.001 and 0.1.
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        step = torch.empty(inner).uniform_(math.log(0.001), math.log(0.1)).exp()
        with torch.no_grad():
            self.dt_proj.bias.copy_(step.expm1().log())

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.in_proj(x).chunk(2, 2)
        u = F.silu(self.conv(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        step, b, c = self.x_proj(u).split([self.rank, self.state, self.state], 2)
        step = F.softplus(self.dt_proj(step))
        decay = (step[..., None] * -self.A_log.exp()).exp()
        added = (step * u)[..., None] * b[:, :, None]
        h, states = torch.zeros_like(added[:, 0]), list[Tensor]()
        for a, b in zip(decay.unbind(1), added.unbind(1), strict=True):
            h = a * h + b
            states.append(h)
        y = (torch.stack(states, 1) * c[:, :, None]).sum(3) + self.D * u
        return self.out_proj(y * F.silu(gate))


class Mamba(nn.Module):
    """x ↦ x + selective recurrence of its RMS norm, so many times: series (N, T, readings) ↦ (N, T, 1)."""

    def __init__(self, readings: int, width: int, layers: int, state: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(readings, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(layers))
        self.mixers = nn.ModuleList(Selective(width, 2 * width, state, max(1, width // 16)) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 1)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, series: Tensor) -> Tensor:
        x = self.stem(series)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return self.head(self.norm(x))


class Invasion(nn.Module):
    """Density u by an MLP with tanh, and what it lacks of u_t = D u_xx + r u(1 - u), D and r unknown: points (x, t) (N, 2) ↦ (N, 2).

    Args:
        low, high: bounds of x and t, which the MLP sees between -1 and 1.
        widths: of the MLP.
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Sequence[float], high: Sequence[float], *widths: int) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(low))
        self.register_buffer("high", torch.tensor(high))
        self.log_diffusion, self.log_growth = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        sizes = itertools.pairwise((2, *widths))
        self.body = nn.Sequential(*(layer for a, b in sizes for layer in (nn.Linear(a, b), nn.Tanh())))
        self.head = nn.Linear(widths[-1], 1)
        for layer in (*self.body, self.head):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def density(self, points: Tensor) -> Tensor:
        """u at points, (N, 2) ↦ (N, 1)."""
        return self.head(self.body(2 * (points - self.low) / (self.high - self.low) - 1))

    def forward(self, points: Tensor) -> Tensor:
        return torch.cat(lacking(self.density, points, self.log_diffusion.exp(), self.log_growth.exp()), 1)


def lacking(
    density: Callable[[Tensor], Tensor], points: Tensor, diffusion: float | Tensor, growth: float | Tensor
) -> tuple[Tensor, Tensor]:
    """A density u at points (x, t) (N, 2), and u_t - D u_xx - r u(1 - u): (N, 1) and (N, 1)."""
    with torch.enable_grad():
        x, t = (points[:, i : i + 1].detach().requires_grad_() for i in (0, 1))
        u = density(torch.cat([x, t], 1))
        u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
        return u, u_t - diffusion * u_xx - growth * u * (1 - u)
