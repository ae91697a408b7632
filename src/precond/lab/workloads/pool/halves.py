"""Which tasks of the pool are for development, which are locked, and which confirm.

On the development half anything may be tried. The locked half is run for a final table alone: nothing in the library is chosen, tuned or
changed by what it shows. A task never moves from the locked half to the other; what was looked at for any other reason is replaced. The
tasks that were locked once, whose table an earlier ``auto`` was changed after, are opened: for looking, no more for a verdict. A third
set, for confirmation, a fourth, held out, and a fifth, sealed, were each written by someone who did not know how ``auto`` does on it,
tried with torch's AdamW alone, and are each run once. A sixth, final, was written as the fifth, and run in
part before two faults of ``auto`` that it showed were mended. A seventh, blind, was written as these were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Half = Literal["development", "locked", "opened", "confirmation", "held-out", "sealed", "final", "blind"]

DEVELOPMENT = (
    "diabetes, raw",
    "mixed table, embeddings, regression",
    "deep autoencoder, digits",
    "variational autoencoder, digits",
    "conv net, digits",
    "ResNet with BN, shapes",
    "vision transformer, digits",
    "GPT, code",
    "Llama, English",
    "LSTM, code",
    "PINN, Poisson",
    "PINN, Burgers",
    "collaborative filtering, ratings",
    "conv net tuned to new digits",
)

OPENED = (
    "Friedman, raw scales",
    "mixed table, embeddings, classes",
    "denoising conv autoencoder, shapes",
    "conv net, shapes",
    "separable conv net with BN, digits",
    "vision transformer, shapes",
    "GPT, English",
    "Llama, code",
    "GRU, Lorenz series",
    "PINN, Helmholtz",
    "PINN, Allen-Cahn",
    "two towers, implicit feedback",
    "click prediction, products of fields",
    "GPT with LoRA, from code to English",
)

LOCKED = (
    "breast cancer, raw",
    "arm of four joints, raw",
    "conv autoencoder with BN, gratings",
    "conv net with group normalization, gratings",
    "vision transformer, gratings",
    "GPT, sums",
    "LSTM, pendulums",
    "PINN, wave",
    "factorization machine, baskets",
    "MLP with LoRA, to new digits",
)

CONFIRMATION = (
    "used cars, raw, embeddings",
    "four classes of clusters, few samples",
    "deep autoencoder, curves",
    "ResNet with BN, textures",
    "vision transformer with class token, dots",
    "GPT, grammar",
    "Llama with grouped queries, names",
    "GRU of two layers, activities",
    "PINN, convection",
    "next item, sessions",
)

HELD_OUT = (
    "house prices, few samples, embeddings",
    "conv autoencoder along time, heartbeats",
    "LeNet, figures of Lissajous",
    "MLP-Mixer, vowels",
    "GPT with parallel branches, comments",
    "Llama with normalized queries, melodies",
    "GRU in both directions, genes",
    "PINN, Navier-Stokes",
    "ranking of pairs, listens",
    "vision transformer with LoRA, to clocks",
)

SEALED = (
    "residual MLP with LayerNorm, claims",
    "U-Net, cells",
    "ConvNeXt, galaxies",
    "vision transformer behind convolutions, displays",
    "encoder and decoder, dates",
    "gated linear recurrences, docstrings",
    "GRU to GRU, demand",
    "DeepONet, pushed pendulums",
    "two towers with features, purchases",
    "text encoder tuned with adapters, to kinds of tokens",
)

FINAL = (
    "mixture of experts, deliveries",
    "flow of couplings, orbits",
    "gated graph net, molecules",
    "set transformer, solids",
    "transformer with norms behind, bytecode",
    "dilated convolutions, names of characters",
    "LSTM with attention, formulas",
    "PINN with Fourier features, soliton",
    "wide autoencoder of lists, playlists",
    "ResNet of 12 blocks tuned above its first stage, to other automata",
)

BLIND = (
    "FT-Transformer, bike rentals",
    "convolutional variational autoencoder, faces",
    "U-Net of diffusion, noised digits",
    "inverted residuals with squeeze and excitation, flowers",
    "Swin, road signs",
    "GPT with rotary positions and one key, packages",
    "Mamba, weather",
    "inverse PINN, invasion",
    "DLRM with bags, films",
    "encoder with relative positions tuned with DoRA, to other logs",
)

HALVES: Mapping[Half, tuple[str, ...]] = {
    "development": DEVELOPMENT,
    "locked": LOCKED,
    "opened": OPENED,
    "confirmation": CONFIRMATION,
    "held-out": HELD_OUT,
    "sealed": SEALED,
    "final": FINAL,
    "blind": BLIND,
}
