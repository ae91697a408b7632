"""Autoencoders: deep and dense, variational, and convolutional that denoise."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond.lab.workloads.catalog import load_data
from precond.lab.workloads.data import Part
from precond.lab.workloads.networks import autoencoder
from precond.lab.workloads.pool.drawings import ABOUT, shapes
from precond.lab.workloads.pool.member import Member
from precond.lab.workloads.problem import Tensors


class Variational(nn.Module):
    """Kingma & Welling's (2014) autoencoder: (N, pixels) ↦ (N, pixels + 2·code), logits beside means and log variances of the code."""

    def __init__(self, pixels: int, width: int, code: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.posterior = nn.Linear(width, 2 * code)
        self.decoder = nn.Sequential(nn.Linear(code, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.head = nn.Linear(width, pixels)

    def forward(self, x: Tensor) -> Tensor:
        mean, log_variance = self.posterior(self.encoder(x)).chunk(2, 1)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        return torch.cat([self.head(self.decoder(mean + (log_variance / 2).exp() * noise)), mean, log_variance], 1)


def negative_bound(outputs: Tensor, pixels: Tensor) -> Tensor:
    """Cross entropy of the pixels and the divergence of the code from a standard normal one, both in units of a pixel."""
    n = pixels.shape[1]
    mean, log_variance = outputs[:, n:].chunk(2, 1)
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / (2 * pixels.numel())
    return F.binary_cross_entropy_with_logits(outputs[:, :n], pixels) + divergence


class Denoiser(nn.Module):
    """Convolutions that halve a 16 x 16 image twice, and transposed ones back."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(1, channels, 3, 2, 1), nn.ReLU(), nn.Conv2d(channels, 2 * channels, 3, 2, 1), nn.ReLU()
        )
        self.code = nn.Sequential(
            nn.Flatten(), nn.Linear(32 * channels, 48), nn.ReLU(), nn.Linear(48, 32 * channels), nn.ReLU()
        )
        self.up = nn.Sequential(
            nn.ConvTranspose2d(2 * channels, channels, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(channels, 1, 4, 2, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.down(images)
        return self.up(self.code(x).view_as(x))


def _pixels() -> tuple[str, dict[str, Part]]:
    digits = load_data("digits")
    parts = {name: part.inputs.flatten(1) / 16 for name, part in digits.parts.items()}
    return digits.about, {name: Part(x, x) for name, x in parts.items()}


@cache
def _deep() -> Tensors:
    about, parts = _pixels()
    return Tensors(
        "digits",
        f"{about} Divided by 16; the targets are the pixels.",
        parts,
        lambda: autoencoder((64, 128, 64, 8, 64, 128, 64)),
        F.binary_cross_entropy_with_logits,
        None,
        128,
        300,
        "64-128-64-8-64-128-64, tanh, linear code",
        "sigmoid cross entropy of a pixel",
    )


@cache
def _variational() -> Tensors:
    about, parts = _pixels()
    return Tensors(
        "digits",
        f"{about} Divided by 16; the targets are the pixels.",
        parts,
        lambda: Variational(64, 128, 8),
        negative_bound,
        None,
        64,
        300,
        "variational autoencoder, two hidden layers of 128 on each side, code of 8, GELU",
        "negative evidence bound, mean over pixels",
    )


@cache
def _denoising() -> Tensors:
    noisy, clean = shapes(74, noise=0.5), shapes(74, noise=0.0)
    parts = {name: Part(noisy[name].inputs, clean[name].inputs) for name in noisy}
    return Tensors(
        "shapes",
        f"{ABOUT} Noise 0.5 (seed 74); the targets are the same images without noise.",
        parts,
        Denoiser,
        F.mse_loss,
        None,
        32,
        128,
        "convolutional autoencoder, 8 and 16 channels, code of 48, ReLU",
        "mean squared error of a pixel",
    )


MEMBERS = (
    Member("deep autoencoder, digits", "autoencoders", 600, _deep),
    Member("variational autoencoder, digits", "autoencoders", 600, _variational),
    Member("denoising conv autoencoder, shapes", "autoencoders", 300, _denoising),
)
