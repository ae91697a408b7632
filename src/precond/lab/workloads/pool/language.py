"""Characters of texts that every Python brings: a GPT and a Llama-like transformer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond.lab.workloads.data import Part
from precond.lab.workloads.idx import DataError
from precond.lab.workloads.networks import CharacterTransformer
from precond.lab.workloads.pool.member import Member
from precond.lab.workloads.problem import Tensors
from precond.lab.workloads.text import ALPHABET, library_text, windows

CONTEXT = 32
Text = Literal["code", "English"]


class RotaryAttention(nn.Module):
    """Causal attention without biases whose queries and keys are turned by their places (Su et al., 2021)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        half = width // heads // 2
        angles = torch.arange(context)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(self._turned(q), self._turned(k), v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _turned(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class GatedBlock(nn.Module):
    """x ↦ y + W₃(silu(W₁n)·W₂n), n = RMSNorm(y), y = x + attention(RMSNorm(x)) (Touvron et al., 2023)."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        hidden = 8 * width // 3
        self.attention_norm, self.attention = nn.RMSNorm(width), RotaryAttention(width, heads, context)
        self.mlp_norm = nn.RMSNorm(width)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        n = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(n)) * self.up(n))


class Llama(nn.Module):
    """Next characters, (N, T) ↦ (N, characters, T): rotary positions, RMSNorm, SwiGLU, and the embedding as the last layer's weight."""

    def __init__(self, characters: int, context: int, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.token = nn.Embedding(characters, width)
        nn.init.normal_(self.token.weight, std=0.02)
        self.blocks = nn.Sequential(*(GatedBlock(width, heads, context) for _ in range(layers)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, characters, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.token(tokens)))).transpose(1, 2)


@cache
def text(kind: Text, context: int = CONTEXT) -> tuple[str, dict[str, Part]]:
    """What it is, and its windows in parts.

    Raises:
        DataError: where Python's documentation topics or sources are not installed.
    """
    if kind == "code":
        return "Python's standard library, 96 characters: windows of its modules.", library_text(context, 600_000)
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python has no pydoc_data.topics, the English text of the pool; install Python's standard library"
        ) from error
    ordered = [topics[name] for name in sorted(topics)]
    return (
        "English: the topics of Python's help(), 96 characters, one topic in ten for validation, one for testing.",
        windows(ordered, context, 600_000, "pydoc_data.topics"),
    )


def gpt() -> CharacterTransformer:
    """Width 64, two layers."""
    return CharacterTransformer(len(ALPHABET), CONTEXT, 64, 2, 4)


@cache
def _language(model: Literal["GPT", "Llama"], kind: Text) -> Tensors:
    about, parts = text(kind)
    models: dict[str, tuple[Callable[[], nn.Module], str]] = {
        "GPT": (gpt, "causal transformer, pre-LayerNorm, learned positions, width 64, 2 layers, 4 heads"),
        "Llama": (
            partial(Llama, len(ALPHABET), CONTEXT),
            "causal transformer, pre-RMSNorm, rotary positions, SwiGLU, tied embeddings, width 64, 2 layers, 4 heads",
        ),
    }
    make, words = models[model]
    loss = "cross entropy of the next character"
    return Tensors(kind, about, parts, make, F.cross_entropy, "accuracy", 16, 64, f"{words}, context {CONTEXT}", loss)


MEMBERS = (
    Member("GPT, code", "language models", 300, partial(_language, "GPT", "code")),
    Member("Llama, English", "language models", 300, partial(_language, "Llama", "English")),
    Member("GPT, English", "language models", 300, partial(_language, "GPT", "English")),
    Member("Llama, code", "language models", 300, partial(_language, "Llama", "code")),
)
