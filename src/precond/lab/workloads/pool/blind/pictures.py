"""Faces, flowers, road signs and noised digits of the seventh set."""

from __future__ import annotations

import torch
from torch import Tensor

from precond.lab.workloads.catalog import load_data
from precond.lab.workloads.data import Part
from precond.lab.workloads.pool.member import uniform

π = torch.pi
FACE_SIDE, FLOWER_SIDE, SIGN_SIDE = 16, 20, 16
PETALS = (3, 4, 5, 6, 8)
OUTLINES, SYMBOLS = ("disk", "triangle", "diamond"), ("bar", "stroke", "cross")


def grid(side: int) -> tuple[Tensor, Tensor]:
    """x to the right and y downwards, of the middles of pixels, in (-1, 1): (side, side) each."""
    places = (2 * torch.arange(side) + 1.0) / side - 1
    y, x = torch.meshgrid(places, places, indexing="ij")
    return x, y


def soft(inside: Tensor, side: int) -> Tensor:
    """From 0 to 1 over about a pixel, of distances inwards in units of half a picture."""
    return (inside * 2 * side).sigmoid()


def faces(seed: int, n: int) -> Tensor:
    """Faces that turn, look, smile and speak, (N, 1, 16, 16) in [0, 1]."""
    g = torch.Generator().manual_seed(seed)
    drawn = uniform(g, n, 1, 1)
    x, y = grid(FACE_SIDE)
    x, y = x - drawn(-0.12, 0.12), y - drawn(-0.12, 0.12)
    back, skin, hair, dark = drawn(0, 0.3), drawn(0.6, 1), drawn(0, 0.5), drawn(0, 0.3)
    wide, high, line, turn = drawn(0.55, 0.8), drawn(0.75, 0.95), drawn(-0.6, -0.3), drawn(-0.2, 0.2)
    head = soft(0.5 * (1 - ((x / wide).square() + (y / high).square()).sqrt()), FACE_SIDE)
    image = back + head * (skin - back)
    image = image + head * soft(line - y, FACE_SIDE) * (hair - image)
    apart, eyes, size = drawn(0.24, 0.34), drawn(-0.22, -0.05), drawn(0.09, 0.15)
    for side in (-1, 1):
        away = ((x - turn - side * apart).square() + (y - eyes).square()).sqrt()
        image = image + soft(size - away, FACE_SIDE) * (dark - image)
    smile, mouth, broad, open_ = drawn(-0.8, 0.8), drawn(0.35, 0.5), drawn(0.2, 0.38), drawn(0.05, 0.14)
    level = mouth - smile * ((x - turn).square() - broad.square() / 2)
    lips = soft(torch.minimum(open_ - (y - level).abs(), broad - (x - turn).abs()), FACE_SIDE)
    return (image + lips * (dark - image)).clamp(0, 1)[:, None]


def flowers(seed: int, n: int, noise: float = 0.15) -> Part:
    """Flowers of three to six petals or eight, each kind in its colors, with noise, of deviation about 1: (N, 3, 20, 20), which it is (N,)."""
    g = torch.Generator().manual_seed(seed)
    drawn = uniform(g, n, 1, 1)
    kind = torch.randint(len(PETALS), (n,), generator=g)
    petals = torch.tensor(PETALS)[kind][:, None, None]
    x, y = grid(FLOWER_SIDE)
    x, y = x - drawn(-0.15, 0.15), y - drawn(-0.15, 0.15)
    radius, angle = (x.square() + y.square()).sqrt(), torch.atan2(y, x)
    edge = drawn(0.6, 0.75) * (1 + drawn(0.3, 0.45) * (petals * (angle - drawn(-π, π))).cos())
    flower, heart = soft(edge - radius, FLOWER_SIDE)[:, None], soft(drawn(0.12, 0.25) - radius, FLOWER_SIDE)[:, None]
    meadow, petal, yellow = torch.rand(3, n, 3, 1, 1, generator=g).unbind()
    petal = 0.6 * petal + 0.4 * torch.rand(len(PETALS), 3, 1, 1, generator=g)[kind]
    meadow, petal = 0.5 * meadow * torch.tensor([0.5, 1.0, 0.5]).view(3, 1, 1), 0.4 + 0.6 * petal
    image = meadow + flower * (petal - meadow)
    image = image + heart * (yellow - image)
    return Part((image - 0.35 + noise * torch.randn(image.shape, generator=g)) / 0.35, kind)


def signs(seed: int, n: int, noise: float = 0.12) -> Part:
    """Road signs: a disk, a triangle or a diamond with a bar, a stroke or a cross on it, in any colors, tilted, with noise, of about unit
    deviation: (N, 3, 16, 16), and which of nine each is (N,)."""
    g = torch.Generator().manual_seed(seed)
    drawn = uniform(g, n, 1, 1)
    kind = torch.randint(len(OUTLINES) * len(SYMBOLS), (n,), generator=g)
    x, y = grid(SIGN_SIDE)
    x, y = x - drawn(-0.15, 0.15), y - drawn(-0.15, 0.15)
    tilt, size = drawn(-0.25, 0.25), drawn(0.75, 0.95)
    x, y = (x * tilt.cos() + y * tilt.sin()) / size, (y * tilt.cos() - x * tilt.sin()) / size
    outlines, symbols = sign_shapes(x, y)
    these = torch.arange(n)
    sign, symbol = (soft(shape, SIGN_SIDE)[:, None] for shape in (outlines[kind // 3, these], symbols[kind % 3, these]))
    back, plate, paint = torch.rand(3, n, 3, 1, 1, generator=g).unbind()
    # The plate is lighter than what is behind it and than its symbol.
    image = 0.4 * back + sign * (0.6 + 0.4 * plate - 0.4 * back)
    image = image + symbol * sign * (0.3 * paint - image)
    return Part((image - 0.5 + noise * torch.randn(image.shape, generator=g)) / 0.4, kind)


def sign_shapes(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """How far inside each outline and each symbol points are, > 0 inside: (3, …) and (3, …)."""
    disk = 1 - (x.square() + y.square()).sqrt()
    triangle = torch.minimum(0.8 - y, 0.5 * (1.1 + y) - 0.8 * x.abs())
    diamond = 0.7 * (1.1 - x.abs() - y.abs())
    bar, stroke = (torch.minimum(0.2 - a.abs(), 0.55 - b.abs()) for a, b in ((y, x), (x, y)))
    u, v = (x + y) / 2**0.5, (x - y) / 2**0.5
    cross = torch.maximum(*(torch.minimum(0.16 - a.abs(), 0.6 - b.abs()) for a, b in ((u, v), (v, u))))
    return torch.stack([disk, triangle, diamond]), torch.stack([bar, stroke, cross])


def diffused(seed: int, copies: int) -> dict[str, Part]:
    """scikit-learn's digits x, 8 x 8 in (-1, 1), so many times each as cos(πt/2) x + sin(πt/2) ε with a normal ε, any t in (0, 1): these
    pixels and t (N, 65), and ε (N, 1, 8, 8)."""
    g, found = torch.Generator().manual_seed(seed), dict[str, Part]()
    for name, part in load_data("digits").parts.items():
        x = (part.inputs.flatten(1) / 8 - 1).repeat(copies, 1)
        t, ε = torch.rand(len(x), 1, generator=g), torch.randn(x.shape, generator=g)
        found[name] = Part(torch.cat([(π * t / 2).cos() * x + (π * t / 2).sin() * ε, t], 1), ε.view(-1, 1, 8, 8))
    return found
