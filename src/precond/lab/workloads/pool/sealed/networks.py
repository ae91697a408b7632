"""Models of the fifth set, written as users of PyTorch write them."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond.lab.workloads.networks import Block


class ResidualMLP(nn.Module):
    """x ↦ x + W₂ drop(ReLU(W₁ LN(x))), several times (Gorishniy et al., 2021): (N, features) ↦ (N, 1)."""

    def __init__(self, features: int, width: int, blocks: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.first = nn.Linear(features, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
            )
            for _ in range(blocks)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(F.relu(self.norm(x)))


class DoubleConv(nn.Sequential):
    """Twice a convolution, batch normalization and ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        pairs = (inputs, outputs), (outputs, outputs)
        super().__init__(
            *(layer for a, b in pairs for layer in (nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()))
        )


class UNet(nn.Module):
    """Down and up again, what was there at each size beside it (Ronneberger et al., 2015): (N, 1, side, side) ↦ logits of the same shape."""

    def __init__(self, *channels: int) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(channels))
        self.stem = DoubleConv(1, channels[0])
        self.down = nn.ModuleList(nn.Sequential(nn.MaxPool2d(2), DoubleConv(a, b)) for a, b in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in reversed(pairs))
        self.merge = nn.ModuleList(DoubleConv(2 * a, a) for a, _ in reversed(pairs))
        self.head = nn.Conv2d(channels[0], 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        seen = [self.stem(images)]
        for down in self.down:
            seen.append(down(seen[-1]))
        x = seen.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([seen.pop(), up(x)], 1))
        return self.head(x)


class ChannelNorm(nn.LayerNorm):
    """Layer normalization over the channels of (N, channels, height, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, LayerNorm, and an MLP of the channels, scaled by γ, 1e-6 at first (Liu et al., 2022)."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width), nn.LayerNorm(width)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Two stages of two blocks: (N, 1, side, side) ↦ (N, classes)."""

    def __init__(self, classes: int, width: int, kernel: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 2, 2), ChannelNorm(width, 1e-6))
        self.stage1 = nn.Sequential(ConvNeXtBlock(width, kernel), ConvNeXtBlock(width, kernel))
        self.downsample = nn.Sequential(ChannelNorm(width, 1e-6), nn.Conv2d(width, 2 * width, 2, 2))
        self.stage2 = nn.Sequential(ConvNeXtBlock(2 * width, kernel), ConvNeXtBlock(2 * width, kernel))
        self.norm, self.head = nn.LayerNorm(2 * width, 1e-6), nn.Linear(2 * width, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                module.bias.data.zero_()  # type: ignore[union-attr]  # each has one

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.stage2(self.downsample(self.stage1(self.stem(images)))).mean((2, 3))))


class StemmedViT(nn.Module):
    """A transformer over what two strided convolutions make of an image (Xiao et al., 2021), averaged: (N, 1, side, side) ↦ (N, classes)."""

    def __init__(self, classes: int, side: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width // 2, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, 2, 1),
        )
        self.positions = nn.Parameter(0.02 * torch.randn((side // 4) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


class Forecaster(nn.Module):
    """A GRU reads, and a GRU cell goes on from its own values: (N, T, 1) ↦ the next (N, ahead)."""

    def __init__(self, width: int, ahead: int) -> None:
        super().__init__()
        self.ahead = ahead
        self.encoder, self.decoder = nn.GRU(1, width, batch_first=True), nn.GRUCell(1, width)
        self.head = nn.Linear(width, 1)

    def forward(self, series: Tensor) -> Tensor:
        state, value, values = self.encoder(series)[1][0], series[:, -1], list[Tensor]()
        for _ in range(self.ahead):
            state = self.decoder(value, state)
            value = value + self.head(state)
            values.append(value)
        return torch.cat(values, 1)


class DeepONet(nn.Module):
    """Σₖ bₖ(f) tₖ(y) + b₀ (Lu et al., 2021): f at some places and times y, (N, sensors + Y) ↦ (N, Y)."""

    def __init__(self, sensors: int, width: int, modes: int) -> None:
        super().__init__()
        self.sensors = sensors
        self.branch = nn.Sequential(
            nn.Linear(sensors, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, modes)
        )
        self.trunk = nn.Sequential(
            nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, modes), nn.Tanh()
        )
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        force, times = x[:, : self.sensors], x[:, self.sensors :, None]
        return torch.einsum("nk,nyk->ny", self.branch(force), self.trunk(times)) + self.bias


class Tower(nn.Module):
    """A table of its own codes, one of kinds, and numbers through an MLP to the unit sphere: (N, code, kind and two numbers) ↦ (N, width)."""

    def __init__(self, rows: int, kinds: int, width: int) -> None:
        super().__init__()
        self.rows, self.kinds = nn.Embedding(rows, width), nn.Embedding(kinds, 8)
        self.mlp = nn.Sequential(nn.Linear(width + 8 + 2, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        code, kind = x[:, :2].long().unbind(1)
        return F.normalize(self.mlp(torch.cat([self.rows(code), self.kinds(kind), x[:, 2:]], 1)))


class FeatureTowers(nn.Module):
    """Cosines of all customers and all goods of a batch over a learned temperature, 0.1 at first: (N, 8) ↦ (N, N) (Radford et al., 2021)."""

    def __init__(self, customers: tuple[int, int], goods: tuple[int, int], width: int) -> None:
        super().__init__()
        self.customers, self.goods = Tower(*customers, width), Tower(*goods, width)
        self.logit_scale = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, x: Tensor) -> Tensor:
        return self.logit_scale.exp() * self.customers(x[:, :4]) @ self.goods(x[:, 4:]).T
