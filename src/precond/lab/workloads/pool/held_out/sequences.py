"""Tables, series, tunes, genes and listeners of the fourth set, drawn with a seed, and comments of Python's own sources."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from precond.lab.workloads.data import Part
from precond.lab.workloads.text import windows

HOUSE_NUMBERS = ("living area in m²", "lot in m²", "year", "rooms", "distance to the center in km", "energy in kWh/m²")
DISTRICTS, TYPES, HEATINGS = 18, 5, 4


def houses(seed: int, n: int) -> Part:
    """Houses: six numbers in their own units, and codes of district, type and heating (N, 9); logarithms of prices (N, 1)."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    codes = [torch.multinomial(torch.arange(1, c + 1.0) ** -0.6, n, True, generator=g) for c in (DISTRICTS, TYPES, HEATINGS)]
    district, kind, heating = codes
    area = 110 * (0.3 * normal(n) + 0.2 * normal(TYPES)[kind]).exp()
    lot = area * (1 + 0.7 * normal(n)).exp()
    year = (2020 - 25 * (1e-6 + torch.rand(n, 2, generator=g)).log().neg().sum(1)).round().clamp_min(1850)
    rooms = (area / 26 + 0.6 * normal(n)).round().clamp_min(1)
    distance = (2 + 12 * torch.rand(DISTRICTS, generator=g))[district] * (0.3 * normal(n)).exp()
    energy = (60 + 1.6 * (2020 - year) + 30 * torch.rand(HEATINGS, generator=g)[heating]) * (0.25 * normal(n)).exp()
    price = 0.8 * area.log() + 0.12 * lot.log() - 0.3 * distance.log1p() + 0.02 * rooms
    price = price + 0.25 * normal(DISTRICTS)[district] + 0.15 * normal(TYPES)[kind] - 0.0015 * energy
    price = price + 0.3 * (-((year - 1900) / 15).square()).exp() * (distance < 6) + 0.1 * normal(n)
    numbers = (area, lot, year, rooms, distance, energy, *codes)
    return Part(torch.stack([column.float() for column in numbers], 1), price[:, None])


def heartbeats(seed: int, n: int, places: int) -> Part:
    """Two seconds of an electrocardiogram, (N, 1, places), and the same as targets: one beat in the middle.

    The five waves of a beat (after McSharry et al., 2003) have heights, widths and places that differ from one example to the next, as do
    pulse, baseline and noise.
    """
    g = torch.Generator().manual_seed(seed)
    jitter = torch.tensor([0.02, 0.004, 0.0, 0.004, 0.03])
    at = torch.tensor([-0.2, -0.05, 0.0, 0.05, 0.28]) + jitter * torch.randn(n, 5, generator=g)
    height = torch.tensor([0.15, -0.15, 1.0, -0.25, 0.3]) * (1 + 0.3 * torch.randn(n, 5, generator=g))
    width = torch.tensor([0.03, 0.02, 0.025, 0.02, 0.055]) * (1 + 0.15 * torch.randn(n, 5, generator=g)).clamp_min(0.3)
    seconds = 2 * torch.arange(places) / places
    period, middle = 0.65 + 0.5 * torch.rand(n, 1, generator=g), 1 + 0.05 * torch.randn(n, 1, generator=g)
    inside = (torch.remainder((seconds - middle) / period + 0.4, 1) - 0.4) * period  # seconds from the beat's middle
    waves = height[..., None] * (-((inside[:, None] - at[..., None]) / width[..., None]).square() / 2).exp()
    slow = 0.1 * (torch.randn(n, 1, generator=g) + torch.randn(n, 1, generator=g) * (2 * seconds).sin())
    series = (4 * (waves.sum(1) + slow) + 0.1 * torch.randn(n, places, generator=g))[:, None]
    return Part(series, series)


SCALE = (0, 2, 4, 5, 7, 9, 11)
PITCHES = 12 + 12 * 2 + 4
HELD, REST, BAR = PITCHES, PITCHES + 1, PITCHES + 2
CHORDS = {0: (3, 4, 5), 3: (0, 4, 1), 4: (0, 5), 5: (3, 1), 1: (4,)}
"""What degree may follow which, as roots of chords."""


class Tunes:
    """Tunes in major keys, bars of eight places, form AABA: pitches in semitones, places that are held, rests, and ends of bars.

    Args:
        seed: of all choices.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def tune(self) -> list[int]:
        """Eight bars: two of a phrase, the same again, two of another, and the first once more, all in one key."""
        key, (a, b) = self._random.randrange(12), (self._phrase(), self._phrase())
        return [key + sign if sign < PITCHES else sign for sign in (*a, *a, *b, *a)]

    def _phrase(self) -> list[int]:
        """Two bars in C; steps along the scale, and notes of the chord on strong places."""
        signs, root, degree = list[int](), 0, self._random.randrange(7)
        for _ in range(2):
            for place in range(8):
                if place % 4 and self._random.random() < 0.25:
                    signs.append(HELD if self._random.random() < 0.9 else REST)
                    continue
                if place % 4 == 0:
                    degree = min(
                        (root + third + octave for third in (0, 2, 4) for octave in (-7, 0, 7)), key=lambda d: abs(d - degree)
                    )
                else:
                    degree += self._random.choice((-1, -1, 1, 1, 2))
                degree = max(0, min(15, degree))
                signs.append(12 * (degree // 7) + SCALE[degree % 7])
            signs.append(BAR)
            root = self._random.choice(CHORDS[root])
        return signs


def melodies(seed: int, n: int, context: int) -> Part:
    """Windows (N, context) of one tune of :class:`Tunes` after another, and the signs that follow each (N, context)."""
    tunes, signs = Tunes(seed), list[int]()
    while len(signs) <= n * context:
        signs += tunes.tune()
    return following(torch.tensor(signs[: n * context + 1]), context)


def following(signs: Tensor, context: int) -> Part:
    """Windows one behind the other, and at each place the next sign."""
    found = signs.unfold(0, context + 1, context)
    return Part(found[:, :-1].contiguous(), found[:, 1:].contiguous())


BASES = "ACGT"
BETWEEN, EXON, INTRON = range(3)
REGIONS = ("between genes", "exon", "intron")
_CODON = ((3, 2, 3.5, 1.5), (3, 2.2, 1.8, 3), (1.2, 3.5, 3.3, 2))
"""Weights of A, C, G and T at the three places of a codon."""


class Chromosome:
    """Genes with introns: ATG, codons, introns GT…AG between codons, a stop TAA, TAG or TGA, and rich in A and T between genes.

    Args:
        seed: of all choices.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def gene(self) -> Iterator[tuple[str, int]]:
        """Pieces and where they lie: what goes before a gene, and the gene."""
        yield self._bases((3, 2, 2, 3), self._long(8, 20)), BETWEEN
        yield "ATG", EXON
        while self._random.random() < 0.94:
            yield self._codon(), EXON
            if self._random.random() < 0.1:
                yield "GT" + self._bases((2, 2, 1.5, 4), self._long(5, 10)) + "AG", INTRON
        yield self._random.choice(("TAA", "TAG", "TGA")), EXON

    def _long(self, least: int, more: float) -> int:
        return least + int(self._random.expovariate(1 / more))

    def _bases(self, weights: tuple[float, ...], n: int) -> str:
        return "".join(self._random.choices(BASES, weights, k=n))

    def _codon(self) -> str:
        while (codon := "".join(self._bases(weights, 1) for weights in _CODON)) in ("TAA", "TAG", "TGA"):
            pass
        return codon


def genes(seed: int, n: int, places: int) -> Part:
    """Windows (N, places) of a :class:`Chromosome` as numbers of bases, and of each base in which of the regions it lies."""
    chromosome, bases, regions = Chromosome(seed), list[int](), list[int]()
    while len(bases) < n * places:
        for piece, region in chromosome.gene():
            bases += map(BASES.index, piece)
            regions += [region] * len(piece)
    inputs, targets = (torch.tensor(signs[: n * places]).view(n, places) for signs in (bases, regions))
    return Part(inputs, targets)


LISTENERS, SONGS, GENRES = 700, 1200, 14


def listens(seed: int, n: int) -> Part:
    """A listener, a song he heard and one he did not, and the genres of both: codes (N, 5); nothing is asked but the order (N, 1).

    Songs lie about their genre's place in 6 dimensions, listeners anywhere; a song is heard by taste and popularity.
    """
    g = torch.Generator().manual_seed(seed)
    genre = torch.randint(GENRES, (SONGS,), generator=g)
    song = torch.randn(GENRES, 6, generator=g)[genre] + 0.6 * torch.randn(SONGS, 6, generator=g)
    scores = 0.9 * torch.randn(LISTENERS, 6, generator=g) @ song.T - 0.7 * torch.randperm(SONGS, generator=g).add(1.0).log()
    each = -(-n // LISTENERS)
    heard = torch.multinomial(scores.softmax(1), each, True, generator=g).flatten()
    order = torch.randperm(len(heard), generator=g)[:n]
    listener, heard = order // each, heard[order]
    other = torch.randint(SONGS - 1, (n,), generator=g)
    other = other + (other >= heard)
    return Part(torch.stack([listener, heard, other, genre[heard], genre[other]], 1), torch.zeros(n, 1))


def comments(context: int) -> dict[str, Part]:
    """Windows of the comments in the standard library's modules, without their signs; a module's lines one after another."""
    folder = Path(sysconfig.get_path("stdlib"))
    modules = sorted(folder.glob("*.py"), key=lambda path: path.name)
    lines = [path.read_text(encoding="utf-8", errors="ignore").splitlines() for path in modules]
    texts = ["\n".join(line.lstrip(" #") for line in found if line.lstrip().startswith("#")) for found in lines]
    return windows(texts, context, 500_000, str(folder))
