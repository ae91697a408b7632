"""The fourth set of the pool: its data are what their words say, and its models compute what theirs say."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from precond.lab.workloads.pool import POOL
from precond.lab.workloads.pool.finetuning import LoRA
from precond.lab.workloads.pool.held_out.members import BOUNDARY, REYNOLDS, flow_loss, kovasznay, order_loss
from precond.lab.workloads.pool.held_out.networks import Flow, NormedAttention, PairwiseRanking, Tagger, lacking
from precond.lab.workloads.pool.held_out.pictures import (
    BANDS,
    CLOCK_SIDE,
    HOURS,
    RATIOS,
    VOWELS,
    clocks,
    lissajous,
    mel,
    vowels,
)
from precond.lab.workloads.pool.held_out.sequences import (
    BAR,
    EXON,
    HELD,
    HOUSE_NUMBERS,
    INTRON,
    PITCHES,
    REST,
    Chromosome,
    Tunes,
    comments,
    genes,
    heartbeats,
    houses,
    listens,
    melodies,
)
from precond.lab.workloads.pool.member import scaled
from precond.lab.workloads.text import ALPHABET

MEMBERS = {member.name: member for member in POOL}


def test_a_house_s_price_follows_from_its_columns() -> None:
    """Least squares on what the columns are said to be; noise has a standard deviation of 0.1."""
    found = houses(5, 3000)
    columns = [found.inputs[:, i].double() for i in range(len(HOUSE_NUMBERS))]
    area, lot, year, rooms, distance, energy = columns
    assert area.min() > 10 and lot.min() > 10 and distance.min() > 0 and energy.min() > 0
    assert torch.equal(year, year.round()) and torch.equal(rooms, rooms.round()) and year.max() <= 2020
    codes = [F.one_hot(code).double() for code in found.inputs[:, len(HOUSE_NUMBERS) :].long().unbind(1)]
    old = (-((year - 1900) / 15).square()).exp() * (distance < 6)
    design = torch.cat([torch.stack([area.log(), lot.log(), distance.log1p(), rooms, energy, old], 1), *codes], 1)
    price = found.targets.double()
    left = price - design @ torch.linalg.lstsq(design, price, driver="gelsd").solution
    assert left.std().item() == pytest.approx(0.1, rel=0.05) and price.std() > 0.4


def test_scaled_numbers_are_those_of_the_training_part_and_codes_stay() -> None:
    parts = {"train": houses(5, 100), "test": houses(6, 50)}
    found = scaled(parts, 6)
    numbers = found["train"].inputs[:, :6]
    torch.testing.assert_close(numbers.mean(0), torch.zeros(6), rtol=0, atol=1e-4)
    torch.testing.assert_close(numbers.std(0), torch.ones(6), rtol=1e-4, atol=0)
    raw = parts["train"].inputs[:, :6]
    expected = (parts["test"].inputs[:, :6] - raw.mean(0)) / raw.std(0)
    torch.testing.assert_close(found["test"].inputs[:, :6], expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(found[k].inputs[:, 6:], parts[k].inputs[:, 6:]) for k in parts)


def test_hearts_beat_in_the_middle_and_at_their_pulse() -> None:
    found = heartbeats(5, 2000, 96)
    series = found.inputs[:, 0]
    assert torch.equal(found.inputs, found.targets)
    # The middle of two seconds is the place 48; beats lie there to 0.05 s, which is 2.4 places.
    assert series.mean(0).argmax() in (47, 48, 49) and series.mean(0)[40:57].max() > 3 * series.mean(0).abs().median()
    peaks = ((series[:, 1:-1] > series[:, :-2]) & (series[:, 1:-1] > series[:, 2:]) & (series[:, 1:-1] > 2.4)).sum(1).double()
    # Two seconds over a period from 0.65 to 1.15 s: 4 ln(1.15/0.65) beats, less those that are low or cut off.
    assert peaks.mean().item() == pytest.approx(4 * math.log(1.15 / 0.65), rel=0.2)


def test_figures_swing_as_often_as_their_ratio_says() -> None:
    """Where one direction is the faster, strokes lie along it, and the image changes across them."""
    found = lissajous(5, 1400)
    images = found.inputs.double()
    across, down = images.diff(dim=3).square().mean((1, 2, 3)), images.diff(dim=2).square().mean((1, 2, 3))
    for k, (a, b) in enumerate(RATIOS):
        ratio = (across[found.targets == k].mean() / down[found.targets == k].mean()).item()
        assert (ratio > 1.05, ratio < 1 / 1.05) == (b > a, a > b), (a, b)


def test_vowels_are_loud_at_their_formants() -> None:
    assert mel(torch.tensor(1000.0)).item() == pytest.approx(1000, rel=1e-3)
    found = vowels(5, 1600)
    bands = torch.linspace(mel(torch.tensor(150.0)).item(), mel(torch.tensor(3800.0)).item(), BANDS)
    means = torch.stack([found.inputs[found.targets == k, 0].mean((0, 2)) for k in range(len(VOWELS))])
    for mean, formants in zip(means, VOWELS.values(), strict=True):
        near = torch.stack([(bands - mel(torch.tensor(float(f)))).abs().argmin() for f in formants])
        assert mean[near].min() > mean[-1] + 0.3 and mean[near].mean() > mean.mean()


def test_the_short_hand_of_clocks_shows_the_hour() -> None:
    """The mean of all clocks of an hour has no long hand; the short one lies in the middle of its hour."""
    found = clocks(5, 6000)
    line = torch.linspace(-1, 1, CLOCK_SIDE)
    y, x = torch.meshgrid(line, line, indexing="ij")
    ring = ((x.square() + y.square()).sqrt() - 0.35).abs() < 0.15
    overall = found.inputs[:, 0].mean(0)
    for hour in range(HOURS):
        light = ((found.inputs[found.targets == hour, 0].mean(0) - overall) * ring).clamp_min(0)
        # Clockwise from the top, y downwards.
        turn = torch.atan2((light * x).sum(), -(light * y).sum()).item() / (2 * math.pi) * HOURS
        assert abs((turn - hour - 0.5 + 6) % HOURS - 6) < 0.5, hour
    # Beyond the short hand's end there is the long one alone, which has been everywhere in an hour.
    beyond = ((x.square() + y.square()).sqrt() - 0.65).abs() < 0.06
    means = torch.stack([found.inputs[found.targets == hour, 0].mean(0) for hour in range(HOURS)])
    # Were it as the short one, 0.038; noise alone leaves 0.019.
    assert (means - overall)[:, beyond].abs().mean() < 0.028


def test_tunes_have_their_form_and_one_key() -> None:
    tunes, keys = Tunes(5), set[int]()
    major = {0, 2, 4, 5, 7, 9, 11}
    for _ in range(50):
        signs = tunes.tune()
        a, again, b, last = (signs[i : i + 18] for i in range(0, 72, 18))
        assert len(signs) == 72 and a == again == last and a != b
        assert [i for i, sign in enumerate(signs) if sign == BAR] == list(range(8, 72, 9))
        pitches = {sign for sign in signs if sign < PITCHES}
        assert set(signs) <= pitches | {HELD, REST, BAR}
        fits = [key for key in range(12) if all((pitch - key) % 12 in major for pitch in pitches)]
        assert fits
        keys.update(fits)
    assert keys == set(range(12))
    windows = melodies(5, 4, 30)
    whole = [*windows.inputs.flatten().tolist(), windows.targets[-1, -1].item()]
    assert whole[:72] == Tunes(5).tune() and windows.targets.flatten().tolist() == whole[1:]


def test_genes_are_read_in_frame() -> None:
    chromosome, introns = Chromosome(5), 0
    for _ in range(100):
        (_, *gene) = chromosome.gene()
        read = "".join(piece for piece, region in gene if region == EXON)
        assert re.fullmatch(r"ATG(?:(?!TAA|TAG|TGA)[ACGT]{3})*(?:TAA|TAG|TGA)", read)
        for piece in (piece for piece, region in gene if region == INTRON):
            introns += 1
            assert piece.startswith("GT") and piece.endswith("AG")
    assert introns > 50
    found = genes(5, 200, 40)
    expected = [region for piece, region in Chromosome(5).gene() for _ in piece]
    assert found.targets.flatten()[: len(expected)].tolist() == expected
    assert all((found.targets == region).float().mean() > 0.1 for region in range(3))


def test_listeners_hear_by_taste_and_popularity() -> None:
    found = listens(5, 20_000)
    listener, heard, other, genre, genre_of_other = found.inputs.unbind(1)
    assert (heard != other).all()
    songs, genres = torch.cat([heard, other]), torch.cat([genre, genre_of_other])
    assert all(genres[songs == song].unique().numel() == 1 for song in range(100))
    counts = heard.bincount().sort(descending=True).values
    assert counts[:50].sum() > 0.25 * counts.sum()  # evenly it were 0.04
    # Two songs of one listener are of one genre more often than two of two listeners.
    order = listener.argsort()
    same = listener[order][1:] == listener[order][:-1]
    equal = (genre[order][1:] == genre[order][:-1])[same].float().mean()
    by_chance = (genre.bincount() / len(genre)).square().sum()
    assert equal > 1.3 * by_chance


def test_comments_are_those_of_the_library() -> None:
    whole = "".join(ALPHABET[i] for part in comments(40).values() for i in part.inputs.flatten().tolist())
    assert len(whole) > 200_000
    assert "import " in whole and "\n#" not in whole and whole.count(" the ") > 2000 and whole.count("def ") < 100


def test_attention_of_normalized_queries_and_keys() -> None:
    """Loops over heads and places in float64; angles are float32, 6e-8 of up to 8."""
    torch.manual_seed(0)
    model = NormedAttention(8, 2, 6).double()
    with torch.no_grad():
        model.q_norm.weight.uniform_(0.5, 2)
        model.k_norm.weight.uniform_(0.5, 2)
    x = torch.randn(6, 8, dtype=torch.float64)

    def turned(vector: Tensor, place: int) -> Tensor:
        angle = place * torch.tensor([1.0, 10_000**-0.5], dtype=torch.float64)
        pairs = torch.complex(vector[:2], vector[2:]) * torch.exp(1j * angle)
        return torch.cat([pairs.real, pairs.imag])

    def normed(vector: Tensor, weight: Tensor) -> Tensor:
        return weight * vector / vector.square().mean().sqrt()

    rows = torch.zeros(6, 8, dtype=torch.float64)
    for head in range(2):
        at = slice(4 * head, 4 * head + 4)
        keys = [turned(normed((model.key.weight @ row)[at], model.k_norm.weight), i) for i, row in enumerate(x)]
        for place in range(6):
            q = turned(normed((model.query.weight @ x[place])[at], model.q_norm.weight), place)
            scores = torch.stack([q @ k / 2 for k in keys[: place + 1]])
            rows[place, at] = scores.softmax(0) @ torch.stack([(model.value.weight @ row)[at] for row in x[: place + 1]])
    torch.testing.assert_close(model(x[None])[0], rows @ model.out.weight.T, rtol=1e-5, atol=1e-5)


def test_kovasznay_s_flow_lacks_nothing() -> None:
    points = torch.rand(30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 0.5
    torch.testing.assert_close(
        lacking(kovasznay, points, REYNOLDS), torch.zeros(30, 3, dtype=torch.float64), rtol=0, atol=1e-10
    )


def test_what_a_flow_lacks_is_that_of_differences() -> None:
    """Central differences in float64, h = 1e-4: roundings 1e-16/h² = 1e-8, and h² times fourth derivatives."""
    torch.manual_seed(0)
    model, h = Flow(REYNOLDS, (8, 8)).double(), 1e-4
    points = torch.rand(10, 4, dtype=torch.float64)
    with torch.no_grad():
        here = model.net(points[:, :2])
        plus, minus = (
            torch.stack([model.net(points[:, :2] + sign * h * axis) for axis in torch.eye(2, dtype=torch.float64)])
            for sign in (1, -1)
        )
        (x, y), (xx, yy) = (plus - minus) / (2 * h), (plus - 2 * here + minus) / h**2
        u, v, _ = here.T
        expected = torch.stack([
            u * x[:, 0] + v * y[:, 0] + x[:, 2] - (xx + yy)[:, 0] / REYNOLDS,
            u * x[:, 1] + v * y[:, 1] + y[:, 2] - (xx + yy)[:, 1] / REYNOLDS,
            x[:, 0] + y[:, 1],
        ], 1)  # fmt: skip
        expected = torch.cat([expected, model.net(points[:, 2:])], 1)
        found = model(points)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    targets = torch.randn(10, 6, dtype=torch.float64)
    square = (expected - targets).square()
    loss = (square[:, :3].sum() + BOUNDARY * square[:, 3:].sum()) / 10
    torch.testing.assert_close(flow_loss(found, targets), loss, rtol=1e-5, atol=1e-6)


def test_the_boundary_s_values_are_those_of_the_exact_flow() -> None:
    train = MEMBERS["PINN, Navier-Stokes"].workload().parts["train"]
    x, y = train.inputs[:, 2:].unbind(1)
    sides = [(x == -0.5), (x == 1.0), (y == -0.5), (y == 1.5)]
    assert torch.stack(sides).any(0).all() and all(side.float().mean() > 0.2 for side in sides)
    assert train.inputs.min() >= -0.5 and (train.inputs <= torch.tensor([1.0, 1.5, 1.0, 1.5])).all()
    assert (train.targets[:, :3] == 0).all() and torch.equal(train.targets[:, 3:], kovasznay(train.inputs[:, 2:]))


def test_a_tagger_sees_both_sides() -> None:
    torch.manual_seed(0)
    model, signs = Tagger(4, 3, 4, 6), torch.randint(4, (2, 9))
    before = model(signs)
    assert before.shape == (2, 3, 9)
    for place in (0, 8):
        changed = signs.clone()
        changed[:, place] = (changed[:, place] + 1) % 4
        assert ((model(changed) - before).abs().amax((0, 1)) > 0).all()


def test_ranking_is_the_difference_of_two_scores() -> None:
    torch.manual_seed(0)
    model = PairwiseRanking(5, 7, 3, 4)
    torch.nn.init.normal_(model.popularity.weight)
    codes = torch.tensor([[4, 2, 6, 0, 1], [0, 3, 1, 2, 2]])
    found = model(codes)
    for row, (user, song, other, genre, its) in zip(found, codes.tolist(), strict=True):
        scores = [
            model.listeners.weight[user] @ (model.songs.weight[s] + model.genres.weight[k]) + model.popularity.weight[s, 0]
            for s, k in ((song, genre), (other, its))
        ]
        torch.testing.assert_close(row[0], scores[0] - scores[1])
    torch.testing.assert_close(model(codes[:, [0, 2, 1, 4, 3]]), -found)
    torch.testing.assert_close(order_loss(found, found), -found.sigmoid().log().mean())


def test_the_tuned_transformer_trains_its_loras_and_its_head() -> None:
    workload = MEMBERS["vision transformer with LoRA, to clocks"].workload()
    first, second = workload.make(), workload.make()
    moving = {name for name, p in first.named_parameters() if p.requires_grad}
    assert moving == {n for n, _ in first.named_parameters() if ".down." in n or ".up." in n or n.startswith("head.")}
    # What was trained before is the same each time; the rest is drawn anew.
    others = dict(second.named_parameters())
    assert all(torch.equal(p, others[name]) for name, p in first.named_parameters() if name not in moving)
    assert not torch.equal(first.get_parameter("head.weight"), second.get_parameter("head.weight"))
    assert sum(isinstance(m, LoRA) for m in first.modules()) == 1 + 2 * 6
