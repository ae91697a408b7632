"""Tables, series, sentences and sessions of the third set, drawn with a seed, and names of characters, which every Python has."""

from __future__ import annotations

import random
import unicodedata

import torch
from torch import Tensor

from precond.lab.workloads.data import Part
from precond.lab.workloads.pool.member import standard
from precond.lab.workloads.text import windows

BRANDS, MODELS, REGIONS = 24, 160, 16
CAR_NUMBERS = ("age in years", "mileage in 1,000 km", "power in kW", "displacement in cm³", "owners", "days on offer")
ACTIVITIES = 6


def cars(seed: int, n: int) -> Part:
    """Used cars: six skewed numbers in their own units, and codes of brand, model and region (N, 9); logarithms of prices (N, 1)."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    model = torch.multinomial(torch.arange(1, MODELS + 1.0) ** -0.8, n, replacement=True, generator=g)
    brand = torch.randint(BRANDS, (MODELS,), generator=g)[model]
    region = torch.multinomial(torch.arange(1, REGIONS + 1.0) ** -0.5, n, replacement=True, generator=g)
    age = -4 * (torch.rand(n, 2, generator=g) + 1e-6).log().sum(1)
    mileage = 13 * age * (0.4 * normal(n)).exp() + 1
    size = normal(MODELS)[model]
    power = 90 * (0.35 * size + 0.15 * normal(n)).exp()
    displacement = 1600 * (0.3 * size + 0.15 * normal(n)).exp()
    owners = 1 + torch.poisson(age / 6, generator=g)
    offered = 30 * normal(n).exp()
    decay = 0.09 + 0.02 * normal(BRANDS)[brand]
    price = 0.4 * normal(BRANDS)[brand] + 0.25 * normal(MODELS)[model] + 0.08 * normal(REGIONS)[region]
    price = price + 0.8 * power.log() - decay * age - 0.05 * mileage.sqrt() - 0.05 * owners - 0.04 * offered.log()
    price = price - 0.2 * (displacement > 2500) * (age > 10) + 0.15 * normal(n)
    numbers = (age, mileage, power, displacement, owners, offered, brand, model, region)
    return Part(torch.stack([column.float() for column in numbers], 1), price[:, None])


def clusters(seed: int, n: int, features: int, classes: int) -> Part:
    """Points (N, features) of three clusters a class, of unlike shapes, in 8 dimensions and noise; classes (N,), 3 % of them drawn anew."""
    g, inner = torch.Generator().manual_seed(seed), 8
    number = torch.randint(3 * classes, (n,), generator=g)
    centers = 0.8 * torch.randn(3 * classes, inner, generator=g)[number]
    shapes = torch.randn(3 * classes, inner, inner, generator=g)[number] / inner**0.5
    x = centers + (shapes @ torch.randn(n, inner, 1, generator=g))[..., 0]
    x = x @ torch.randn(inner, features, generator=g) + torch.randn(n, features, generator=g)
    drawn = torch.randint(classes, (n,), generator=g)
    return Part(x, torch.where(torch.rand(n, generator=g) < 0.03, drawn, number % classes))


def activities(seed: int, n: int, steps: int) -> Part:
    """What a sensor on three axes feels in one of six periodic movements: series (N, T, 3) and movements (N,).

    A movement has amplitudes and phases of three harmonics on each axis; its frequency, its strength, the sensor's tilt and the noise are drawn
    for each series.
    """
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(ACTIVITIES, (n,), generator=g)
    amplitude = torch.randn(ACTIVITIES, 3, 3, generator=g)[kind]
    phase = 2 * torch.pi * torch.rand(ACTIVITIES, 3, 3, generator=g)[kind]
    frequency, start = (torch.rand(2, n, 1, generator=g) * torch.tensor([0.04, 1.0]).view(2, 1, 1)).unbind()
    turn = 2 * torch.pi * (start + (0.06 + frequency) * torch.arange(steps))
    harmonic = torch.arange(1, 4).view(3, 1)
    waves = (amplitude[..., None] * (harmonic * turn[:, None, None] + phase[..., None]).sin()).sum(2)
    tilt = torch.linalg.qr(torch.eye(3) + 0.2 * torch.randn(n, 3, 3, generator=g))
    rotation = tilt.Q * tilt.R.diagonal(dim1=1, dim2=2).sign()[:, None]
    strength = (0.3 * torch.randn(n, 1, 1, generator=g)).exp()
    series = strength * (rotation @ waves) + 0.5 * torch.randn(n, 3, steps, generator=g)
    return Part(standard(series.transpose(1, 2).reshape(-1, 3)).view(n, steps, 3), kind)


def sessions(seed: int, n: int, items: int, seen: int) -> Part:
    """Items that someone of a taste took one after another: the first of them (N, seen), and the next one (N,)."""
    g = torch.Generator().manual_seed(seed)
    vectors, tastes = torch.randn(items, 5, generator=g), torch.randn(n, 5, generator=g)
    scores = tastes @ vectors.T - 0.8 * torch.arange(1, items + 1.0).log()
    taken = torch.multinomial(scores.softmax(1), seen + 1, generator=g)
    return Part(taken[:, :-1].contiguous(), taken[:, -1])


NOUNS = ("dog", "cat", "bird", "teacher", "girl", "farmer", "river", "tree")
TRANSITIVE = ("see", "like", "follow", "hear", "know")
INTRANSITIVE = ("sleep", "run", "sing", "wait", "fall")
ADJECTIVES = ("old", "small", "red", "happy", "quiet", "tall")
ADVERBS = ("often", "never", "slowly", "today")
WORDS = (
    ".", "the", "a", "some", "that", "and", *ADJECTIVES, *ADVERBS,
    *(noun + ending for noun in NOUNS for ending in ("", "s")),
    *(verb + ending for verb in (*TRANSITIVE, *INTRANSITIVE) for ending in ("", "s")),
)  # fmt: skip


class Grammar:
    """Sentences of a grammar whose verbs agree with their nouns, over relative clauses too: ``some dogs that the cat sees sleep .``

    Args:
        seed: of all choices.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def sentence(self) -> list[str]:
        """Its words, the full stop included."""
        plural = self._maybe(0.5)
        words = self._noun_phrase(plural, 0.4) + self._verb_phrase(plural, 0.3)
        return [*words, *(["and", *self._verb_phrase(plural, 0.0)] if self._maybe(0.15) else []), "."]

    def _maybe(self, probability: float) -> bool:
        return self._random.random() < probability

    def _word(self, words: tuple[str, ...]) -> str:
        """The k-th with a probability of 1/k, but for a factor."""
        return self._random.choices(words, [1 / k for k in range(1, len(words) + 1)])[0]

    def _verb(self, verbs: tuple[str, ...], plural: bool) -> str:
        return self._word(verbs) + ("" if plural else "s")

    def _noun_phrase(self, plural: bool, clause: float) -> list[str]:
        words = [self._word(("the", "some" if plural else "a"))]
        while self._maybe(0.25):
            words.append(self._word(ADJECTIVES))
        words.append(self._word(NOUNS) + ("s" if plural else ""))
        if self._maybe(clause):
            other = self._maybe(0.5)
            if self._maybe(0.5):
                words += ["that", *self._noun_phrase(other, clause / 2), self._verb(TRANSITIVE, other)]
            else:
                words += ["that", *self._verb_phrase(plural, clause / 2)]
        return words

    def _verb_phrase(self, plural: bool, clause: float) -> list[str]:
        if self._maybe(0.6):
            return [self._verb(TRANSITIVE, plural), *self._noun_phrase(self._maybe(0.5), clause)]
        return [self._verb(INTRANSITIVE, plural), *([self._word(ADVERBS)] if self._maybe(0.3) else [])]


def sentences(seed: int, n: int, context: int) -> Part:
    """Windows (N, context) of one long text of :class:`Grammar`, as numbers of words, and the words that follow each (N, context)."""
    grammar, number, text = Grammar(seed), {word: i for i, word in enumerate(WORDS)}, list[int]()
    while len(text) <= n * context:
        text += [number[word] for word in grammar.sentence()]
    found = torch.tensor(text[: n * context + 1]).unfold(0, context + 1, context)
    return Part(found[:, :-1].contiguous(), found[:, 1:].contiguous())


def names(seed: int, context: int) -> dict[str, Part]:
    """Windows of the names of Unicode 3.2's characters below U+3000, a version that every Python keeps; one to a line, shuffled."""
    found = [name for code in range(0x3000) if (name := unicodedata.ucd_3_2_0.name(chr(code), None))]
    random.Random(seed).shuffle(found)
    lists = ["\n".join(found[i : i + 100]) for i in range(0, len(found), 100)]
    return windows(lists, context, 600_000, "unicodedata")
