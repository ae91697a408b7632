"""The tasks of the fifth set: models on data, batches and lengths."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond.lab.workloads.pool.finetuning import trained
from precond.lab.workloads.pool.halves import SEALED
from precond.lab.workloads.pool.member import Family, Member, in_parts, scaled
from precond.lab.workloads.pool.sealed import networks, pictures, sequences, texts
from precond.lab.workloads.problem import Tensors
from precond.lab.workloads.text import ALPHABET

CONTEXT = 40


def among_others_loss(scores: Tensor, _: Tensor) -> Tensor:
    """Cross entropy of each customer's own good among all of the batch (van den Oord et al., 2018): scores (N, N)."""
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


@cache
def _claims() -> Tensors:
    numbers = len(sequences.CLAIM_NUMBERS)
    about = (
        f"Claims of insured cars (seed 401): {', '.join(sequences.CLAIM_NUMBERS)}, standardized by the training part, four with heavy "
        "tails; costs with a noise of Student's t of two degrees of freedom."
    )
    parts = scaled(in_parts(sequences.claims(401, 4096), (3072, 512, 512)), numbers)
    make, words = (
        partial(networks.ResidualMLP, numbers, 64, 3),
        "residual MLP of width 64, 3 blocks, LayerNorm, ReLU, dropout of 0.1",
    )
    return Tensors("claims", about, parts, make, F.huber_loss, None, 64, 512, words, "Huber's loss, δ = 1")


@cache
def _cells() -> Tensors:
    about = "Cells on uneven ground, 20 x 20 pixels, blurred and in noise (seed 402); of each pixel whether it is in one."
    make, words = (
        partial(networks.UNet, 8, 16, 32),
        "U-Net of 8, 16 and 32 channels, batch normalization, transposed convolutions",
    )
    parts, loss = in_parts(pictures.cells(402, 3072)), F.binary_cross_entropy_with_logits
    return Tensors("cells", about, parts, make, loss, None, 16, 128, words, "sigmoid cross entropy of a pixel")


@cache
def _galaxies() -> Tensors:
    about = f"Galaxies, 20 x 20 pixels, any place, size and inclination, with noise (seed 403): {', '.join(pictures.GALAXIES)}."
    make = partial(networks.ConvNeXt, len(pictures.GALAXIES), 24)
    words = "ConvNeXt, depthwise 5 x 5, two blocks of 24 channels and two of 48"
    parts = in_parts(pictures.galaxies(403, 3072))
    return Tensors("galaxies", about, parts, make, F.cross_entropy, "accuracy", 24, 256, words, "cross entropy")


@cache
def _displays() -> Tensors:
    about = "Hexadecimal digits on displays of seven segments, 16 x 16 pixels, slanted, unevenly lit, with noise (seed 404)."
    make = partial(networks.StemmedViT, len(pictures.LIT), pictures.DISPLAY_SIDE, 48, 2, 4)
    words = "vision transformer behind two strided convolutions with BN, width 48, 2 layers, 4 heads"
    parts = in_parts(pictures.displays(404, 3072))
    return Tensors("displays", about, parts, make, F.cross_entropy, "accuracy", 32, 256, words, "cross entropy")


@cache
def _dates() -> Tensors:
    about = "Dates of 1900 to 2099 as people write them, in five forms, to those of ISO 8601 (seed 405)."
    make = partial(texts.Translator, len(sequences.WRITTEN), len(sequences.READ), sequences.SOURCE, 10, 48, 2, 4)
    words = "torch.nn.Transformer, two layers on either side, norms behind, width 48, 4 heads, learned positions"
    parts = in_parts(sequences.dates(405, 5120), (4096, 512, 512))
    return Tensors("dates", about, parts, make, F.cross_entropy, "accuracy", 24, 256, words, "cross entropy")


@cache
def _docstrings() -> Tensors:
    about = "Docstrings of every second module of Python's standard library, 96 characters: windows, one module in ten for validation."
    make = partial(texts.RecurrentLM, len(ALPHABET), 48, 2)
    words = (
        f"gated linear recurrences and gated MLPs (Griffin without attention), RMSNorm, width 48, 2 layers, context {CONTEXT}"
    )
    loss = "cross entropy of the next character"
    return Tensors("docstrings", about, sequences.docstrings(CONTEXT), make, F.cross_entropy, "accuracy", 8, 48, words, loss)


@cache
def _demand() -> Tensors:
    about = "Demand of electricity every two hours of three days, with noise (seed 407); the target is the fourth day."
    make, words = (
        partial(networks.Forecaster, 40, sequences.AHEAD),
        "GRU of width 40 that reads, GRU cell that goes on from its own values",
    )
    parts = in_parts(sequences.demand(407, 3072))
    return Tensors("demand", about, parts, make, F.mse_loss, None, 32, 256, words, "mean squared error")


@cache
def _pendulums() -> Tensors:
    about = (
        "Pendulums that are pushed by drawn forces from rest (seed 408); the force at 41 places to the angle at eight times."
    )
    make, words = partial(networks.DeepONet, 41, 64, 40), "DeepONet: branch 41-64-64-40, ReLU; trunk 1-64-64-40, tanh"
    parts = in_parts(sequences.pendulums(408, 4096), (3072, 512, 512))
    return Tensors("pendulums", about, parts, make, F.mse_loss, None, 64, 256, words, "mean squared error")


@cache
def _purchases() -> Tensors:
    s = sequences
    about = (
        f"What {s.CUSTOMERS} customers of {s.COUNTRIES} countries bought of {s.GOODS} goods in {s.CATEGORIES} categories, with two numbers "
        "about each (seed 409)."
    )
    make = partial(networks.FeatureTowers, (s.CUSTOMERS, s.COUNTRIES), (s.GOODS, s.CATEGORIES), 32)
    words = "two towers, embeddings of 32 and 8 beside numbers, MLP 42-64-32, unit length, a learned temperature"
    parts, told = in_parts(s.purchases(409), (16_000, 1000, 1000)), "cross entropy among the goods of a batch"
    return Tensors("purchases", about, parts, make, among_others_loss, None, 128, 512, words, told)


@cache
def _tokens() -> Tensors:
    width, signs, parts = 48, len(ALPHABET), sequences.tokens(CONTEXT)

    def body() -> texts.TextEncoder:
        return texts.TextEncoder(signs + 1, CONTEXT, width, 2, 4)

    before = trained(lambda: texts.Labeler(body(), width, signs), sequences.masked(parts["train"], 410), 16, 150, 0.003)
    state = {name: tensor for name, tensor in before.items() if name.startswith("body.")}

    def tuned() -> nn.Module:
        model = texts.Labeler(body(), width, len(sequences.TOKENS))
        model.load_state_dict(state, strict=False)
        return texts.adapted(model, 12)

    about = (
        f"How every second module of Python's standard library begins, windows of {CONTEXT} characters, one in ten for validation; of each "
        f"character in what it is: {', '.join(sequences.TOKENS)}."
    )
    words = (
        f"transformer that sees both sides, width {width}, 2 layers, 4 heads, trained before on the training windows with characters hidden; "
        "adapters of rank 12 behind attentions and MLPs, norms, and a new last layer are tuned"
    )
    return Tensors("tokens", about, parts, tuned, F.cross_entropy, "accuracy", 16, 128, words, "cross entropy")


# In the order of the half.
_ROWS: tuple[tuple[Family, int, Callable[[], Tensors]], ...] = (
    ("tabular", 500, _claims),
    ("autoencoders", 500, _cells),
    ("conv nets", 300, _galaxies),
    ("vision transformers", 500, _displays),
    ("language models", 500, _dates),
    ("language models", 500, _docstrings),
    ("recurrent nets", 300, _demand),
    ("PINNs", 800, _pendulums),
    ("recommenders", 500, _purchases),
    ("fine-tuning", 400, _tokens),
)
MEMBERS = tuple(Member(name, *row) for name, row in zip(SEALED, _ROWS, strict=True))
