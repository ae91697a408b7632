"""The tasks of the third set: models on data, batches and lengths."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from precond.lab.workloads.data import Part, standardized
from precond.lab.workloads.pool.confirmation import networks, pictures, sequences
from precond.lab.workloads.pool.member import Family, Member, in_parts, scaled
from precond.lab.workloads.problem import Tensors
from precond.lab.workloads.text import ALPHABET

CONTEXT, ITEMS, SEEN, PLACES, SPEED = 32, 400, 12, 32, 10.0
CONDITIONS = 100.0
"""Weight of initial values and of the period beside the equation's residual."""


def convection_loss(lacking: Tensor, targets: Tensor) -> Tensor:
    """Mean square of the residual, and 100 times those of the two conditions."""
    residual, *conditions = (lacking - targets).square().mean(0)
    return residual + CONDITIONS * sum(conditions)


@cache
def _cars() -> Tensors:
    codes = (sequences.BRANDS, sequences.MODELS, sequences.REGIONS)
    about = (
        f"Used cars (seed 201): {', '.join(sequences.CAR_NUMBERS)}, raw; codes of {codes[0]} brands, {codes[1]} models and {codes[2]} "
        "regions. The target is the price's logarithm, standardized."
    )
    parts = standardized(in_parts(sequences.cars(201, 5000), (4000, 500, 500)))
    words = "embeddings of 12, 16 and 8 beside raw numbers, MLP of 256 and 128, ReLU"
    make = partial(networks.CarNet, len(sequences.CAR_NUMBERS), codes)
    return Tensors("cars", about, parts, make, F.mse_loss, "R²", 256, 512, words, "mean squared error")


@cache
def _clusters() -> Tensors:
    parts = scaled(in_parts(sequences.clusters(202, 760, 24, 4), (400, 160, 200)), 24)
    about = "Four classes of three clusters each, 24 features of 8 dimensions and noise (seed 202); standardized by the training part."
    words = "MLP 24-192-192-4, batch normalization, ReLU and dropout of 0.1"
    make = partial(networks.NormalizedMLP, 24, 192, 192, 4)
    return Tensors("clusters", about, parts, make, F.cross_entropy, "accuracy", 32, 200, words, "cross entropy")


@cache
def _curves() -> Tensors:
    about = "Curves of second degree through three random points, 16 x 16 pixels from 0 to 1 (seed 203); the targets are the pixels."
    make = partial(networks.DeepAutoencoder, 256, 160, 80, 40, 8)
    words = "256-160-80-40-8-40-80-160-256, GELU, linear code"
    parts = in_parts(pictures.curves(203, 4096), (3072, 512, 512))
    loss, told = F.binary_cross_entropy_with_logits, "sigmoid cross entropy of a pixel"
    return Tensors("curves", about, parts, make, loss, None, 64, 512, words, told)


@cache
def _textures() -> Tensors:
    about = f"Textures in color, 16 x 16, with noise (seed 204): {', '.join(pictures.TEXTURES)}."
    make = partial(networks.TextureNet, len(pictures.TEXTURES))
    words = "ResNet with BN, strided stem, two basic blocks of 16 channels and two of 32"
    parts = in_parts(pictures.textures(204, 3072))
    return Tensors("textures", about, parts, make, F.cross_entropy, "accuracy", 32, 256, words, "cross entropy")


@cache
def _dots() -> Tensors:
    about = "One to eight dots on 16 x 16 pixels, of unequal sizes and brightness, with noise (seed 205); the class is their number."
    make = partial(networks.ClassTokenViT, pictures.DOTS, pictures.SIDE, 4)
    words = "vision transformer with a class token, torch.nn.TransformerEncoder, patches of 4 x 4, width 48, 2 layers, 4 heads"
    parts = in_parts(pictures.dots(205, 3072))
    return Tensors("dots", about, parts, make, F.cross_entropy, "accuracy", 32, 256, words, "cross entropy")


@cache
def _grammar() -> Tensors:
    about = f"Sentences of a grammar with agreement over relative clauses, {len(sequences.WORDS)} words (seed 206)."
    make = partial(networks.WordGPT, len(sequences.WORDS), CONTEXT)
    words = f"GPT-2's blocks and initialization, width 64, 2 layers, 4 heads, context {CONTEXT}"
    parts = in_parts(sequences.sentences(206, 5000, CONTEXT), (4000, 500, 500))
    return Tensors("grammar", about, parts, make, F.cross_entropy, "accuracy", 16, 64, words, "cross entropy")


@cache
def _names() -> Tensors:
    about = "Names of the characters of Unicode 3.2 below U+3000, shuffled (seed 207): windows of lists of 100 names."
    words = f"rotary positions, RMSNorm, SwiGLU, 4 heads in 2 groups, tied embeddings, width 64, 2 layers, context {CONTEXT}"
    make = partial(networks.GroupedLlama, len(ALPHABET), CONTEXT)
    parts = sequences.names(207, CONTEXT)
    return Tensors("names", about, parts, make, F.cross_entropy, "accuracy", 16, 64, words, "cross entropy")


@cache
def _activities() -> Tensors:
    about = f"Six periodic movements as a sensor on three axes feels them, {PLACES} places, frequency, tilt and noise drawn anew (seed 208)."
    make = partial(networks.SeriesClassifier, 3, sequences.ACTIVITIES, 40)
    parts = in_parts(sequences.activities(208, 3072, PLACES))
    words = "GRU of width 40, two layers, dropout of 0.1 between them, read at the last place"
    return Tensors("activities", about, parts, make, F.cross_entropy, "accuracy", 32, 256, words, "cross entropy")


@cache
def _convection() -> Tensors:
    n, period = 3072, 2 * torch.pi
    points = torch.rand(n, 4, generator=torch.Generator().manual_seed(209)) * torch.tensor([period, 1.0, period, 1.0])
    about = (
        f"u_t + {SPEED:g} u_x = 0 for 0 < x < 2π and 0 < t < 1, u = sin x at t = 0, periodic in x, the conditions as further terms of the loss. "
        "Points drawn evenly (seed 209)."
    )
    make, words = partial(networks.Convection, SPEED, (48, 48, 48, 48)), "MLP 2-48-48-48-48-1, tanh"
    parts, told = (
        in_parts(Part(points, torch.zeros(n, 3))),
        f"mean squared residual, and {CONDITIONS:g} times those of the conditions",
    )
    return Tensors("convection", about, parts, make, convection_loss, None, 128, 256, words, told)


@cache
def _sessions() -> Tensors:
    about = f"Which of {ITEMS} items comes after {SEEN} others, by a taste of 5 dimensions and popularity (seed 210)."
    parts = in_parts(sequences.sessions(210, 22_000, ITEMS, SEEN), (20_000, 1000, 1000))
    words = "mean of embeddings of 48 (EmbeddingBag), MLP 48-96-48, ReLU, and a score for each item"
    make = partial(networks.NextItem, ITEMS, 48)
    return Tensors("sessions", about, parts, make, F.cross_entropy, "accuracy", 256, 512, words, "cross entropy")


_ROWS: tuple[tuple[str, Family, int, Callable[[], Tensors]], ...] = (
    ("used cars, raw, embeddings", "tabular", 500, _cars),
    ("four classes of clusters, few samples", "tabular", 400, _clusters),
    ("deep autoencoder, curves", "autoencoders", 400, _curves),
    ("ResNet with BN, textures", "conv nets", 240, _textures),
    ("vision transformer with class token, dots", "vision transformers", 300, _dots),
    ("GPT, grammar", "language models", 300, _grammar),
    ("Llama with grouped queries, names", "language models", 500, _names),
    ("GRU of two layers, activities", "recurrent nets", 300, _activities),
    ("PINN, convection", "PINNs", 500, _convection),
    ("next item, sessions", "recommenders", 400, _sessions),
)
MEMBERS = tuple(Member(*row) for row in _ROWS)
