"""Point clouds of solids and pictures of cellular automata of the sixth set, drawn with a seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from precond.lab.workloads.data import Part

π = torch.pi
SOLIDS, POINTS = ("sphere", "cube", "cylinder", "cone", "torus", "octahedron", "helix", "two disks"), 40
AUTOMATON_SIDE = 16


def solids(seed: int, n: int, noise: float = 0.08) -> Part:
    """Points on solids, upright, turned about the vertical, of any size: (N, 40, 3), and which of eight solids each is (N,)."""
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(len(SOLIDS), (n,), generator=g)
    clouds = surfaces(g, n)[kind, torch.arange(n)]
    angle = 2 * π * torch.rand(n, generator=g)
    turns = torch.diag_embed(torch.stack([angle.cos(), angle.cos(), torch.ones(n)], 1))
    turns[:, 0, 1], turns[:, 1, 0] = angle.sin(), -angle.sin()
    sizes = 1.4 + 1.2 * torch.rand(n, 1, 1, generator=g)
    return Part(sizes * clouds @ turns + noise * torch.randn(n, POINTS, 3, generator=g), kind)


def surfaces(g: torch.Generator, n: int) -> Tensor:
    """Points on each of the solids, (8, N, 40, 3)."""
    a, h = 2 * π * torch.rand(n, POINTS, generator=g), 2 * torch.rand(n, POINTS, generator=g) - 1
    b, r = 2 * π * torch.rand(n, POINTS, generator=g), torch.rand(n, POINTS, generator=g).sqrt()
    x, y, side = a.cos(), a.sin(), (torch.rand(n, POINTS, generator=g) < 0.5).float() * 2 - 1
    normal = torch.randn(n, POINTS, 3, generator=g)
    inside = 2 * torch.rand(n, POINTS, 3, generator=g) - 1
    onto = F.one_hot(torch.randint(3, (n, POINTS), generator=g), 3).bool()
    ring = 0.7 + 0.3 * b.cos()
    return torch.stack(
        [
            normal / normal.norm(dim=2, keepdim=True),
            0.8 * torch.where(onto, side[..., None], inside),
            torch.stack([0.7 * x, 0.7 * y, h], 2),
            torch.stack([0.9 * r * x, 0.9 * r * y, 0.7 - 1.4 * r], 2),
            torch.stack([ring * x, ring * y, 0.3 * b.sin()], 2),
            1.2 * normal / normal.abs().sum(2, keepdim=True),
            torch.stack([0.6 * (2 * π * h).cos(), 0.6 * (2 * π * h).sin(), h], 2),
            torch.stack([0.9 * r * x, 0.9 * r * y, 0.5 * side], 2),
        ]
    )


def automata(seed: int, n: int, rules: Sequence[int], wrong: float = 0.15) -> Part:
    """Histories of elementary cellular automata, time downwards, some cells wrong: (N, 1, 16, 16) of ±1, and which rule each has (N,).

    They are 20 steps old where the picture begins, and are wider than it.
    """
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(len(rules), (n,), generator=g)
    rule = torch.tensor(rules)[kind][:, None]
    cells, rows = torch.randint(2, (n, 6 * AUTOMATON_SIDE), generator=g), list[Tensor]()
    for _ in range(20 + AUTOMATON_SIDE):
        rows.append(cells)
        cells = (rule >> (4 * cells.roll(1, 1) + 2 * cells + cells.roll(-1, 1))) & 1
    images = torch.stack(rows[20:], 1)[:, :, :AUTOMATON_SIDE]
    images = images ^ (torch.rand(images.shape, generator=g) < wrong).long()
    return Part((2.0 * images - 1)[:, None], kind)
