"""The tasks of the sixth set: models on data, batches and lengths."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond.lab.workloads.data import Part, standardized
from precond.lab.workloads.pool.final import networks, pictures, readers, tables, texts
from precond.lab.workloads.pool.finetuning import trained
from precond.lab.workloads.pool.halves import FINAL
from precond.lab.workloads.pool.member import Family, Member, in_parts, scaled, standard
from precond.lab.workloads.problem import Tensors

CONTEXT = 40
KNOWN, NEW = (30, 54, 90, 110, 126, 150), (22, 45, 73, 105, 146, 182)
"""Rules on which a net is trained before, and those that it is tuned to."""


def surprise(log_density: Tensor, _: Tensor) -> Tensor:
    """-log p, the mean."""
    return -log_density.mean()


def listed_loss(scores: Tensor, found: Tensor) -> Tensor:
    """-log softmax of the songs that are to be found, the mean over them and over lists."""
    return -(found * scores.log_softmax(1)).sum(1).div(found.sum(1)).mean()


@cache
def _deliveries() -> Tensors:
    about = (
        f"Tours of deliveries (seed 501): {', '.join(tables.DELIVERY_NUMBERS)}, standardized by the training part; the target is the "
        "logarithm of their minutes, standardized, by one of three rules, and which is not told."
    )
    numbers = len(tables.DELIVERY_NUMBERS)
    parts = scaled(standardized(in_parts(tables.deliveries(501, 5120), (4096, 512, 512))), numbers)
    make = partial(networks.MixtureNet, numbers, 40, 64, 6)
    words = "mixture of experts: two layers of six, two of which are taken, width 40, LayerNorm"
    return Tensors("deliveries", about, parts, make, F.mse_loss, "R²", 64, 512, words, "mean squared error")


@cache
def _orbits() -> Tensors:
    about = "Places and velocities of bodies on ellipses in two belts about one mass (seed 502), standardized."
    found = standard(tables.orbits(502, 9216)).float()
    parts = in_parts(Part(found, torch.zeros(len(found), 1)), (8192, 512, 512))
    words = "normalizing flow of eight affine couplings, MLP 2-64-64-4, ReLU, that begin as exchanges"
    return Tensors("orbits", about, parts, partial(networks.Flow, 2, 64, 8), surprise, None, 128, 512, words, "-log p")


@cache
def _molecules() -> Tensors:
    about = (
        "Molecules of 6 to 10 atoms of carbon, nitrogen and oxygen, trees with up to two rings (seed 503): Hückel's energy of each atom and "
        "his gap, standardized."
    )
    parts = in_parts(tables.molecules(503, 4096), (3072, 512, 512))
    make, words = partial(networks.GatedGraph, 3, 48, 4, 2), "gated graph net, one message and GRU cell of width 48 four times"
    return Tensors("molecules", about, parts, make, F.mse_loss, "R²", 32, 512, words, "mean squared error")


@cache
def _solids() -> Tensors:
    kinds = ", ".join(pictures.SOLIDS)
    about = f"{pictures.POINTS} points on solids, upright, turned about the vertical, with noise (seed 504): {kinds}."
    make = partial(networks.SetTransformer, 3, len(pictures.SOLIDS), 40, 4, 8)
    words = "set transformer of width 40, 4 heads, two layers with 8 inducing points, pooled by attention"
    parts = in_parts(pictures.solids(504, 3072))
    return Tensors("solids", about, parts, make, F.cross_entropy, "accuracy", 32, 256, words, "cross entropy")


@cache
def _bytecode() -> Tensors:
    about = (
        f"Instructions of every third module at the top of Python's library, the {texts.KINDS} most frequent kinds and all others: windows, "
        "one module in ten for validation."
    )
    make = partial(readers.PostNormGPT, texts.KINDS + 1, CONTEXT, 48, 3, 4)
    words = f"causal transformer, norms behind, width 48, 3 layers, 4 heads, context {CONTEXT}, the head's weight is the embedding's"
    loss = "cross entropy of the next instruction"
    return Tensors("bytecode", about, texts.bytecode(CONTEXT), make, F.cross_entropy, "accuracy", 16, 64, words, loss)


@cache
def _character_names() -> Tensors:
    about = "Names of Unicode's first 12,288 characters in any order (seed 506), 39 signs: windows, one in ten for validation."
    make, words = (
        partial(readers.DilatedLM, len(texts.SIGNS), 48, 4),
        "TCN: four blocks of two causal convolutions, weight norm, 48 channels",
    )
    parts, loss = texts.character_names(CONTEXT, 506), "cross entropy of the next character"
    return Tensors("character names", about, parts, make, F.cross_entropy, "accuracy", 16, 64, words, loss)


@cache
def _formulas() -> Tensors:
    about = "Formulas of three to five letters with four operations and brackets, to the order of a stack (seed 507)."
    make = partial(readers.AttentiveLSTM, len(texts.INFIX), len(texts.POSTFIX), texts.SOURCE, 32, 64)
    words = "LSTM in both directions to LSTM of width 64, multiplicative attention between them"
    parts = in_parts(texts.formulas(507, 5120), (4096, 512, 512))
    return Tensors("formulas", about, parts, make, F.cross_entropy, "accuracy", 32, 256, words, "cross entropy")


@cache
def _soliton() -> Tensors:
    points = torch.rand(3072, 2, generator=torch.Generator().manual_seed(508)) * torch.tensor([10.0, 2.0]) - torch.tensor(
        [4.0, 0.0]
    )
    about = (
        "i h_t + h_xx/2 + |h|² h = 0 for -4 < x < 6 and 0 < t < 2, h that of a soliton at t = 0 and at both ends. Points drawn evenly "
        "(seed 508)."
    )
    make, words = partial(networks.Schroedinger, 32, 64, 64, 64), "MLP 64-64-64-64-2, tanh, of random Fourier features"
    parts = in_parts(Part(points, torch.zeros(len(points), 2)))
    return Tensors("soliton", about, parts, make, F.mse_loss, None, 128, 256, words, "mean squared residual")


@cache
def _playlists() -> Tensors:
    about = f"Which 16 of {tables.SONGS} songs are in a list with 16 others, by genres, a mood and popularity (seed 509)."
    words = "autoencoder of lists, 800-400-800, tanh, dropout of 0.3 on songs"
    parts = in_parts(tables.playlists(509, 9216), (8192, 512, 512))
    make, loss = partial(networks.ListAutoencoder, tables.SONGS, 400), "cross entropy of the songs to be found"
    return Tensors("playlists", about, parts, make, listed_loss, None, 64, 512, words, loss)


@cache
def _automata() -> Tensors:
    def make() -> networks.DeepResNet:
        return networks.DeepResNet(len(NEW), 8)

    before = trained(make, pictures.automata(510, 4096, KNOWN), 32, 200, 0.005)
    state = {name: tensor for name, tensor in before.items() if not name.startswith("head.")}

    def tuned() -> nn.Module:
        model = make()
        model.load_state_dict(state, strict=False)
        return networks.frozen_below(model)

    about = f"Histories of cellular automata, 16 x 16 cells, some of them wrong (seed 511); which of the rules {', '.join(map(str, NEW))}."
    words = (
        f"pre-activation ResNet of 12 blocks, 8 and 16 channels, trained before on the rules {', '.join(map(str, KNOWN))}; its second "
        "stage, all batch normalizations and a new last layer are tuned"
    )
    parts = in_parts(pictures.automata(511, 3072, NEW))
    return Tensors("automata", about, parts, tuned, F.cross_entropy, "accuracy", 32, 256, words, "cross entropy")


# In the order of the half.
_ROWS: tuple[tuple[Family, int, Callable[[], Tensors]], ...] = (
    ("tabular", 1600, _deliveries),
    ("autoencoders", 1500, _orbits),
    ("conv nets", 1000, _molecules),
    ("vision transformers", 600, _solids),
    ("language models", 600, _bytecode),
    ("language models", 900, _character_names),
    ("recurrent nets", 900, _formulas),
    ("PINNs", 1000, _soliton),
    ("recommenders", 1600, _playlists),
    ("fine-tuning", 600, _automata),
)
MEMBERS = tuple(Member(name, *row) for name, row in zip(FINAL, _ROWS, strict=True))
