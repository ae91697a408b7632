"""Images that are drawn, not stored: eight shapes at any place, size and angle, in noise."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from precond.lab.workloads.data import Part
from precond.lab.workloads.pool.member import in_parts

SHAPES = ("disk", "ring", "square", "frame", "cross", "triangle", "stripes", "two disks")
SIDE = 16

ABOUT = f"Drawn shapes, {SIDE} x {SIDE} pixels: {', '.join(SHAPES)}; place, size, angle, contrast and noise are drawn with a fixed seed."


@cache
def shapes(seed: int, noise: float = 0.25, sizes: tuple[int, ...] = (2048, 512, 512)) -> dict[str, Part]:
    """Images (N, 1, 16, 16) of about mean 0 and the numbers of their shapes (N,).

    Args:
        seed: of everything that is drawn.
        noise: standard deviation of the pixels' noise; a figure differs from its ground by 0.5 to 1.5.
        sizes: of the parts.
    """
    n, g = sum(sizes), torch.Generator().manual_seed(seed)
    kind = torch.randint(len(SHAPES), (n,), generator=g)
    center = (torch.rand(n, 2, 1, 1, generator=g) - 0.5) * 0.8
    radius = 0.35 + 0.3 * torch.rand(n, 1, 1, generator=g)
    angle = 2 * torch.pi * torch.rand(n, 1, 1, generator=g)
    contrast = (0.5 + torch.rand(n, 1, 1, generator=g)) * torch.where(torch.rand(n, 1, 1, generator=g) < 0.3, -1.0, 1.0)
    line = torch.linspace(-1, 1, SIDE)
    y, x = (axis[None] for axis in torch.meshgrid(line, line, indexing="ij"))
    x, y = x - center[:, 0], y - center[:, 1]
    u, v = (x * angle.cos() + y * angle.sin()) / radius, (y * angle.cos() - x * angle.sin()) / radius
    figure = _inside(u, v)[kind, torch.arange(n)]
    images = contrast * (figure - 0.25) + noise * torch.randn(n, SIDE, SIDE, generator=g)
    return in_parts(Part(images[:, None], kind), sizes)


def _inside(u: Tensor, v: Tensor) -> Tensor:
    """How far each point is within each shape of size 1, from 0 to 1 with soft edges: (shapes, N, side, side)."""
    distance, square = (u.square() + v.square()).sqrt(), torch.maximum(u.abs(), v.abs())
    triangle = torch.maximum(-v - 0.5, torch.maximum(0.866 * u + 0.5 * v, -0.866 * u + 0.5 * v) - 0.5)
    cross = torch.maximum(torch.minimum(u.abs(), v.abs()) - 0.25, square - 1)
    pair = torch.minimum((u - 0.6).square() + v.square(), (u + 0.6).square() + v.square()).sqrt() - 0.45
    stripes = torch.maximum((torch.remainder(2 * u, 1) - 0.5).abs() - 0.25, square - 1)
    signed = (
        distance - 1,
        (distance - 0.8).abs() - 0.2,
        square - 0.85,
        (square - 0.8).abs() - 0.2,
        cross,
        triangle,
        stripes,
        pair,
    )
    return torch.stack([torch.sigmoid(-12 * s) for s in signed])
