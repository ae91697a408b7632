"""Images of the third set, drawn with a seed: textures in color, dots to be counted, curves."""

from __future__ import annotations

import torch
from torch import Tensor

from precond.lab.workloads.data import Part

SIDE = 16
TEXTURES = ("clouds", "fog", "spots", "grains", "level streaks", "upright streaks", "labyrinth", "ridges")
DOTS = 8


def textures(seed: int, n: int) -> Part:
    """Noise with the spectrum of one of eight textures, in two colors of its own: images (N, 3, 16, 16) and their textures (N,)."""
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(len(TEXTURES), (n,), generator=g)
    fy, fx = torch.meshgrid(torch.fft.fftfreq(SIDE), torch.fft.rfftfreq(SIDE), indexing="ij")
    f = (fx.square() + fy.square()).sqrt()
    power, band = f.clamp_min(1 / SIDE), lambda middle: (-((f - middle) / 0.05).square()).exp()
    level, upright = ((-(slow / 0.06).square() - (fast / 0.25).square()).exp() for slow, fast in ((fx, fy), (fy, fx)))
    filters = torch.stack([power**-2, power**-1, band(0.2), band(0.35), level, upright, band(0.2), power**-2])
    waves = torch.fft.irfft2(torch.fft.rfft2(torch.randn(n, SIDE, SIDE, generator=g)) * filters[kind], s=(SIDE, SIDE))
    waves = waves / waves.std((1, 2), keepdim=True)
    which = kind[:, None, None]
    waves = torch.where(which == TEXTURES.index("labyrinth"), (4 * waves).tanh(), waves)
    waves = torch.where(which == TEXTURES.index("ridges"), 1 - 2 * waves.abs(), waves)
    ground, color = torch.randn(2, n, 3, 1, 1, generator=g)
    color = color + color.sign() / 2
    noise = 0.3 * torch.randn(n, 3, SIDE, SIDE, generator=g)
    return Part(0.5 * ground + color * waves[:, None] + noise, kind)


def dots(seed: int, n: int) -> Part:
    """One to eight dots of unequal sizes, places and brightness, in noise: images (N, 1, 16, 16), and one less than their number (N,)."""
    g = torch.Generator().manual_seed(seed)
    number = torch.randint(DOTS, (n,), generator=g)
    cells = torch.rand(n, 16, generator=g).argsort(1)[:, :DOTS]
    centers = torch.stack([cells // 4, cells % 4], -1) * 4 + 1.5 + 1.6 * torch.rand(n, DOTS, 2, generator=g) - 0.8
    size, bright = 0.7 + 0.5 * torch.rand(n, DOTS, generator=g), 0.7 + 0.6 * torch.rand(n, DOTS, generator=g)
    bright = bright * (torch.arange(DOTS) <= number[:, None])
    # A bump of two variables is the product of two of one.
    y, x = (_bumps(centers[..., i], size) for i in (0, 1))
    images = torch.einsum("nk,nki,nkj->nij", bright, y, x) + 0.15 * torch.randn(n, SIDE, SIDE, generator=g)
    return Part(images[:, None], number)


def _bumps(center: Tensor, size: Tensor) -> Tensor:
    return (-((torch.arange(SIDE) - center[..., None]) / size[..., None]).square() / 2).exp()


def curves(seed: int, n: int) -> Part:
    """Curves of second degree through three random points, as flat images (N, 256) with values from 0 to 1, and the same as targets.

    After the set of curves on which Hinton & Salakhutdinov (2006) trained their deep autoencoders.
    """
    points = (SIDE - 1) * torch.rand(3, n, 2, 1, 1, generator=torch.Generator().manual_seed(seed))
    line = torch.arange(SIDE)
    images = torch.zeros(n, SIDE, SIDE)
    for t in torch.linspace(0, 1, 24).tolist():
        # Lagrange's polynomials through t = 0, 1/2 and 1.
        weights = ((2 * t - 1) * (t - 1), 4 * t * (1 - t), t * (2 * t - 1))
        y, x = sum(w * p for w, p in zip(weights, points, strict=True)).unbind(1)
        images = torch.maximum(images, (-((line[:, None] - y).square() + (line - x).square()) / 2).exp())
    flat = images.flatten(1)
    return Part(flat, flat)
