"""Models of text of the seventh set: multi-query attention with rotary positions, and an encoder of relative positions, tuned by DoRA."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiQueryAttention(nn.Module):
    """Causal attention of many queries to one key and value (Shazeer, 2019), turned by their places (Su et al., 2021): (N, T, width) ↦ as it."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.queries, self.keys = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * self.size, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        angles = torch.arange(context)[:, None] * 10_000.0 ** (-torch.arange(0, self.size, 2) / self.size)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        """Pairs of entries turned by the angles of their places, (…, T, size)."""
        a, b = x.chunk(2, -1)
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def forward(self, x: Tensor) -> Tensor:
        q = self.turned(self.queries(x).unflatten(2, (self.heads, self.size)).transpose(1, 2))
        k, v = (each[:, None].expand_as(q) for each in self.keys(x).chunk(2, 2))
        seen = F.scaled_dot_product_attention(q, self.turned(k), v, is_causal=True)
        return self.out(seen.transpose(1, 2).flatten(2))


class MultiQueryBlock(nn.Module):
    """x ↦ x + attention, x ↦ x + an MLP with GELU, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), MultiQueryAttention(width, heads, context)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MultiQueryGPT(nn.Module):
    """Next tokens, (N, T) ↦ (N, kinds, T); all weights begin with a deviation of 0.02, as GPT-2's."""

    def __init__(self, kinds: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.token = nn.Embedding(kinds, width)
        self.blocks = nn.Sequential(*(MultiQueryBlock(width, heads, context) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, kinds, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.token(tokens)))).transpose(1, 2)


class T5Attention(nn.Module):
    """Attention without biases and without 1/√d: (N, T, width) and a bias of scores (heads, T, T) ↦ (N, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        nn.init.normal_(self.q.weight, std=(width * width // heads) ** -0.5)
        for layer in (self.k, self.v, self.o):
            nn.init.normal_(layer.weight, std=width**-0.5)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(((q @ k.transpose(2, 3) + bias).softmax(3) @ v).transpose(1, 2).flatten(2))


class T5Block(nn.Module):
    """x ↦ x + attention, x ↦ x + wo(ReLU(wi x)), each behind an RMS norm."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.RMSNorm(width, 1e-6), T5Attention(width, heads), nn.RMSNorm(width, 1e-6)
        self.wi, self.wo = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
        nn.init.normal_(self.wi.weight, std=width**-0.5)
        nn.init.normal_(self.wo.weight, std=hidden**-0.5)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), bias)
        return x + self.wo(F.relu(self.wi(self.norm2(x))))


class T5Encoder(nn.Module):
    """Classes of texts by the mean over places, relative ones alone being told (Raffel et al., 2020): (N, T) ↦ (N, classes).

    All blocks have the same bias of scores, one for each head and distance up to a reach in either direction.
    """

    def __init__(self, signs: int, classes: int, width: int, layers: int, heads: int, reach: int = 16) -> None:
        super().__init__()
        self.token, self.reach = nn.Embedding(signs, width), reach
        self.relative = nn.Embedding(2 * reach + 1, heads)
        self.blocks = nn.ModuleList(T5Block(width, heads, 2 * width) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width, 1e-6), nn.Linear(width, classes)
        nn.init.normal_(self.relative.weight, std=width**-0.5)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, signs: Tensor) -> Tensor:
        places = torch.arange(signs.shape[1], device=signs.device)
        apart = (places - places[:, None]).clamp(-self.reach, self.reach) + self.reach
        bias = self.relative(apart).permute(2, 0, 1)
        x = self.token(signs)
        for block in self.blocks:
            x = block(x, bias)
        return self.head(self.norm(x).mean(1))


class DoRA(nn.Module):
    """x ↦ m ⊙ V x / ‖V‖, V = W₀ + (α/r) B A with W₀ frozen, ‖·‖ that of each row, which no gradient passes (Liu et al., 2024).

    B = 0 and m = ‖W₀‖ at first, so that it begins as the frozen layer.
    """

    def __init__(self, frozen: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.frozen, self.scale = frozen, alpha / rank
        self.A = nn.Parameter(torch.empty(rank, frozen.in_features))
        self.B = nn.Parameter(torch.zeros(frozen.out_features, rank))
        self.magnitude = nn.Parameter(frozen.weight.detach().norm(dim=1))
        nn.init.kaiming_uniform_(self.A, math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        moved = self.frozen.weight + self.scale * self.B @ self.A
        return F.linear(x, (self.magnitude / moved.detach().norm(dim=1))[:, None] * moved, self.frozen.bias)


def with_dora(model: T5Encoder, rank: int, alpha: float) -> T5Encoder:
    """Freeze an encoder but its head, and put a DoRA on the queries, values and both layers of the MLP of each block; the same module."""
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    for block in model.blocks:
        assert isinstance(block, T5Block)
        for owner, names in ((block.attention, ("q", "v")), (block, ("wi", "wo"))):
            for name in names:
                setattr(owner, name, DoRA(getattr(owner, name), rank, alpha))
    return model
