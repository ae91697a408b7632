"""Models of the sixth set, written as users of PyTorch write them; those of sequences are in ``readers``."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Experts(nn.Module):
    """x ↦ x + Σ gᵢ(x) Eᵢ(LN(x)) over the two experts of the largest gates, a softmax of these two (Shazeer et al., 2017)."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(width), nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        values, which = self.gate(n).topk(2)
        gates = torch.zeros(len(x), len(self.experts), device=x.device).scatter(1, which, values.softmax(1))
        outputs = torch.stack([expert(n) for expert in self.experts], 1)
        return x + torch.einsum("ne,new->nw", gates, outputs)


class MixtureNet(nn.Sequential):
    """Two layers of experts between linear ones: (N, features) ↦ (N, 1)."""

    def __init__(self, features: int, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.stem = nn.Linear(features, width)
        self.first, self.second = (Experts(width, hidden, experts) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1)


class Coupling(nn.Module):
    """(a, b) ↦ (b ⊙ exp s(a) + t(a), a) and Σ s(a) (Dinh et al., 2017); the net of s and t ends in zeros, so that it begins as an exchange."""

    def __init__(self, half: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(half, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2 * half)
        )
        nn.init.zeros_(self.net[-1].weight)  # type: ignore[arg-type]  # of a linear layer
        nn.init.zeros_(self.net[-1].bias)  # type: ignore[arg-type]
        self.scale = nn.Parameter(torch.ones(half))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        s, t = self.net(a).chunk(2, 1)
        s = self.scale * s.tanh()
        return torch.cat([b * s.exp() + t, a], 1), s.sum(1)


class Flow(nn.Module):
    """Logarithm of a density, that of a normal one behind so many couplings, whose halves are mixed between them: (N, 2 half) ↦ (N, 1)."""

    order: Tensor

    def __init__(self, half: int, width: int, couplings: int) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(Coupling(half, width) for _ in range(couplings))
        # Every second time the halves themselves are other ones.
        self.register_buffer("order", torch.arange(2 * half).view(2, half).T.flatten(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        z, stretched = x, torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for i, coupling in enumerate(self.couplings):
            z, more = coupling(z if i % 2 else z[:, self.order])
            stretched = stretched + more
        normal = -(z.square() + torch.tensor(2 * torch.pi).log()).sum(1) / 2
        return (normal + stretched)[:, None]


class GatedGraph(nn.Module):
    """The same message and GRU cell so many times, and a gated sum over atoms (Li et al., 2016): (N, atoms, kinds + atoms) ↦ (N, targets)."""

    def __init__(self, kinds: int, width: int, rounds: int, targets: int) -> None:
        super().__init__()
        self.kinds, self.rounds = kinds, rounds
        self.embed, self.message, self.update = nn.Linear(kinds, width), nn.Linear(width, width), nn.GRUCell(width, width)
        self.gate, self.value = (nn.Linear(width + kinds, width) for _ in range(2))
        self.head = nn.Linear(width, targets)

    def forward(self, graphs: Tensor) -> Tensor:
        x, bonds = graphs[..., : self.kinds], graphs[..., self.kinds :]
        h = self.embed(x)
        for _ in range(self.rounds):
            h = self.update((bonds @ self.message(h)).flatten(0, 1), h.flatten(0, 1)).view_as(h)
        last = torch.cat([h, x], 2)
        read = torch.sigmoid(self.gate(last)) * self.value(last).tanh()
        there = x.sum(2, keepdim=True)
        return self.head((there * read).sum(1) / there.sum(1))


class SetAttention(nn.Module):
    """(x, y) ↦ h + ReLU(W LN(h)), h = x + attention of LN(x) to LN(y) (Lee et al., 2019, with norms in front)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear, self.norm1, self.norm2 = nn.Linear(width, width), nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        seen = self.norm1(y)
        h = x + self.attention(self.norm1(x), seen, seen, need_weights=False)[0]
        return h + F.relu(self.linear(self.norm2(h)))


class Induced(nn.Module):
    """Points attend to a few learned ones, which have attended to them."""

    def __init__(self, width: int, heads: int, few: int) -> None:
        super().__init__()
        self.inducing = nn.Parameter(nn.init.xavier_uniform_(torch.empty(few, width)))
        self.inner, self.outer = SetAttention(width, heads), SetAttention(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(x, self.inner(self.inducing.expand(len(x), -1, -1), x))


class SetTransformer(nn.Module):
    """Classes of sets of points, whose order is nothing to it: (N, points, dimension) ↦ (N, classes)."""

    def __init__(self, dimension: int, classes: int, width: int, heads: int, few: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(dimension, width), nn.GELU(), nn.Linear(width, width))
        self.encoder = nn.Sequential(Induced(width, heads, few), Induced(width, heads, few))
        self.seed = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, width)))
        self.pool, self.head = SetAttention(width, heads), nn.Linear(width, classes)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, points: Tensor) -> Tensor:
        x = self.encoder(self.embed(points))
        return self.head(self.pool(self.seed.expand(len(x), -1, -1), x)[:, 0])


class Schroedinger(nn.Module):
    """What h lacks of i h_t + h_xx/2 + |h|² h = 0, real and imaginary part: points (x, t) (N, 2) ↦ (N, 2).

    h is that of a soliton of speed 1 at t = 0, and at both ends what it is there, for any net: an MLP with tanh of random Fourier features
    (Tancik et al., 2020), sines and cosines of drawn combinations of x and t.
    """

    frequencies: Tensor

    def __init__(self, features: int, *widths: int, deviation: float = 1.5) -> None:
        super().__init__()
        self.register_buffer("frequencies", deviation * torch.randn(2, features))
        sizes = itertools.pairwise((2 * features, *widths))
        self.body = nn.Sequential(*(layer for a, b in sizes for layer in (nn.Linear(a, b), nn.Tanh())))
        self.head = nn.Linear(widths[-1], 2)

    def field(self, x: Tensor, t: Tensor) -> Tensor:
        """h at points, (N, 1) and (N, 1) ↦ (N, 2)."""
        turns = torch.cat([(x - 1) / 5, t - 1], 1) @ self.frequencies
        n = self.head(self.body(torch.cat([turns.sin(), turns.cos()], 1)))
        return soliton(x, torch.zeros_like(t)) + t * (x + 4) * (6 - x) / 25 * n

    def forward(self, points: Tensor) -> Tensor:
        return schroedinger(self.field, points)


def soliton(x: Tensor, t: Tensor) -> Tensor:
    """sech(x - t) eⁱˣ, an exact solution of speed 1: (N, 1) and (N, 1) ↦ its real and imaginary part (N, 2)."""
    return torch.cat([x.cos(), x.sin()], 1) / (x - t).cosh()


def schroedinger(field: Callable[[Tensor, Tensor], Tensor], points: Tensor) -> Tensor:
    """What a field lacks of the equation at points (N, 2): with h = u + iv, u_t + v_xx/2 + |h|² v and v_t - u_xx/2 - |h|² u, (N, 2)."""
    with torch.enable_grad():
        x, t = (points[:, i : i + 1].detach().requires_grad_() for i in (0, 1))
        h = field(x, t)
        (u_x, u_t), (v_x, v_t) = (torch.autograd.grad(h[:, i].sum(), (x, t), create_graph=True) for i in (0, 1))
        u_xx, v_xx = (torch.autograd.grad(slope.sum(), x, create_graph=True)[0] for slope in (u_x, v_x))
        (u, v), square = h.split(1, 1), h.square().sum(1, keepdim=True)
        return torch.cat([u_t + v_xx / 2 + square * v, v_t - u_xx / 2 - square * u], 1)


class ListAutoencoder(nn.Module):
    """Scores of all songs by those of a list, some of which are hidden in training (Liang et al., 2018): (N, songs) ↦ (N, songs)."""

    def __init__(self, songs: int, width: int) -> None:
        super().__init__()
        self.drop, self.encoder, self.decoder = nn.Dropout(0.3), nn.Linear(songs, width), nn.Linear(width, songs)
        for layer in (self.encoder, self.decoder):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.trunc_normal_(layer.bias, std=0.001)

    def forward(self, seen: Tensor) -> Tensor:
        return self.decoder(self.encoder(self.drop(seen)).tanh())


class PreActivation(nn.Module):
    """x ↦ x + two convolutions, each behind batch normalization and ReLU (He et al., 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class DeepResNet(nn.Module):
    """Twelve blocks in two stages: (N, 1, side, side) ↦ (N, classes)."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.stage1 = nn.Sequential(*(PreActivation(channels) for _ in range(6)))
        self.down = nn.Conv2d(channels, 2 * channels, 2, 2, bias=False)
        self.stage2 = nn.Sequential(*(PreActivation(2 * channels) for _ in range(6)))
        self.bn, self.head = nn.BatchNorm2d(2 * channels), nn.Linear(2 * channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stage2(self.down(self.stage1(self.stem(images))))
        return self.head(F.relu(self.bn(x)).mean((2, 3)))


def frozen_below(model: DeepResNet) -> DeepResNet:
    """Freeze the convolutions up to the end of the first stage, not its batch normalizations; the same module."""
    for module in (model.stem, *model.stage1.modules()):
        if isinstance(module, nn.Conv2d):
            module.requires_grad_(False)
    return model
