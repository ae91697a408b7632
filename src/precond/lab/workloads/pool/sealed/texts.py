"""Models of text of the fifth set: encoder and decoder, gated linear recurrences, an encoder with adapters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond.lab.workloads.networks import Block


class Translator(nn.Module):
    """PyTorch's own encoder and decoder (Vaswani et al., 2017): the source's signs and those so far, (N, S + T) ↦ (N, signs, T).

    Args:
        read, written: signs of the source and of the target; one more starts it.
        source, target: S and T.
        width, layers, heads: of both sides.
    """

    def __init__(self, read: int, written: int, source: int, target: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.source = source
        self.read, self.written = nn.Embedding(read, width), nn.Embedding(written + 1, width)
        self.read_at, self.written_at = nn.Embedding(source, width), nn.Embedding(target, width)
        self.transformer = nn.Transformer(width, heads, layers, layers, 4 * width, 0.0, batch_first=True)
        self.head = nn.Linear(width, written)

    def forward(self, signs: Tensor) -> Tensor:
        source, target = signs[:, : self.source], signs[:, self.source :]
        later = torch.ones(*2 * [target.shape[1]], dtype=torch.bool, device=signs.device).triu(1)
        memory = self.read(source) + self.read_at.weight
        x = self.transformer(memory, self.written(target) + self.written_at.weight[: target.shape[1]], tgt_mask=later)
        return self.head(x).transpose(1, 2)


class GatedRecurrence(nn.Module):
    """hₜ = aₜ ⊙ hₜ₋₁ + √(1 - aₜ²) ⊙ iₜ ⊙ xₜ, with aₜ = σ(Λ)^(8 rₜ), and gates r and i of x (De et al., 2024, equations 1 to 4).

    (N, T, width) ↦ the same, in log₂ T passes: each place takes in twice as many before it (Hillis & Steele, 1986).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.recurrence_gate, self.input_gate = nn.Linear(width, width), nn.Linear(width, width)
        kept = torch.empty(width).uniform_(0.9, 0.999) ** (1 / 8)
        self.decay = nn.Parameter(torch.logit(kept))

    def forward(self, x: Tensor) -> Tensor:
        log_a = 8 * torch.sigmoid(self.recurrence_gate(x)) * F.logsigmoid(self.decay)
        h = (-torch.expm1(2 * log_a)).sqrt() * torch.sigmoid(self.input_gate(x)) * x
        a, back = log_a.exp(), 1
        while back < x.shape[1]:
            h = torch.cat([h[:, :back], h[:, back:] + a[:, back:] * h[:, :-back]], 1)
            a = torch.cat([a[:, :back], a[:, back:] * a[:, :-back]], 1)
            back *= 2
        return h


class RecurrentBlock(nn.Module):
    """Griffin's: a short causal convolution and a recurrence, gated, and a gated MLP, each behind an RMSNorm and beside an identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.gate, self.linear, self.out = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.conv = nn.Conv1d(width, width, 4, padding=3, groups=width)
        self.recurrence = GatedRecurrence(width)
        self.mlp_gate, self.mlp_up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.mlp_down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm1(x)
        near = self.conv(self.linear(n).transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        x = x + self.out(F.gelu(self.gate(n)) * self.recurrence(near))
        n = self.norm2(x)
        return x + self.mlp_down(F.gelu(self.mlp_gate(n)) * self.mlp_up(n))


class RecurrentLM(nn.Module):
    """Next signs without attention, (N, T) ↦ (N, signs, T)."""

    def __init__(self, signs: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(signs, width)
        self.blocks = nn.Sequential(*(RecurrentBlock(width) for _ in range(layers)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, signs, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens)))).transpose(1, 2)


class TextEncoder(nn.Module):
    """A transformer that sees both sides: (N, T) ↦ (N, T, width)."""

    def __init__(self, signs: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(signs, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.blocks(self.tokens(tokens) + self.positions.weight))


class Labeler(nn.Module):
    """A class for each place: (N, T) ↦ (N, classes, T)."""

    def __init__(self, body: TextEncoder, width: int, classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(tokens)).transpose(1, 2)


class Adapter(nn.Module):
    """x ↦ x + W₂ GELU(W₁ x), W₂ = 0 at first (Houlsby et al., 2019)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(x)))


def adapted(model: Labeler, rank: int) -> Labeler:
    """Freeze all but the norms and the head, and put an adapter behind each attention and each MLP; the same module."""
    for module in model.body.modules():
        module.requires_grad_(isinstance(module, nn.LayerNorm))
    for block in model.body.blocks:
        for name in ("attention", "mlp"):
            setattr(block, name, nn.Sequential(getattr(block, name), Adapter(model.head.in_features, rank)))
    return model
