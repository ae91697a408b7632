"""Models of the fourth set, written as users of PyTorch write them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond.lab.workloads.pool.language import RotaryAttention

π = torch.pi


class HouseNet(nn.Module):
    """Numbers beside embedded codes through SELU layers with LeCun's initialization (Klambauer et al., 2017): (N, numbers + codes) ↦ (N, 1).

    Args:
        numbers: how many of the columns are numbers; the others are codes, stored as floating numbers.
        cardinalities: of the codes; each has a vector of 4 entries.
        widths: of the layers.
    """

    def __init__(self, numbers: int, cardinalities: tuple[int, ...], *widths: int) -> None:
        super().__init__()
        self.numbers = numbers
        self.tables = nn.ModuleList(nn.Embedding(c, 4) for c in cardinalities)
        sizes = itertools.pairwise((numbers + 4 * len(cardinalities), *widths))
        self.body = nn.Sequential(*(layer for a, b in sizes for layer in (nn.Linear(a, b), nn.SELU())))
        self.head = nn.Linear(widths[-1], 1)
        for layer in self.body:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        codes = x[:, self.numbers :].long()
        vectors = [table(codes[:, i]) for i, table in enumerate(self.tables)]
        return self.head(self.body(torch.cat([*vectors, x[:, : self.numbers]], 1)))


class SeriesAutoencoder(nn.Module):
    """Strided convolutions along time to a code, and nearest neighbors with convolutions back: (N, 1, T) ↦ the same; T is a multiple of 8."""

    def __init__(self, places: int, channels: tuple[int, int, int], code: int) -> None:
        super().__init__()
        a, b, c = channels
        self.shape = (c, places // 8)
        self.encoder = nn.Sequential(
            nn.Conv1d(1, a, 7, 2, 3), nn.SiLU(), nn.Conv1d(a, b, 5, 2, 2), nn.SiLU(), nn.Conv1d(b, c, 3, 2, 1), nn.SiLU(),
            nn.Flatten(), nn.Linear(c * places // 8, code),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(code, c * places // 8), nn.SiLU(), nn.Unflatten(1, self.shape),
            nn.Upsample(scale_factor=2), nn.Conv1d(c, b, 3, 1, 1), nn.SiLU(),
            nn.Upsample(scale_factor=2), nn.Conv1d(b, a, 5, 1, 2), nn.SiLU(),
            nn.Upsample(scale_factor=2), nn.Conv1d(a, 1, 7, 1, 3),
        )  # fmt: skip

    def forward(self, series: Tensor) -> Tensor:
        return self.decoder(self.encoder(series))


class LeNet(nn.Module):
    """LeNet-5 (LeCun et al., 1998) with ReLU: (N, 1, 20, 20) ↦ (N, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 5, padding=2), nn.Conv2d(8, 16, 5)
        self.fc1, self.fc2, self.head = nn.Linear(16 * 3 * 3, 96), nn.Linear(96, 64), nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.avg_pool2d(F.relu(self.conv1(images)), 2)
        x = F.avg_pool2d(F.relu(self.conv2(x)), 2)
        return self.head(F.relu(self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))))


class MixerBlock(nn.Module):
    """An MLP over places and one over channels, each behind a layer normalization and beside an identity."""

    def __init__(self, places: int, width: int, token_hidden: int, channel_hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.token_mixing = nn.Sequential(nn.Linear(places, token_hidden), nn.GELU(), nn.Linear(token_hidden, places))
        self.channel_mixing = nn.Sequential(nn.Linear(width, channel_hidden), nn.GELU(), nn.Linear(channel_hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mixing(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mixing(self.norm2(x))


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al., 2021): (N, 1, height, width of the image) ↦ (N, classes)."""

    def __init__(self, classes: int, shape: tuple[int, int], patch: int, width: int, blocks: int) -> None:
        super().__init__()
        places = (shape[0] // patch) * (shape[1] // patch)
        self.stem = nn.Conv2d(1, width, patch, patch)
        self.blocks = nn.Sequential(*(MixerBlock(places, width, width, 3 * width) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


class ParallelBlock(nn.Module):
    """x ↦ x + attention(n) + MLP(n), n = LayerNorm(x) (Wang & Komatsuzaki, 2021); attention is PyTorch's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        n = self.ln(x)
        mixed, _ = self.attn(n, n, n, attn_mask=hidden, need_weights=False)
        return x + mixed + self.mlp(n)


class ParallelGPT(nn.Module):
    """Next characters, (N, T) ↦ (N, characters, T): blocks with both branches side by side, learned positions."""

    def __init__(self, characters: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(characters, width), nn.Embedding(context, width)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.ModuleList(ParallelBlock(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        hidden = torch.ones(n, n, dtype=torch.bool, device=tokens.device).triu(1)
        x = self.tokens(tokens) + self.positions.weight[:n]
        for block in self.blocks:
            x = block(x, hidden)
        return self.head(self.norm(x)).transpose(1, 2)


class NormedAttention(RotaryAttention):
    """Rotary attention whose queries and keys are normalized in each head (Henry et al., 2020), as Qwen 3 and Gemma 3 do."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__(width, heads, context)
        self.q_norm, self.k_norm = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(self._turned(self.q_norm(q)), self._turned(self.k_norm(k)), v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class TuneBlock(nn.Module):
    """Pre-RMSNorm, attention with normalized queries and keys, and SwiGLU."""

    def __init__(self, width: int, heads: int, context: int, hidden: int) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = nn.RMSNorm(width), NormedAttention(width, heads, context)
        self.post_attention_layernorm = nn.RMSNorm(width)
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        n = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(n)) * self.up_proj(n))


class TuneLlama(nn.Module):
    """Next signs, (N, T) ↦ (N, signs, T); the embedding is the last layer's weight."""

    def __init__(self, signs: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(signs, width)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.Sequential(*(TuneBlock(width, heads, context, 5 * width // 2) for _ in range(layers)))
        self.norm, self.lm_head = nn.RMSNorm(width), nn.Linear(width, signs, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.norm(self.layers(self.embed_tokens(tokens)))).transpose(1, 2)


class Tagger(nn.Module):
    """A GRU in both directions, and a class for each place: (N, T) ↦ (N, classes, T)."""

    def __init__(self, signs: int, classes: int, embedding: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(signs, embedding)
        self.gru = nn.GRU(embedding, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, signs: Tensor) -> Tensor:
        return self.head(self.gru(self.embedding(signs))[0]).transpose(1, 2)


class Flow(nn.Module):
    """u·∇u = -∇p + Δu/Re and ∇·u = 0 of a plane flow, its values at the boundary asked of the net (Raissi et al., 2019).

    (N, 4), a point inside and one of the boundary ↦ what both equations and the second lack inside, and (u, v, p) at the boundary, (N, 6).
    (u, v, p) is an MLP with SiLU.

    Args:
        reynolds: Re.
        widths: of the hidden layers.
    """

    def __init__(self, reynolds: float, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.reynolds = reynolds
        layers = [layer for a, b in itertools.pairwise((2, *widths)) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], 3))

    def forward(self, points: Tensor) -> Tensor:
        inside, boundary = points.split(2, 1)
        return torch.cat([lacking(self.net, inside, self.reynolds), self.net(boundary)], 1)


def lacking(field: Callable[[Tensor], Tensor], points: Tensor, reynolds: float) -> Tensor:
    """What a field (x, y) ↦ (u, v, p) lacks of the equations at points (N, 2): two momenta and the continuity, (N, 3)."""
    with torch.enable_grad():
        at = points.detach().requires_grad_()
        values = field(at)
        u, v, _ = values.unbind(1)
        (du, dv, dp) = (torch.autograd.grad(column.sum(), at, create_graph=True)[0] for column in values.unbind(1))
        momenta = []
        for i, slope in enumerate((du, dv)):
            second = [torch.autograd.grad(slope[:, j].sum(), at, create_graph=True)[0][:, j] for j in (0, 1)]
            momenta.append(u * slope[:, 0] + v * slope[:, 1] + dp[:, i] - sum(second) / reynolds)
        return torch.stack([*momenta, du[:, 0] + dv[:, 1]], 1)


class PairwiseRanking(nn.Module):
    """Of two songs, by how much a listener's score of the first is higher: (listener, song, other, their genres) (N, 5) ↦ (N, 1).

    The score is ⟨u, v + w⟩ + b, v of the song and w of its genre.
    """

    def __init__(self, listeners: int, songs: int, genres: int, width: int) -> None:
        super().__init__()
        self.listeners, self.songs = nn.Embedding(listeners, width), nn.Embedding(songs, width)
        self.genres, self.popularity = nn.Embedding(genres, width), nn.Embedding(songs, 1)
        for table in (self.listeners, self.songs, self.genres):
            nn.init.normal_(table.weight, std=0.1)
        nn.init.zeros_(self.popularity.weight)

    def forward(self, codes: Tensor) -> Tensor:
        listener, *pair = codes.unbind(1)
        first, second = (self.songs(song) + self.genres(genre) for song, genre in zip(pair[:2], pair[2:], strict=True))
        score = (self.listeners(listener) * (first - second)).sum(1, keepdim=True)
        return score + self.popularity(pair[0]) - self.popularity(pair[1])
