"""Models that are no stack of equal layers: transformers of text and of images, and a deep autoencoder."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Scaled dot products of several heads, (N, T, width) to (N, T, width); causal: an element sees those up to itself."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"attention: width must be a multiple of heads, got {width} and {heads}")
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x ↦ y + MLP(LN(y)), y = x + attention(LN(x)); the MLP has one hidden layer of four times the width, GELU."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, heads, causal)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class CharacterTransformer(nn.Module):
    """Next characters: (N, T) classes ↦ (N, characters, T) logits, each from the characters up to its own place.

    Args:
        characters: size of the alphabet.
        context: largest T.
        width, layers, heads: of the blocks.
    """

    def __init__(self, characters: int, context: int, width: int = 96, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(characters, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.token(tokens) + self.position(places)))).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Classes of images (N, 1, side, side) from square patches (Dosovitskiy et al., 2021), averaged before the last layer.

    Args:
        classes: number of outputs.
        side, patch: of the image and of a patch, in pixels.
        width, layers, heads: of the blocks.
    """

    def __init__(self, classes: int, side: int = 28, patch: int = 7, width: int = 64, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        if side % patch:
            raise ValueError(f"vision transformer: side must be a multiple of patch, got {side} and {patch}")
        self.patch = patch
        self.patches, self.position = nn.Linear(patch * patch, width), nn.Embedding((side // patch) ** 2, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        cut = F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)
        places = torch.arange(cut.shape[1], device=images.device)
        return self.head(self.norm(self.blocks(self.patches(cut) + self.position(places))).mean(1))


def autoencoder(widths: tuple[int, ...] = (784, 500, 250, 30, 250, 500, 784)) -> nn.Sequential:
    """The deep autoencoder on which second-order methods are compared since Hinton & Salakhutdinov (2006).

    Args:
        widths: of the layers, from pixels to pixels; tanh between them, but the code (the middle layer) is linear.

    Returns:
        A module from (N, widths[0]) to logits of pixels (N, widths[-1]).
    """
    layers: list[nn.Module] = []
    middle, last = len(widths) // 2, len(widths) - 1
    for i, (a, b) in enumerate(itertools.pairwise(widths), start=1):
        layers.append(nn.Linear(a, b))
        if i not in (middle, last):
            layers.append(nn.Tanh())
    return nn.Sequential(*layers)
