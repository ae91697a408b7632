"""Images of the fifth set, drawn with a seed: cells and where they are, galaxies, displays of seven segments."""

from __future__ import annotations

import torch
from torch import Tensor

from precond.lab.workloads.data import Part
from precond.lab.workloads.pool.member import uniform

π = torch.pi
CELL_SIDE, CELLS = 20, 4
GALAXY_SIDE, GALAXIES = 20, ("elliptical", "spiral", "barred", "ring", "edge-on", "pair")
DISPLAY_SIDE = 16
LIT = (
    "abcdef", "bc", "abdeg", "abcdg", "bcfg", "acdfg", "acdefg", "abc", "abcdefg", "abcdfg", "abcefg", "cdefg", "adef", "bcdeg", "adefg", "aefg",
)  # fmt: skip
"""Segments of the hexadecimal digits: a at the top, then clockwise to f, g in the middle."""
ENDS = torch.tensor([
    [-1.0, -1, 1, -1], [1, -1, 1, 0], [1, 0, 1, 1], [-1, 1, 1, 1], [-1, 0, -1, 1], [-1, -1, -1, 0], [-1, 0, 1, 0],
])  # fmt: skip
"""From where to where each segment goes: (x, y, x, y), y downwards."""


def cells(seed: int, n: int) -> Part:
    """Up to four bright ellipses on uneven ground, blurred and in noise: images (N, 1, 20, 20), and 1 inside, 0 outside, of the same shape."""
    g = torch.Generator().manual_seed(seed)
    place = 1.8 * torch.rand(2, n, CELLS, 1, 1, generator=g) - 0.9
    angle = π * torch.rand(n, CELLS, 1, 1, generator=g)
    radius = 0.12 + 0.25 * torch.rand(2, n, CELLS, 1, 1, generator=g)
    there = torch.rand(n, CELLS, 1, 1, generator=g) < 0.6
    bright = 0.6 + 0.9 * torch.rand(n, CELLS, 1, 1, generator=g)
    x, y = grid(CELL_SIDE)
    u, v = turned(x - place[0], y - place[1], angle)
    distance = ((u / radius[0]).square() + (v / radius[1]).square()).sqrt()
    light = (bright * there * torch.sigmoid(5 * (1 - distance))).amax(1)
    slope = 0.4 * torch.randn(3, n, 1, 1, generator=g)
    ground = slope[0] + slope[1] * x + slope[2] * y
    images = ground + light + (0.2 + 0.15 * light) * torch.randn(n, CELL_SIDE, CELL_SIDE, generator=g)
    return Part(images[:, None], ((distance < 1) & there).any(1, keepdim=True).float())


def galaxies(seed: int, n: int) -> Part:
    """Galaxies of any place, size, inclination and brightness, in noise: images (N, 1, 20, 20) and which of six kinds each is (N,)."""
    g = torch.Generator().manual_seed(seed)
    drawn = uniform(g, n, 1, 1)

    kind = torch.randint(len(GALAXIES), (n,), generator=g)
    x, y = grid(GALAXY_SIDE)
    u, v = (axis / drawn(0.45, 0.8) for axis in turned(x - drawn(-0.2, 0.2), y - drawn(-0.2, 0.2), drawn(0, 2 * π)))
    w = v / drawn(0.6, 1)  # in the plane of the disk
    r = (u.square() + w.square() + 1e-3).sqrt()
    turn = 2 * torch.atan2(w, u) - drawn(3, 5) * (r + 0.1).log() * (1 - 2 * (drawn(0, 1) < 0.5).float())
    core, arms = (-(r / 0.15).square()).exp(), 1.3 * (-1.3 * r).exp() * (1 + turn.cos()) / 2
    bar = (-(u / 0.45).square() - (w / 0.12).square()).exp()
    gap = drawn(0.35, 0.6)
    two = torch.stack([(u - s * gap).square() + (v + 0.3 * s * gap).square() for s in (-1, 1)]) + 1e-3
    profiles = torch.stack([
        1.5 * (-2.5 * r.sqrt()).exp(), 0.5 * core + arms, bar + arms * torch.sigmoid(12 * (r - 0.5)),
        core + (-((r - 0.8) / 0.15).square()).exp(), (-u.abs() / 0.5 - v.abs() / 0.1).exp(), 1.5 * (-2.5 * two.sqrt().sqrt()).exp().sum(0),
    ])  # fmt: skip
    images = (
        drawn(1.5, 3) * profiles[kind, torch.arange(n)] - 0.3 + 0.25 * torch.randn(n, GALAXY_SIDE, GALAXY_SIDE, generator=g)
    )
    return Part(images[:, None], kind)


def displays(seed: int, n: int) -> Part:
    """Hexadecimal digits on seven segments, slanted, unevenly lit, in noise: images (N, 1, 16, 16) and digits (N,)."""
    g = torch.Generator().manual_seed(seed)
    drawn = uniform(g, n, 1, 1)

    digit = torch.randint(len(LIT), (n,), generator=g)
    x, y = grid(DISPLAY_SIDE)
    y = (y - drawn(-0.15, 0.15)) / drawn(0.6, 0.75)
    x = (x - drawn(-0.2, 0.2) + drawn(-0.1, 0.2) * y) / drawn(0.35, 0.5)
    x, y, (ax, ay, bx, by) = x[:, None], y[:, None], ENDS.T[:, :, None, None]
    along = ((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax).square() + (by - ay).square())
    along = along.clamp(0.1, 0.9)
    distance = ((x - ax - along * (bx - ax)).square() / 4 + (y - ay - along * (by - ay)).square()).sqrt()
    lit = torch.tensor([[name in segments for name in "abcdefg"] for segments in LIT])[digit].float()
    light = lit * (0.5 + 0.8 * torch.rand(lit.shape, generator=g)) + 0.15 * (1 - lit)
    images = (light[..., None, None] * torch.sigmoid(14 * (0.16 - distance))).amax(1)
    return Part((2 * images - 0.4 + 0.15 * torch.randn(images.shape, generator=g))[:, None], digit)


def grid(side: int) -> tuple[Tensor, Tensor]:
    """x and y of the pixels from -1 to 1, each (side, side); y points downwards."""
    y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, side)], indexing="ij")
    return x, y


def turned(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates along and across a direction."""
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
