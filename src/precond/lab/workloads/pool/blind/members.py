"""The tasks of the seventh set: models on data, batches and lengths."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch.nn.functional as F
from torch import Tensor, nn

from precond.lab.workloads.data import Part, standardized
from precond.lab.workloads.pool.blind import networks, pictures, readers, tables, texts, vision
from precond.lab.workloads.pool.finetuning import trained
from precond.lab.workloads.pool.halves import BLIND
from precond.lab.workloads.pool.member import Family, Member, in_parts, scaled
from precond.lab.workloads.problem import Tensors

CONTEXT = 40
PIXELS, DEVIATION = pictures.FACE_SIDE**2, 0.1
"""Of a face, and how far a pixel is from its mean for the bound of the autoencoder."""


def bound_loss(outputs: Tensor, images: Tensor) -> Tensor:
    """What surprises in pixels of deviation 0.1, and the divergence of the code from a standard normal one, both for each pixel."""
    pixels, code = outputs[:, :PIXELS], outputs[:, PIXELS:]
    mean, log_variance = code.chunk(2, 1)
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2
    return F.mse_loss(pixels, images.flatten(1)) / (2 * DEVIATION**2) + divergence / images.numel()


@cache
def _rentals() -> Tensors:
    numbers, codes = len(tables.RENTAL_NUMBERS), (tables.SKIES, tables.WEEKDAYS, tables.STATIONS)
    about = (
        f"Bicycles rented in an hour at a station (seed 601): {', '.join(tables.RENTAL_NUMBERS)}, standardized by the training part, sky, "
        "weekday and station; the target is the logarithm of their number, standardized."
    )
    parts = scaled(standardized(in_parts(tables.rentals(601, 7168), (6144, 512, 512))), numbers)
    make = partial(networks.FTTransformer, numbers, codes, 32, 2, 4)
    words = "FT-Transformer, seven tokens and one to be read, width 32, 2 layers, 4 heads, dropout 0.1"
    return Tensors("rentals", about, parts, make, F.mse_loss, "R²", 64, 512, words, "mean squared error")


@cache
def _faces() -> Tensors:
    images = pictures.faces(602, 4096)
    about = "Drawn faces, 16 x 16 (seed 602), that turn, look, smile and speak."
    words = "variational autoencoder, two strided convolutions of 16 channels with BN, code of 8, transposed ones back"
    parts = in_parts(Part(images, images), (3072, 512, 512))
    loss = "squared error of pixels over 2 · 0.1², and divergence of the code, for each pixel"
    return Tensors("faces", about, parts, partial(vision.ConvVAE, 16, 8), bound_loss, None, 64, 256, words, loss)


@cache
def _diffusion() -> Tensors:
    about = "scikit-learn's digits, 8 x 8, eight times each with noise of any strength (seed 603), which is to be told."
    words = "U-Net of 16 and 32 channels, group normalization, SiLU, the time added within blocks"
    parts = pictures.diffused(603, 8)
    return Tensors(
        "noised digits", about, parts, partial(vision.NoiseUNet, 16, 32), F.mse_loss, None, 64, 512, words, "mean squared error"
    )


@cache
def _flowers() -> Tensors:
    about = f"Drawn flowers, 20 x 20, each kind in its colors, with noise (seed 604): {', '.join(map(str, pictures.PETALS))} petals."
    make = partial(vision.MobileNet, len(pictures.PETALS))
    words = "four inverted residuals of 12 to 32 channels with BN, squeeze and excitation, Hardswish"
    parts = in_parts(pictures.flowers(604, 4096), (3072, 512, 512))
    return Tensors("flowers", about, parts, make, F.cross_entropy, "accuracy", 32, 256, words, "cross entropy")


@cache
def _signs() -> Tensors:
    about = (
        f"Drawn road signs, 16 x 16 in colors, with noise (seed 605): {', '.join(pictures.OUTLINES)}, each with "
        f"{', '.join(pictures.SYMBOLS)}."
    )
    make = partial(vision.Swin, len(pictures.OUTLINES) * len(pictures.SYMBOLS), 24, 2)
    words = "Swin, patches of 2 x 2, windows of 4 x 4, two blocks of width 24 and two of width 48, relative position biases"
    parts = in_parts(pictures.signs(605, 4096), (3072, 512, 512))
    return Tensors("road signs", about, parts, make, F.cross_entropy, "accuracy", 24, 192, words, "cross entropy")


@cache
def _packages() -> Tensors:
    about = f"Tokens of eleven packages of Python's library, the {texts.KINDS} most frequent and all others: windows of their modules."
    make = partial(readers.MultiQueryGPT, texts.KINDS + 1, CONTEXT, 48, 3, 4)
    words = f"causal transformer, rotary positions, 4 queries to one key, LayerNorm, width 48, 3 layers, context {CONTEXT}"
    loss = "cross entropy of the next token"
    return Tensors("packages", about, texts.packages(CONTEXT), make, F.cross_entropy, "accuracy", 16, 64, words, loss)


@cache
def _weather() -> Tensors:
    about = "Weather of 24 hours (seed 607): temperature, pressure, humidity, wind, the hour; by how much it gets warmer in three hours."
    make = partial(networks.Mamba, 6, 24, 2)
    words = "Mamba, two selective recurrences of width 48 with 4 states behind RMS norms, width 24"
    parts = in_parts(tables.weather(607, 4096), (3072, 512, 512))
    return Tensors("weather", about, parts, make, F.mse_loss, "R²", 32, 192, words, "mean squared error")


@cache
def _invasion() -> Tensors:
    about = (
        "u_t = D u_xx + r u(1 - u) for -4 < x < 8 and 0 < t < 2, D and r unknown, the density u measured with noise at points drawn evenly "
        "(seed 608)."
    )
    make = partial(networks.Invasion, tables.LOW, tables.HIGH, 96, 96, 96, 96)
    words = "MLP 2-96-96-96-96-1, tanh, Xavier's initialization, and logarithms of D and r"
    parts = in_parts(tables.invasion(608, 4096), (3072, 512, 512))
    loss = "mean of the squared residual and the squared error of u"
    return Tensors("invasion", about, parts, make, F.mse_loss, None, 256, 512, words, loss)


@cache
def _films() -> Tensors:
    about = (
        f"Which of {tables.FILMS} films are watched when they are shown (seed 609): age and hours a week, film, genre, device, weekday, and "
        f"{tables.WATCHED} films watched before."
    )
    make = partial(networks.DLRM, 2, (tables.FILMS, tables.GENRES, tables.DEVICES, tables.WEEKDAYS), 32, 256)
    words = "DLRM: numbers 2-256-32, tables of width 32, a bag averaged, products of two, 256-256-2, ReLU"
    parts = in_parts(tables.films(609, 83968), (81920, 1024, 1024))
    return Tensors("films", about, parts, make, F.cross_entropy, "accuracy", 512, 1024, words, "cross entropy")


@cache
def _logs() -> Tensors:
    def make() -> readers.T5Encoder:
        return readers.T5Encoder(len(texts.SIGNS), len(texts.NEW), 48, 2, 4)

    before = trained(make, texts.logs(610, 4096, texts.KNOWN), 32, 200, 0.003)
    state = {name: tensor for name, tensor in before.items() if not name.startswith("head.")}

    def tuned() -> nn.Module:
        model = make()
        model.load_state_dict(state, strict=False)
        return readers.with_dora(model, rank=4, alpha=8)

    about = f"Lines of logs, signs of which are lost (seed 611), and which service wrote them: {', '.join(texts.NEW)}."
    words = (
        f"encoder with biases of relative positions, width 48, 2 layers, trained before on {', '.join(texts.KNOWN)}; DoRA of rank 4 on "
        "queries, values and the MLPs, and a new last layer, are tuned"
    )
    parts = in_parts(texts.logs(611, 4096, texts.NEW), (3072, 512, 512))
    return Tensors("logs", about, parts, tuned, F.cross_entropy, "accuracy", 32, 256, words, "cross entropy")


# In the order of the half.
_ROWS: tuple[tuple[Family, int, Callable[[], Tensors]], ...] = (
    ("tabular", 600, _rentals),
    ("autoencoders", 500, _faces),
    ("autoencoders", 500, _diffusion),
    ("conv nets", 500, _flowers),
    ("vision transformers", 500, _signs),
    ("language models", 500, _packages),
    ("recurrent nets", 500, _weather),
    ("PINNs", 800, _invasion),
    ("recommenders", 800, _films),
    ("fine-tuning", 500, _logs),
)
MEMBERS = tuple(Member(name, *row) for name, row in zip(BLIND, _ROWS, strict=True))
