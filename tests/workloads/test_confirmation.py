"""The third set of the pool: its data are what their words say, and its models are those of users."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from precond.lab.workloads import peers
from precond.lab.workloads.pool.confirmation.members import CONDITIONS, ITEMS, SPEED, convection_loss
from precond.lab.workloads.pool.confirmation.networks import Convection, GroupedAttention, NextItem
from precond.lab.workloads.pool.confirmation.pictures import DOTS, SIDE, TEXTURES, curves, dots, textures
from precond.lab.workloads.pool.confirmation.sequences import (
    ACTIVITIES,
    ADJECTIVES,
    ADVERBS,
    CAR_NUMBERS,
    INTRANSITIVE,
    NOUNS,
    TRANSITIVE,
    Grammar,
    activities,
    cars,
    names,
    sessions,
)
from precond.lab.workloads.text import ALPHABET


def test_a_car_s_price_follows_from_its_columns() -> None:
    """Least squares on what the columns are said to be; noise, and what no line has, is a twentieth of the spread."""
    found = cars(5, 4000)
    age, mileage, power, size, owners, offered = (
        found.inputs[:, CAR_NUMBERS.index(name)].double()
        for name in ("age in years", "mileage in 1,000 km", "power in kW", "displacement in cm³", "owners", "days on offer")
    )
    brand, model, region = found.inputs[:, 6:].long().unbind(1)
    assert torch.equal(owners, owners.round()) and age.min() > 0 and power.min() > 10 and size.median() > 1000
    assert torch.corrcoef(torch.stack([age, mileage]))[0, 1] > 0.7
    # A model is of one brand.
    assert all(brand[model == m].unique().numel() == 1 for m in model.unique())
    codes = [F.one_hot(model).double(), F.one_hot(region)[:, 1:].double()]
    numbers = [torch.stack([age, mileage.sqrt(), power.log(), owners, offered.log(), (size > 2500) & (age > 10)], 1), *codes]
    design = torch.cat([*numbers, age[:, None] * F.one_hot(brand)[:, 1:]], 1)
    price = found.targets.double()
    left = price - design @ torch.linalg.lstsq(design, price, driver="gelsd").solution
    assert left.var() < 0.05 * price.var()


def test_textures_look_as_they_are_called() -> None:
    found = textures(5, 1600)
    images = found.inputs.double()
    across, down = images.diff(dim=3).square().mean((1, 2, 3)), images.diff(dim=2).square().mean((1, 2, 3))
    spread = images.var((2, 3)).mean(1)

    def mean(values: Tensor, name: str) -> float:
        return values[found.targets == TEXTURES.index(name)].mean().item()

    assert mean(down, "level streaks") > 2 * mean(across, "level streaks")
    assert mean(across, "upright streaks") > 2 * mean(down, "upright streaks")
    rough = [mean((across + down) / spread, name) for name in ("clouds", "fog", "spots", "grains")]
    assert rough[0] < rough[1] < rough[3] and rough[0] < rough[2] < rough[3]
    # A labyrinth is of two colors: its deviation is about its largest value.
    kurtosis = (images - images.mean((2, 3), keepdim=True)).pow(4).mean((2, 3)).mean(1) / spread.square()
    assert mean(kurtosis, "labyrinth") < 0.8 * mean(kurtosis, "spots")


def test_more_dots_are_brighter_and_curves_pass_through_their_points() -> None:
    found = dots(5, 1600)
    light = [found.inputs[found.targets == k].sum((1, 2, 3)).mean().item() for k in range(DOTS)]
    # A dot has the light of 2π σ² b: σ is 0.95 ± 0.14 and b is 1.
    assert all(b - a == pytest.approx(2 * math.pi * (0.95**2 + 0.5**2 / 12), rel=0.25) for a, b in itertools.pairwise(light))
    points = (SIDE - 1) * torch.rand(3, 50, 2, 1, 1, generator=torch.Generator().manual_seed(6))
    images = curves(6, 50).inputs.view(50, SIDE, SIDE)
    for point in points[..., 0, 0].round().long():
        # A pixel is √½ off at most, and the next of 24 places half a pixel or so farther: exp(-½ (0.71 + 0.5)²) is 0.48.
        assert images[torch.arange(50), point[:, 0], point[:, 1]].min() > 0.45
    assert images.min() >= 0 and images.max() <= 1


def test_activities_are_periodic_and_sessions_have_no_item_twice() -> None:
    found = activities(5, 600, 64)
    assert set(found.targets.tolist()) == set(range(ACTIVITIES))
    power = torch.fft.rfft(found.inputs.double(), dim=1).abs().square().mean((0, 2))
    # Three harmonics of 0.06 to 0.1 cycles a place end at 0.3 (19 of 64); beyond a window's leakage there is noise alone.
    assert power[2:20].mean() > 5 * power[24:].mean()
    series = sessions(5, 500, 100, 9)
    whole = torch.cat([series.inputs, series.targets[:, None]], 1).sort(1).values
    assert (whole.diff(dim=1) > 0).all()
    taken = series.inputs.flatten().bincount(minlength=100)
    assert taken[:10].sum() > 5 * taken[-10:].sum()


class _Parser:
    """Sentences by recursive descent, with the number that each verb must have; what it does not know is an error."""

    def __init__(self, words: list[str]) -> None:
        self.words, self.deepest = words, 0

    def sentence(self) -> None:
        plural = self.noun_phrase(0)
        self.verb_phrase(plural, 0)
        if self.words[0] == "and":
            self.words.pop(0)
            self.verb_phrase(plural, 0)
        assert self.words == ["."]

    def noun_phrase(self, depth: int) -> bool:
        self.deepest = max(self.deepest, depth)
        article = self.words.pop(0)
        while self.words[0] in ADJECTIVES:
            self.words.pop(0)
        noun = self.words.pop(0)
        plural = noun.endswith("s")
        assert noun.removesuffix("s") in NOUNS and article in ("the", "some" if plural else "a")
        if self.words[0] == "that":
            self.words.pop(0)
            if self.words[0].removesuffix("s") in TRANSITIVE + INTRANSITIVE:
                self.verb_phrase(plural, depth + 1)
            else:
                self.verb(self.noun_phrase(depth + 1), TRANSITIVE)
        return plural

    def verb_phrase(self, plural: bool, depth: int) -> None:
        if self.verb(plural, TRANSITIVE + INTRANSITIVE) in TRANSITIVE:
            self.noun_phrase(depth)
        elif self.words[0] in ADVERBS:
            self.words.pop(0)

    def verb(self, plural: bool, among: tuple[str, ...]) -> str:
        verb = self.words.pop(0)
        assert verb.endswith("s") is not plural and verb.removesuffix("s") in among
        return verb.removesuffix("s")


def test_verbs_agree_with_their_nouns_over_clauses() -> None:
    grammar, deepest = Grammar(5), 0
    for _ in range(500):
        parser = _Parser(grammar.sentence())
        parser.sentence()
        deepest = max(deepest, parser.deepest)
    assert deepest >= 2


def test_names_are_those_of_characters() -> None:
    whole = "".join(ALPHABET[i] for part in names(5, 32).values() for i in part.inputs.flatten().tolist())
    assert len(whole) > 200_000
    assert all(name in whole for name in ("\nLATIN SMALL LETTER ", "\nGREEK ", " WITH ACUTE\n", "ARROW\n"))


def test_grouped_attention_is_that_of_rotated_pairs() -> None:
    """Loops over heads and places in float64; angles are float32, 6e-8 of up to 8."""
    torch.manual_seed(0)
    model = GroupedAttention(16, 4, 2, 8).double()
    x = torch.randn(8, 16, dtype=torch.float64)

    def turned(vector: Tensor, place: int) -> Tensor:
        a, b = vector[0::2], vector[1::2]
        angle = place * torch.tensor([1.0, 10_000**-0.5], dtype=torch.float64)
        both = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
        return torch.stack(both, 1).flatten()

    rows = torch.zeros(8, 16, dtype=torch.float64)
    for head, place in itertools.product(range(4), range(8)):
        at, group = slice(4 * head, 4 * head + 4), slice(4 * (head // 2), 4 * (head // 2) + 4)
        q = turned((model.wq.weight @ x[place])[at], place)
        scores = torch.stack([q @ turned((model.wk.weight @ x[i])[group], i) / 2 for i in range(place + 1)])
        values = torch.stack([(model.wv.weight @ x[i])[group] for i in range(place + 1)])
        rows[place, at] = scores.softmax(0) @ values
    torch.testing.assert_close(model(x[None])[0], rows @ model.wo.weight.T, rtol=1e-5, atol=1e-5)


def test_convection_lacks_nothing_at_its_solution_and_derivatives_are_those_of_differences() -> None:
    """Float64; central differences with h = 1e-5 err by 1e-16/h and h² times third derivatives."""
    torch.manual_seed(0)
    points = torch.rand(20, 4, dtype=torch.float64) * torch.tensor([2 * math.pi, 1.0, 2 * math.pi, 1.0], dtype=torch.float64)
    model, h = Convection(SPEED, (8, 8)).double(), 1e-5
    x, t, start, at = (column[:, None] for column in points.unbind(1))
    with torch.no_grad():
        u_x, u_t = ((model.u(x + a, t + b) - model.u(x - a, t - b)) / (2 * h) for a, b in ((h, 0), (0, h)))
        zero = torch.zeros_like(x)
        period = model.u(zero, at) - model.u(zero + 2 * math.pi, at)
        expected = torch.cat([u_t + SPEED * u_x, model.u(start, zero) - start.sin(), period], 1)
        found = model(points)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    loss = expected[:, 0].square().mean() + CONDITIONS * expected[:, 1:].square().mean(0).sum()
    torch.testing.assert_close(convection_loss(found, torch.zeros_like(found)), loss, rtol=1e-5, atol=1e-6)
    model.u = lambda x, t: (x - SPEED * t).sin()  # type: ignore[method-assign]
    torch.testing.assert_close(model(points), torch.zeros(20, 3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_muon_leaves_bags_of_embeddings_to_adamw() -> None:
    torch.manual_seed(0)
    model = NextItem(ITEMS, 8)
    start = model.bag.weight.detach().clone()
    optimizer = peers.muon(model, 0.01)
    F.cross_entropy(model(torch.randint(ITEMS, (16, 5))), torch.randint(ITEMS, (16,))).backward()
    optimizer.step()
    step = (model.bag.weight.detach() - start).abs()
    # Adam's first step is the rate wherever a gradient is; a matrix made orthogonal has no such entries.
    assert step[step != 0].median() == pytest.approx(0.01, rel=0.01)
