"""Deliveries, orbits, molecules and playlists of the sixth set, drawn with a seed."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from precond.lab.workloads.data import Part
from precond.lab.workloads.pool.member import standard, uniform

π = torch.pi
DELIVERY_NUMBERS = (
    "distance in km",
    "load in kg",
    "stops",
    "hour",
    "weekday",
    "rain in mm",
    "temperature in °C",
    "driver's years",
)
ON_BIKE, BY_TRUCK = (8.0, 20.0), 700.0
"""Bikes go less far than so many kilometers with less than so many kilograms; trucks carry more than so many."""


def deliveries(seed: int, n: int) -> Part:
    """Eight numbers of tours (N, 8) and the logarithm of their minutes (N, 1): another rule for bikes, vans and trucks."""
    g = torch.Generator().manual_seed(seed)
    drawn = uniform(g, n)

    distance = 2 + (2.2 + 1.2 * torch.randn(n, generator=g)).exp()
    load = (4.5 + 1.8 * torch.randn(n, generator=g)).exp()
    stops, hour, weekday = 1 + drawn(0, 9).floor(), drawn(5, 21), drawn(0, 7).floor()
    rain, temperature, years = (drawn(-6, 8)).clamp_min(0), drawn(-8, 32), drawn(0, 20)

    rush = ((-((hour - 8) / 1.2).square()).exp() + (-((hour - 17) / 1.8).square()).exp()) * (weekday < 5)
    bike = 60 * distance / (17 - 0.7 * rain - 0.2 * (temperature - 20).abs()) + 3 * stops
    van = 60 * distance / ((22 + 40 * (1 - (-distance / 25).exp())) / (1 + rush)) + (6 - 0.15 * years) * stops
    driven = 60 * distance / (52 - 12 * (temperature < 0) - 1.5 * rain)
    truck = driven + 45 * (driven / 270).floor() + 0.012 * load + 9 * stops
    minutes = torch.where(load > BY_TRUCK, truck, torch.where((distance < ON_BIKE[0]) & (load < ON_BIKE[1]), bike, van))
    inputs = torch.stack([distance, load, stops, hour, weekday, rain, temperature, years], 1)
    return Part(inputs, (minutes.log() + 0.05 * torch.randn(n, generator=g))[:, None])


def orbits(seed: int, n: int) -> Tensor:
    """Places and velocities (x, y, u, v) of bodies at any time of their ellipses about a mass of GM = 1 at the origin, (N, 4) in float64.

    Half of the axes are from 0.9 to 1.1, half from 1.8 to 2.4; eccentricities are below 0.5, and the ellipses of the far ones point one way.
    """
    g = torch.Generator().manual_seed(seed)
    drawn = uniform(g, n)
    far = drawn(0, 1) < 0.5
    axis = torch.where(far, drawn(1.8, 2.4), drawn(0.9, 1.1)).double()
    e = (0.5 * drawn(0, 1).sqrt()).double()
    towards = torch.where(far, 0.7 + 0.4 * torch.randn(n, generator=g), drawn(-π, π)).double()
    mean = drawn(-π, π).double()
    anomaly = mean
    for _ in range(20):  # Newton's iterations for Kepler's equation E - e sin E = M
        anomaly = anomaly - (anomaly - e * anomaly.sin() - mean) / (1 - e * anomaly.cos())
    root, rate = (1 - e.square()).sqrt(), axis.pow(-0.5) / (1 - e * anomaly.cos())
    along = axis * (anomaly.cos() - e), -rate * anomaly.sin()
    across = axis * root * anomaly.sin(), rate * root * anomaly.cos()
    pairs = [
        torch.stack([a * towards.cos() - b * towards.sin(), a * towards.sin() + b * towards.cos()], 1)
        for a, b in zip(along, across, strict=True)
    ]
    return torch.cat(pairs, 1)


ATOMS, VALENCES, OFFSETS = 10, (3, 2, 1), (0.0, 0.5, 1.0)
"""Places of a molecule; for carbon, nitrogen and oxygen, how many neighbors each may have, and its Coulomb integral (α' - α)/β."""


def molecules(seed: int, n: int) -> Part:
    """Connected molecules of 6, 8 or 10 atoms, none twice: kinds (three columns, 0 where no atom is) beside adjacency (N, 10, 3 + 10).

    The targets (N, 2) are standardized: Hückel's energy for each atom, and its gap between the last level that is filled and the next.
    """
    drawn, found = random.Random(seed), dict[bytes, Tensor]()
    while len(found) < n:
        graph = _molecule(drawn)
        found[graph.numpy().tobytes()] = graph
    inputs = torch.stack(list(found.values()))
    energy, gap = hueckel(inputs)
    return Part(inputs, standard(torch.stack([energy, gap], 1)).float())


def _molecule(drawn: random.Random) -> Tensor:
    graph, kinds, free = torch.zeros(ATOMS, len(VALENCES) + ATOMS), list[int](), list[int]()
    for atom in range(drawn.choice((6, 8, 10))):
        to = drawn.choice([i for i in range(atom) if free[i]]) if atom else None
        # An atom that takes up the last free place would end the molecule.
        kind = 0 if sum(free) <= 1 else drawn.choices(range(3), (6, 2, 2))[0]
        kinds.append(kind)
        free.append(VALENCES[kind])
        if to is not None:
            _bind(graph, free, atom, to)
    for _ in range(2):  # rings
        a, b = drawn.sample(range(len(kinds)), 2)
        if free[a] and free[b] and not graph[a, len(VALENCES) + b]:
            _bind(graph, free, a, b)
    graph[range(len(kinds)), kinds] = 1
    return graph


def _bind(graph: Tensor, free: list[int], a: int, b: int) -> None:
    graph[a, len(VALENCES) + b] = graph[b, len(VALENCES) + a] = 1
    free[a] -= 1
    free[b] -= 1


def hueckel(graphs: Tensor) -> tuple[Tensor, Tensor]:
    """Energy of each atom and gap in units of β, two electrons in each of the lower half of the levels (Hückel, 1931): (N,) and (N,)."""
    kinds, bonds = graphs.double().split((len(VALENCES), ATOMS), 2)
    there = kinds.sum(2)
    # β < 0: the lowest levels are the largest numbers; where no atom is there is a level that is never filled.
    levels = torch.linalg.eigvalsh(bonds + torch.diag_embed(kinds @ torch.tensor(OFFSETS).double() - 100 * (1 - there))).flip(1)
    filled = (there.sum(1) / 2).long()
    energy = 2 * torch.stack([row[:k].sum() for row, k in zip(levels, filled.tolist(), strict=True)]) / there.sum(1)
    last, following = (levels.gather(1, filled[:, None] + i)[:, 0] for i in (-1, 0))
    return energy, last - following


SONGS, GENRES, LISTED = 800, 16, 32


def playlists(seed: int, n: int) -> Part:
    """Lists of 32 of 800 songs, nothing twice: which 16 are seen (N, 800), 1 or 0, and which are to be found, of the same shape.

    A list has a mood of four dimensions and one or two genres; few songs are in many lists.
    """
    g = torch.Generator().manual_seed(seed)
    genre, song = torch.randint(GENRES, (SONGS,), generator=g), torch.randn(SONGS, 4, generator=g)
    popular = -0.4 * torch.randperm(SONGS, generator=g).add(1.0).log()
    liked = torch.zeros(n, GENRES).scatter_(1, torch.randint(GENRES, (n, 2), generator=g), 2.5)
    scores = liked[:, genre] + 0.8 * torch.randn(n, 4, generator=g) @ song.T + popular
    listed = torch.multinomial(scores.softmax(1), LISTED, generator=g)
    seen, found = (torch.zeros(n, SONGS).scatter_(1, half, 1.0) for half in listed.chunk(2, 1))
    return Part(seen, found)
