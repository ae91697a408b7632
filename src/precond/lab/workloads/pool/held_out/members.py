"""The tasks of the fourth set: models on data, batches and lengths."""

from __future__ import annotations

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond.lab.workloads.data import Part, standardized
from precond.lab.workloads.networks import VisionTransformer
from precond.lab.workloads.pool.drawings import SHAPES, shapes
from precond.lab.workloads.pool.finetuning import trained, tuned_with_lora
from precond.lab.workloads.pool.held_out import networks, pictures, sequences
from precond.lab.workloads.pool.member import Member, in_parts, scaled
from precond.lab.workloads.problem import Tensors
from precond.lab.workloads.text import ALPHABET

CONTEXT, BARS, PLACES, BEAT, REYNOLDS = 40, 48, 40, 96, 40.0
BOUNDARY = 10.0
"""Weight of the boundary's values beside the equations."""


def flow_loss(lacking: Tensor, targets: Tensor) -> Tensor:
    """Sum of the mean squares of the three equations, and 10 times those of the boundary's three values."""
    return (lacking - targets).square().mean(0) @ torch.tensor(3 * [1.0] + 3 * [BOUNDARY], dtype=lacking.dtype)


def order_loss(differences: Tensor, _: Tensor) -> Tensor:
    """-log σ(what is heard scores higher), the mean (Rendle et al., 2009)."""
    return F.softplus(-differences).mean()


def kovasznay(points: Tensor, reynolds: float = REYNOLDS) -> Tensor:
    """(u, v, p) behind a grid, an exact solution (Kovasznay, 1948): (N, 2) ↦ (N, 3)."""
    x, y = points.unbind(1)
    λ = reynolds / 2 - (reynolds**2 / 4 + 4 * torch.pi**2) ** 0.5
    grows, turn = (λ * x).exp(), 2 * torch.pi * y
    return torch.stack([1 - grows * turn.cos(), λ / (2 * torch.pi) * grows * turn.sin(), (1 - grows.square()) / 2], 1)


@cache
def _houses() -> Tensors:
    codes = (sequences.DISTRICTS, sequences.TYPES, sequences.HEATINGS)
    about = (
        f"Houses (seed 301): {', '.join(sequences.HOUSE_NUMBERS)}, standardized by the training part; codes of {codes[0]} districts, "
        f"{codes[1]} types and {codes[2]} heatings. The target is the price's logarithm, standardized."
    )
    numbers = len(sequences.HOUSE_NUMBERS)
    parts = scaled(standardized(in_parts(sequences.houses(301, 880), (500, 180, 200))), numbers)
    words = "embeddings of 4 beside the numbers, MLP of 128, 128, 128 and 64, SELU"
    make = partial(networks.HouseNet, numbers, codes, 128, 128, 128, 64)
    return Tensors("houses", about, parts, make, F.mse_loss, "R²", 25, 250, words, "mean squared error")


@cache
def _heartbeats() -> Tensors:
    about = (
        f"Drawn electrocardiograms, two seconds in {BEAT} places, any pulse, with noise (seed 302); the targets are the inputs."
    )
    words = "convolutions along time of 12, 24 and 32 channels, code of 16, nearest neighbors with convolutions back, SiLU"
    make = partial(networks.SeriesAutoencoder, BEAT, (12, 24, 32), 16)
    parts = in_parts(sequences.heartbeats(302, 4096, BEAT), (3072, 512, 512))
    return Tensors("heartbeats", about, parts, make, F.mse_loss, None, 32, 256, words, "mean squared error")


@cache
def _lissajous() -> Tensors:
    ratios = ", ".join(f"{a}:{b}" for a, b in pictures.RATIOS)
    about = f"Figures of Lissajous on 20 x 20 pixels, ratios {ratios}, any phase, size and place, with noise (seed 303)."
    make, words = (
        partial(networks.LeNet, len(pictures.RATIOS)),
        "LeNet-5 with ReLU, 8 and 16 channels, 96 and 64 units, no normalization",
    )
    parts = in_parts(pictures.lissajous(303, 3072))
    return Tensors("lissajous", about, parts, make, F.cross_entropy, "accuracy", 40, 256, words, "cross entropy")


@cache
def _vowels() -> Tensors:
    about = f"Spectrograms of the vowels {', '.join(pictures.VOWELS)}, 16 bands and 24 frames, of any speaker, with noise (seed 304)."
    make = partial(networks.Mixer, len(pictures.VOWELS), (pictures.BANDS, pictures.FRAMES), 4, 32, 3)
    words = "MLP-Mixer, patches of 4 x 4, width 32, 3 blocks"
    parts = in_parts(pictures.vowels(304, 3072))
    return Tensors("vowels", about, parts, make, F.cross_entropy, "accuracy", 24, 192, words, "cross entropy")


@cache
def _comments() -> Tensors:
    about = (
        "Comments of Python's standard library, 96 characters: windows of those of a module, one module in ten for validation."
    )
    make = partial(networks.ParallelGPT, len(ALPHABET), CONTEXT, 48, 3, 4)
    words = f"GPT-J's parallel branches, LayerNorm, nn.MultiheadAttention, learned positions, width 48, 3 layers, 4 heads, context {CONTEXT}"
    loss = "cross entropy of the next character"
    return Tensors("comments", about, sequences.comments(CONTEXT), make, F.cross_entropy, "accuracy", 8, 48, words, loss)


@cache
def _melodies() -> Tensors:
    signs = sequences.BAR + 1
    about = f"Tunes of the form AABA in any major key, {signs} signs (seed 306): windows of one tune after another."
    make = partial(networks.TuneLlama, signs, BARS, 48, 2, 3)
    words = f"rotary positions, RMSNorm, also of queries and keys, SwiGLU, tied embeddings, width 48, 2 layers, 3 heads, context {BARS}"
    parts = in_parts(sequences.melodies(306, 5000, BARS), (4000, 500, 500))
    return Tensors("melodies", about, parts, make, F.cross_entropy, "accuracy", 10, 48, words, "cross entropy")


@cache
def _genes() -> Tensors:
    about = (
        f"Genes with exons, introns and what lies between, {PLACES} bases (seed 307); of each base which of the three it is in."
    )
    make = partial(networks.Tagger, len(sequences.BASES), len(sequences.REGIONS), 8, 32)
    parts = in_parts(sequences.genes(307, 3072, PLACES))
    words = "GRU of width 32 in both directions, embeddings of 8, a class for each place"
    return Tensors("genes", about, parts, make, F.cross_entropy, "accuracy", 32, 256, words, "cross entropy")


@cache
def _flow() -> Tensors:
    n, g = 3072, torch.Generator().manual_seed(308)
    inside, edge = torch.rand(2, n, 2, generator=g)
    side = torch.randint(4, (n,), generator=g)
    rows = torch.arange(n)
    edge[rows, side % 2] = (side // 2).float()
    inside, edge = (torch.tensor([1.5, 2.0]) * points - 0.5 for points in (inside, edge))
    about = (
        f"Kovasznay's flow, Navier-Stokes at Re = {REYNOLDS:g} for -1/2 < x < 1 and -1/2 < y < 3/2, velocities and pressure at the boundary as "
        "further terms of the loss. Points drawn evenly (seed 308)."
    )
    make, words = partial(networks.Flow, REYNOLDS, (40, 40, 40)), "MLP 2-40-40-40-3, SiLU"
    told = f"mean squared residuals of three equations, and {BOUNDARY:g} times those of the boundary's values"
    parts = in_parts(Part(torch.cat([inside, edge], 1), torch.cat([torch.zeros(n, 3), kovasznay(edge)], 1)))
    return Tensors("flow", about, parts, make, flow_loss, None, 64, 256, words, told)


@cache
def _listens() -> Tensors:
    s = sequences
    about = f"What {s.LISTENERS} listeners heard of {s.SONGS} songs of {s.GENRES} genres, beside songs drawn evenly (seed 309)."
    words = "Bayesian personalized ranking: embeddings of 48 of listeners, songs and genres, and a bias of each song"
    make = partial(networks.PairwiseRanking, s.LISTENERS, s.SONGS, s.GENRES, 48)
    parts = in_parts(s.listens(309, 110_000), (108_000, 1000, 1000))
    return Tensors("listens", about, parts, make, order_loss, None, 512, 512, words, "log loss of the order of two songs")


@cache
def _clocks() -> Tensors:
    make = partial(VisionTransformer, pictures.HOURS, pictures.CLOCK_SIDE, 4, 40, 2, 5)
    before = partial(VisionTransformer, len(SHAPES), pictures.CLOCK_SIDE, 4, 40, 2, 5)
    state = trained(before, shapes(310)["train"], 32, 150, 0.003)

    def tuned() -> nn.Module:
        return tuned_with_lora(make(), state, rank=6, alpha=12)

    about = "Clocks on 16 x 16 pixels with noise (seed 311); the class is the hour."
    words = (
        f"vision transformer, patches of 4 x 4, width 40, 2 layers, 5 heads, trained before on {len(SHAPES)} shapes; LoRA of rank 6 on each "
        "linear layer, and a new last layer"
    )
    parts = in_parts(pictures.clocks(311, 3072))
    return Tensors("clocks", about, parts, tuned, F.cross_entropy, "accuracy", 32, 256, words, "cross entropy")


MEMBERS = (
    Member("house prices, few samples, embeddings", "tabular", 800, _houses),
    Member("conv autoencoder along time, heartbeats", "autoencoders", 400, _heartbeats),
    Member("LeNet, figures of Lissajous", "conv nets", 400, _lissajous),
    Member("MLP-Mixer, vowels", "vision transformers", 300, _vowels),
    Member("GPT with parallel branches, comments", "language models", 300, _comments),
    Member("Llama with normalized queries, melodies", "language models", 400, _melodies),
    Member("GRU in both directions, genes", "recurrent nets", 300, _genes),
    Member("PINN, Navier-Stokes", "PINNs", 400, _flow),
    Member("ranking of pairs, listens", "recommenders", 700, _listens),
    Member("vision transformer with LoRA, to clocks", "fine-tuning", 300, _clocks),
)
