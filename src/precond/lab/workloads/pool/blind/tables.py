"""Rentals of bicycles, weather, an invasion's front and watched films of the seventh set, drawn with a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from precond.lab.workloads.data import Part
from precond.lab.workloads.pool.member import standard, uniform

π = torch.pi
RENTAL_NUMBERS = ("hour", "temperature in °C", "humidity in %", "wind in km/h")
SKIES, WEEKDAYS, STATIONS = 4, 7, 30
OFFICES = 15
"""The first so many stations are near offices, the others near parks."""


def rentals(seed: int, n: int) -> Part:
    """Four numbers and three codes (sky, weekday, station) of an hour at a station, (N, 4 + 3), and log(1 + bicycles rented) (N, 1)."""
    g = torch.Generator().manual_seed(seed)
    drawn = uniform(g, n)
    sky = torch.multinomial(torch.tensor([4.0, 3, 2, 1]), n, replacement=True, generator=g)
    weekday, station = torch.randint(WEEKDAYS, (n,), generator=g), torch.randint(STATIONS, (n,), generator=g)
    hour, temperature = drawn(0, 24).floor(), 12 + 9 * torch.randn(n, generator=g)
    humidity, wind = (45 + 12 * sky + 12 * torch.randn(n, generator=g)).clamp(10, 100), drawn(0, 1).square() * 50

    size = (0.5 * torch.randn(STATIONS, generator=g)).exp()[station]
    commute = (-((hour - 8) / 1.5).square()).exp() + (-((hour - 17.5) / 2).square()).exp()
    leisure = (-((hour - 14) / 4).square()).exp()
    works, office = weekday < 5, station < OFFICES
    rhythm = torch.where(works, torch.where(office, 3.0, 1.0), 0.2) * commute + torch.where(office, 0.3, 1.5 + ~works) * leisure
    warm = (-((temperature - 23) / 14).square()).exp()
    dry = torch.tensor([1.0, 0.85, 0.5, 0.15])[sky] * (1 - 0.004 * (humidity - 60).clamp_min(0)) * (1 - 0.01 * wind)
    count = 40 * size * (0.05 + rhythm) * warm * dry
    found = torch.stack([hour, temperature, humidity, wind, sky, weekday, station], 1).float()
    return Part(found, (count.log1p() + 0.1 * torch.randn(n, generator=g))[:, None])


HOURS, AHEAD = 24, 3


def weather(seed: int, n: int) -> Part:
    """Hours of six readings, standardized (N, 24, 6), and by how much it gets warmer in the three hours behind each, too (N, 24, 1).

    Readings are of temperature, pressure, humidity, wind, and sine and cosine of the hour. Days are warmer than nights, less so under clouds;
    a cold front passes at some time: the pressure falls before it, the temperature behind it.
    """
    g = torch.Generator().manual_seed(seed)
    drawn = uniform(g, n, 1)
    time = torch.arange(HOURS + AHEAD) + drawn(0, 24).floor()
    since = torch.arange(HOURS + AHEAD) - drawn(-8, HOURS + 8)
    strength, clouds, width = drawn(0, 1), drawn(0, 1), drawn(2, 6)
    near = (-(since / width).square()).exp()
    covered = (clouds + strength * near).clamp_max(1)
    temperature = (
        15 + drawn(-6, 6) + 6 * (1 - 0.7 * covered) * (2 * π * (time - 9) / 24).sin() - 12 * strength * (since / 2).sigmoid()
    )
    pressure = 1015 + drawn(-5, 5) - 14 * strength * (-(since / (2 * width)).square()).exp()
    readings = torch.stack(
        [
            temperature,
            pressure,
            30 + 60 * covered,
            4 + 14 * strength * near,
            (2 * π * time / 24).sin(),
            (2 * π * time / 24).cos(),
        ],
        2,
    )[:, :HOURS]
    noise = torch.tensor([0.15, 0.3, 3.0, 1.0, 0.0, 0.0]) * torch.randn(n, HOURS, 6, generator=g)
    warmer = temperature[:, AHEAD:] - temperature[:, :HOURS]
    inputs = standard((readings + noise).flatten(0, 1)).view(n, HOURS, 6)
    return Part(inputs, standard(warmer.flatten()).view(n, HOURS, 1))


DIFFUSION, GROWTH = 0.4, 3.0
LOW, HIGH = (-4.0, 0.0), (8.0, 2.0)
"""Where, and when, an invasion is watched: (x, t)."""


def front(points: Tensor) -> Tensor:
    """Density of an invasion at (x, t), (N, 2) ↦ (N, 1): a wave that solves u_t = 0.4 u_xx + 3 u(1 - u) (Ablowitz & Zeppetella, 1979)."""
    x, t = points.split(1, 1)
    return (1 + ((x * (GROWTH / DIFFUSION) ** 0.5 - 5 * GROWTH * t / 6**0.5) / 6**0.5).exp()).pow(-2)


def invasion(seed: int, n: int) -> Part:
    """Points (N, 2), and densities that were measured there, with a noise of 0.02, beside 0 (N, 2)."""
    g = torch.Generator().manual_seed(seed)
    low, high = torch.tensor(LOW), torch.tensor(HIGH)
    points = low + (high - low) * torch.rand(n, 2, generator=g)
    measured = front(points) + 0.02 * torch.randn(n, 1, generator=g)
    return Part(points, torch.cat([measured, torch.zeros(n, 1)], 1))


FILMS, GENRES, DEVICES, WATCHED = 240, 12, 5, 6


def films(seed: int, n: int) -> Part:
    """Whether a film that was shown is watched (N,), from (N, 2 + 4 + 6): age and hours a week, standardized, codes of the film, its genre,
    the device and the weekday, and six films that the same person has watched.

    People and films have a taste of four dimensions, a genre has a middle of it; the old and the young like other genres.
    """
    g = torch.Generator().manual_seed(seed)
    middle = torch.randn(GENRES, 4, generator=g)
    genre = torch.randint(GENRES, (FILMS,), generator=g)
    film = middle[genre] + 0.5 * torch.randn(FILMS, 4, generator=g)
    popular = -0.5 * torch.randperm(FILMS, generator=g).add(1.0).log()
    taste = 1.5 * torch.randn(n, 4, generator=g)
    watched = torch.multinomial((taste @ film.T + popular).softmax(1), WATCHED, generator=g)
    shown = torch.multinomial((popular / 2).softmax(0), n, replacement=True, generator=g)
    age, hours = 18 + 52 * torch.rand(n, generator=g), (1.5 + 0.7 * torch.randn(n, generator=g)).exp()
    device, weekday = torch.randint(DEVICES, (n,), generator=g), torch.randint(WEEKDAYS, (n,), generator=g)
    for_old, at_once = torch.randn(GENRES, generator=g), torch.randn(DEVICES, generator=g)
    score = (taste * film[shown]).sum(1) + for_old[genre[shown]] * (age - 44) / 10 + at_once[device] + 0.8 * hours.log() - 1.2
    seen = (torch.rand(n, generator=g) < (3 * score).sigmoid()).long()
    numbers = standard(torch.stack([age, hours.log()], 1))
    codes = torch.cat([torch.stack([shown, genre[shown], device, weekday], 1), watched], 1)
    return Part(torch.cat([numbers, codes.float()], 1), seen)
