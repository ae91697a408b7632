"""Models of the third set, written as users of PyTorch write them."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

π = torch.pi


class CarNet(nn.Module):
    """Raw numbers beside embedded codes, through an MLP: (N, numbers + codes) ↦ (N, 1).

    Args:
        numbers: how many of the columns are numbers; the others are codes, stored as floating numbers.
        cardinalities: of the codes; a code of c values has a vector of c/2 entries, 16 at most.
    """

    def __init__(self, numbers: int, cardinalities: tuple[int, ...]) -> None:
        super().__init__()
        self.numbers = numbers
        widths = [min(16, c // 2) for c in cardinalities]
        self.embeddings = nn.ModuleList(nn.Embedding(c, width) for c, width in zip(cardinalities, widths, strict=True))
        self.mlp = nn.Sequential(nn.Linear(numbers + sum(widths), 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU())
        self.head = nn.Linear(128, 1)

    def forward(self, x: Tensor) -> Tensor:
        codes = x[:, self.numbers :].long()
        vectors = [embedding(code) for embedding, code in zip(self.embeddings, codes.unbind(1), strict=True)]
        return self.head(self.mlp(torch.cat([x[:, : self.numbers], *vectors], 1)))


class NormalizedMLP(nn.Sequential):
    """Linear layers, each with batch normalization, ReLU and dropout behind it, and a last one alone."""

    def __init__(self, *widths: int, dropout: float = 0.1) -> None:
        super().__init__()
        for i, (a, b) in enumerate(itertools.pairwise(widths[:-1])):
            self.add_module(
                f"block{i}", nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(inplace=True), nn.Dropout(dropout))
            )
        self.add_module("head", nn.Linear(widths[-2], widths[-1]))


class DeepAutoencoder(nn.Module):
    """GELU between linear layers, the code without one: (N, widths[0]) ↦ logits of the same shape."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.encoder, self.decoder = self._stack(widths), self._stack(widths[::-1])

    @staticmethod
    def _stack(widths: tuple[int, ...]) -> nn.Sequential:
        layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.GELU())]
        return nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class BasicBlock(nn.Module):
    """torchvision's: two convolutions with batch normalization, and another beside them where shapes change."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride > 1 or inplanes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class TextureNet(nn.Module):
    """A strided stem and four basic blocks in two stages, initialized as torchvision's ResNets are: (N, 3, 16, 16) ↦ (N, classes)."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(BasicBlock(width, width), BasicBlock(width, width))
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width))
        self.avgpool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(2 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(images)))))
        return self.head(torch.flatten(self.avgpool(x), 1))


class ClassTokenViT(nn.Module):
    """PyTorch's own encoder over patches and a token that is read at the end (Dosovitskiy et al., 2021): (N, 1, side, side) ↦ (N, classes)."""

    def __init__(self, classes: int, side: int, patch: int, width: int = 48, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Embedding((side // patch) ** 2 + 1, width)
        nn.init.trunc_normal_(self.positions.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), 1, -1), x], 1)
        return self.head(self.encoder(x + self.positions.weight)[:, 0])


class GPTBlock(nn.Module):
    """nanoGPT's: queries, keys and values by one layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(self.ln_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class WordGPT(nn.Module):
    """Next words, (N, T) ↦ (N, words, T); GPT-2's initialization: 0.02, and 0.02/√(2 layers) where a branch ends."""

    def __init__(self, words: int, context: int, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(words, width), nn.Embedding(context, width)
        self.h = nn.ModuleList(GPTBlock(width, heads) for _ in range(layers))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5 if "c_proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x)).transpose(1, 2)


class GroupedAttention(nn.Module):
    """Causal attention, rotary, whose queries share keys and values in groups (Ainslie et al., 2023); turned as complex numbers."""

    turns: Tensor

    def __init__(self, width: int, heads: int, groups: int, context: int) -> None:
        super().__init__()
        self.size = width // heads
        self.wq, self.wo = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.wk, self.wv = (nn.Linear(width, groups * self.size, bias=False) for _ in range(2))
        frequencies = 10_000.0 ** (-torch.arange(0, self.size, 2) / self.size)
        angles = torch.outer(torch.arange(context), frequencies)
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.wq, self.wk, self.wv))
        mixed = F.scaled_dot_product_attention(self._turned(q), self._turned(k), v, is_causal=True, enable_gqa=True)
        return self.wo(mixed.transpose(1, 2).flatten(2))

    def _turned(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * self.turns[: x.shape[-2]]).flatten(-2)


class LlamaBlock(nn.Module):
    """Pre-RMSNorm, grouped attention, and SwiGLU whose two inner layers are one, as fused kernels have it."""

    def __init__(self, width: int, heads: int, groups: int, context: int, hidden: int) -> None:
        super().__init__()
        self.attention, self.attention_norm = GroupedAttention(width, heads, groups, context), nn.RMSNorm(width)
        self.ffn_norm, self.gate_up_proj = nn.RMSNorm(width), nn.Linear(width, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x))
        gate, up = self.gate_up_proj(self.ffn_norm(h)).chunk(2, -1)
        return h + self.down_proj(F.silu(gate) * up)


class GroupedLlama(nn.Module):
    """Next characters, (N, T) ↦ (N, characters, T), by the embedding's own vectors; all matrices begin with a deviation of 0.02."""

    def __init__(
        self, characters: int, context: int, width: int = 64, layers: int = 2, heads: int = 4, groups: int = 2
    ) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(characters, width)
        self.layers = nn.ModuleList(LlamaBlock(width, heads, groups, context, 3 * width) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.tok_embeddings.weight).transpose(1, 2)


class SeriesClassifier(nn.Module):
    """A GRU of two layers with dropout between them, read at the last place: (N, T, channels) ↦ (N, classes)."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(channels, width, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(width, classes)

    def forward(self, series: Tensor) -> Tensor:
        _, last = self.gru(series)
        return self.head(last[-1])


class Convection(nn.Module):
    """u_t + β u_x = 0 for 0 < x < 2π and 0 < t < 1, u = sin x at t = 0, periodic in x, all asked of the net (Krishnapriyan et al., 2021).

    (N, 4) with columns x and t of a point, x of one at t = 0, and t of one at x = 0 and x = 2π ↦ what the equation, the initial values and the
    period lack there, (N, 3); u is an MLP with tanh that is called for each of them.

    Args:
        β: the speed.
        widths: of the hidden layers.
    """

    def __init__(self, β: float, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.β = β
        layers = [layer for a, b in itertools.pairwise((2, *widths)) for layer in (nn.Linear(a, b), nn.Tanh())]
        self.net = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], 1)

    def u(self, x: Tensor, t: Tensor) -> Tensor:
        """The solution at points, (N, 1)."""
        return self.head(self.net(torch.cat([x, t], 1)))

    def forward(self, points: Tensor) -> Tensor:
        with torch.enable_grad():
            x, t, start, at = (column.detach()[:, None] for column in points.unbind(1))
            x.requires_grad_()
            t.requires_grad_()
            u_x, u_t = torch.autograd.grad(self.u(x, t).sum(), (x, t), create_graph=True)
            initial = self.u(start, torch.zeros_like(start)) - start.sin()
            period = self.u(torch.zeros_like(at), at) - self.u(torch.full_like(at, 2 * π), at)
            return torch.cat([u_t + self.β * u_x, initial, period], 1)


class NextItem(nn.Module):
    """The mean of the vectors of what was taken, an MLP, and a score for each item (Covington et al., 2016): (N, seen) ↦ (N, items)."""

    def __init__(self, items: int, width: int) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(items, width, mode="mean")
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width), nn.ReLU())
        self.head = nn.Linear(width, items)

    def forward(self, taken: Tensor) -> Tensor:
        return self.head(self.mlp(self.bag(taken)))
