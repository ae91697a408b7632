"""The fifth set of the pool: its data are what their words say, and its models compute what theirs say."""

import itertools
from datetime import date

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from precond.lab.workloads.pool import POOL
from precond.lab.workloads.pool.sealed import networks, pictures, sequences, texts
from precond.lab.workloads.pool.sealed.members import among_others_loss
from precond.lab.workloads.text import ALPHABET

MEMBERS = {member.name: member for member in POOL}


def test_cells_are_brighter_than_their_ground() -> None:
    found = pictures.cells(5, 500)
    inside = found.targets == 1
    assert set(found.targets.unique().tolist()) == {0.0, 1.0} and 0.05 < inside.float().mean() < 0.4
    both = inside.flatten(1).any(1)
    means = [((found.inputs * m).sum((1, 2, 3)) / m.sum((1, 2, 3)).clamp_min(1))[both] for m in (inside, ~inside)]
    assert (means[0] > means[1]).float().mean() > 0.9


def test_galaxies_are_of_their_kind() -> None:
    """In the mean over all places and angles, light falls off with the distance as the kind says."""
    found = pictures.galaxies(5, 3000)
    x, y = pictures.grid(pictures.GALAXY_SIDE)
    r = (x.square() + y.square()).sqrt()
    means = {kind: found.inputs[found.targets == k, 0].mean(0) for k, kind in enumerate(pictures.GALAXIES)}
    near, far = ({kind: mean[at].mean().item() for kind, mean in means.items()} for at in (r < 0.2, (r > 0.35) & (r < 0.6)))
    assert all((far[kind] > near[kind]) == (kind == "ring") for kind in pictures.GALAXIES)
    assert far["pair"] > far["spiral"] > far["elliptical"] and min(far, key=far.__getitem__) == "edge-on"


def test_displays_light_the_segments_of_their_digits() -> None:
    """Least squares for the light of each segment, as the mean image of each digit shows it: seven segments explain sixteen digits."""
    found = pictures.displays(5, 8000)
    means = torch.stack([found.inputs[found.targets == k, 0].mean(0).flatten() for k in range(16)]).double()
    lit = torch.tensor([[1.0, *(name in segments for name in "abcdefg")] for segments in pictures.LIT], dtype=torch.float64)
    fit = torch.linalg.lstsq(lit, means).solution
    left, spread = (means - lit @ fit).square().sum(), (means - means.mean(0)).square().sum()
    assert left < 0.05 * spread
    x, y = (axis.flatten().double() for axis in pictures.grid(pictures.DISPLAY_SIDE))
    where = torch.stack(
        [torch.stack([(light * x).sum(), (light * y).sum()]) / light.sum() for light in fit[1:].clamp_min(0.1) - 0.1]
    )
    ax, ay, bx, by = pictures.ENDS.T
    assert torch.equal(where[:6, 0].gt(0.08), (ax + bx)[:6] > 0) and torch.equal(where[:6, 1].gt(0.1), (ay + by)[:6] > 0)


def test_costs_have_heavy_tails_and_follow_from_their_columns() -> None:
    found = sequences.claims(5, 6000)
    numbers = found.inputs
    assert (numbers > 0).all() and (numbers[:, 1] <= numbers[:, 0] - 18).all()
    assert (numbers[:, [3, 6]].amax(0) > 8 * numbers[:, [3, 6]].median(0).values).all()
    cost = found.targets[:, 0]
    # A normal one has its furthest of 6,000 at 4 standard deviations.
    assert (cost - cost.median()).abs().max() > 3 * (cost.quantile(0.84) - cost.quantile(0.16))
    young = numbers[:, 0] < 25
    assert cost[young].median() > cost[~young].median() + 0.3


def test_dates_are_read_as_they_are_written() -> None:
    found = sequences.dates(5, 400)
    days = set[date]()
    for row, target in zip(found.inputs.tolist(), found.targets.tolist(), strict=True):
        day = date.fromisoformat("".join(sequences.READ[i] for i in target))
        source = "".join(sequences.WRITTEN[i] for i in row[: sequences.SOURCE]).rstrip()
        assert source in {sequences.written(day, form) for form in range(5)} and str(day.year) in source
        assert row[sequences.SOURCE :] == [sequences.START, *target[:-1]]
        days.add(day)
    assert len(days) == 400
    longest = max(len(sequences.written(date(2000, month, 28), form)) for month in range(1, 13) for form in range(5))
    assert longest == sequences.SOURCE


def test_demand_has_the_period_of_a_day() -> None:
    found = sequences.demand(5, 2000)
    series = torch.cat([found.inputs[:, :, 0], found.targets], 1)
    assert found.targets.shape == (2000, 12) and series.std().item() == pytest.approx(1, abs=1e-3)
    series = series - series.mean(1, keepdim=True)
    alike = [(series[:, lag:] * series[:, : -lag or None]).mean().item() for lag in range(25)]
    assert max(alike[6:], key=lambda c: c) in (alike[12], alike[24]) and alike[12] > 0.5 * alike[0] and alike[9] < 0
    assert sequences.bump(torch.tensor([0.0, 24.0, -24.0]), 2.0).tolist() == [1.0, 1.0, 1.0]


def test_pushed_pendulums_follow_their_equation() -> None:
    """scipy's integrator at 1e-10, the force between its places by a cubic; Runge-Kutta's steps of h = 0.05 err by h⁴ = 6e-6 or so."""
    integrate = pytest.importorskip("scipy.integrate", reason="scipy is not installed")
    interpolate = pytest.importorskip("scipy.interpolate", reason="scipy is not installed")
    force, angles = sequences.forced(5, 3)
    for f, θ in zip(force.numpy(), angles, strict=True):
        at = interpolate.CubicSpline([3 * i / 120 for i in range(121)], f)
        times = [3 * i / 60 for i in range(61)]
        exact = integrate.solve_ivp(
            lambda t, s, at=at: [s[1], at(t) - torch.tensor(s[0]).sin().item()],
            (0, 3),
            [0, 0],
            t_eval=times,
            rtol=1e-10,
            atol=1e-10,
        )
        torch.testing.assert_close(θ, torch.from_numpy(exact.y[0]), rtol=0, atol=1e-4)
    found = sequences.pendulums(5, 3)
    assert found.inputs.shape == (3, 49) and found.targets.shape == (3, 8)
    asked = (found.inputs[:, 41:] * 60).round().long()
    torch.testing.assert_close(found.targets, (angles / angles.std()).float().gather(1, asked))


def test_customers_buy_by_taste_and_nothing_twice() -> None:
    found = sequences.purchases(5)
    customer, country, good, category = (found.inputs[:, i].long() for i in (0, 1, 4, 5))
    assert len(torch.stack([customer, good], 1).unique(dim=0)) == len(found) == sequences.CUSTOMERS * sequences.EACH
    for code, kind in ((customer, country), (good, category)):
        assert len(torch.stack([code, kind], 1).unique(dim=0)) == len(code.unique())
    # Countrymen buy of the same categories more often than others do.
    shares = torch.zeros(sequences.COUNTRIES, sequences.CATEGORIES).index_put_(
        (country, category), torch.ones(len(found)), True
    )
    rows = shares / shares.sum(1, keepdim=True)
    assert (rows - rows.mean(0)).abs().sum(1).mean() > 0.3


def test_signs_are_in_the_tokens_that_they_are_said_to_be_in() -> None:
    source = 'def f(x):  # why\n    return "a b" + str(10)\n'
    told = [sequences.TOKENS[int(i)] for i in sequences.highlighted(source, len(source))]
    kinds = [
        (kind, "".join(sign for sign, _ in run))
        for kind, run in itertools.groupby(zip(source, told, strict=True), lambda p: p[1])
    ]
    words = [(kind, text) for kind, text in kinds if kind != "space"]
    assert words == [
        ("keyword", "def"), ("name", "f"), ("operator", "("), ("name", "x"), ("operator", "):"), ("comment", "# why"), ("keyword", "return"),
        ("string", '"a b"'), ("operator", "+"), ("name", "str"), ("operator", "("), ("number", "10"), ("operator", ")"),
    ]  # fmt: skip
    part = sequences.tokens(40)["train"]
    names = part.targets == sequences.TOKENS.index("name")
    assert all(ALPHABET[i].isalnum() or ALPHABET[i] == "_" for i in part.inputs[names].tolist())
    hidden = sequences.masked(part, 3)
    at = hidden.inputs == sequences.MASK
    assert at.float().mean().item() == pytest.approx(0.15, abs=0.01) and torch.equal(hidden.targets != -100, at)
    assert torch.equal(torch.where(at, hidden.targets, hidden.inputs), part.inputs)


def test_docstrings_are_prose() -> None:
    text = "".join(ALPHABET[i] for part in sequences.docstrings(40).values() for i in part.inputs.flatten().tolist())
    assert len(text) > 100_000 and text.count(" the ") > 800 and text.count("    def ") < 100


def test_a_gated_recurrence_is_one_step_after_the_other() -> None:
    """A loop over places in float64."""
    torch.manual_seed(0)
    model = texts.GatedRecurrence(5).double()
    x = torch.randn(3, 13, 5, dtype=torch.float64)
    kept, h, rows = model.decay.sigmoid(), torch.zeros(3, 5, dtype=torch.float64), []
    for place in x.unbind(1):
        a = kept ** (8 * torch.sigmoid(model.recurrence_gate(place)))
        h = a * h + (1 - a.square()).sqrt() * torch.sigmoid(model.input_gate(place)) * place
        rows.append(h)
    torch.testing.assert_close(model(x), torch.stack(rows, 1), rtol=1e-10, atol=1e-12)


def test_a_translator_sees_all_of_the_source_and_of_the_target_what_is_written() -> None:
    torch.manual_seed(0)
    model = texts.Translator(9, 5, 4, 6, 16, 1, 2)
    signs = torch.randint(5, (2, 10))
    before = model(signs)
    assert before.shape == (2, 5, 6)
    for place in (0, 3):
        changed = signs.clone()
        changed[:, place] += 1
        assert ((model(changed) - before).abs().amax((0, 1)) > 0).all()
    changed = signs.clone()
    changed[:, 4 + 3] = (changed[:, 4 + 3] + 1) % 5
    assert torch.allclose(model(changed)[..., :3], before[..., :3], atol=1e-6) and not torch.allclose(
        model(changed)[..., 3:], before[..., 3:]
    )


def test_a_convnext_block_begins_as_the_identity_and_stages_halve() -> None:
    torch.manual_seed(0)
    block, x = networks.ConvNeXtBlock(6, 5), torch.randn(2, 6, 4, 4)
    assert torch.allclose(block(x), x, atol=1e-4) and not torch.equal(block(x), x)
    normed = networks.ChannelNorm(6)(x)
    torch.testing.assert_close(normed.mean(1), torch.zeros(2, 4, 4), rtol=0, atol=1e-5)
    model = networks.ConvNeXt(3, 4)
    assert model.stage2(model.downsample(model.stage1(model.stem(torch.randn(1, 1, 20, 20))))).shape == (1, 8, 5, 5)


def test_a_u_net_and_a_vit_behind_convolutions_have_their_shapes() -> None:
    torch.manual_seed(0)
    model = networks.UNet(4, 6, 8).eval()
    x = torch.randn(2, 1, 12, 12)
    assert model(x).shape == x.shape and len(model.down) == len(model.up) == 2
    vit = networks.StemmedViT(7, 16, 8, 1, 2)
    assert vit.stem(torch.randn(2, 1, 16, 16)).shape == (2, 8, 4, 4) and vit(torch.randn(2, 1, 16, 16)).shape == (2, 7)


def test_a_forecaster_goes_on_from_its_own_values() -> None:
    torch.manual_seed(0)
    model, series = networks.Forecaster(6, 3), torch.randn(4, 5, 1)
    state, value, rows = model.encoder(series)[1][0], series[:, -1], []
    for _ in range(3):
        state = model.decoder(value, state)
        value = value + model.head(state)
        rows.append(value[:, 0])
    torch.testing.assert_close(model(series), torch.stack(rows, 1))
    torch.testing.assert_close(
        model(series)[:, :1] - series[:, -1], model.head(model.decoder(series[:, -1], model.encoder(series)[1][0]))
    )


def test_a_deeponet_is_a_product_of_its_nets() -> None:
    torch.manual_seed(0)
    model, x = networks.DeepONet(5, 8, 4), torch.randn(3, 7)
    nn.init.constant_(model.bias, 0.3)
    for i, j in itertools.product(range(3), range(2)):
        expected = model.branch(x[i, :5]) @ model.trunk(x[i, 5 + j : 6 + j]) + 0.3
        torch.testing.assert_close(model(x)[i, j], expected)


def test_towers_score_all_pairs_of_a_batch() -> None:
    torch.manual_seed(0)
    model = networks.FeatureTowers((5, 3), (6, 2), 4)
    x = torch.cat(
        [
            torch.tensor([[4.0, 2], [0, 1], [3, 0]]),
            torch.randn(3, 2),
            torch.tensor([[5.0, 1], [2, 0], [0, 1]]),
            torch.randn(3, 2),
        ],
        1,
    )
    found = model(x)
    for i, j in itertools.product(range(3), range(3)):
        pair = torch.cat([x[i, :4], x[j, 4:]])[None]
        torch.testing.assert_close(found[i, j], model(pair)[0, 0])
    left, right = model.customers(x[:, :4]), model.goods(x[:, 4:])
    torch.testing.assert_close(found, 10 * F.cosine_similarity(left[:, None], right[None], dim=2))
    torch.testing.assert_close(among_others_loss(found, found), -found.log_softmax(1).diagonal().mean())


def test_the_tuned_encoder_trains_its_adapters_its_norms_and_its_head() -> None:
    workload = MEMBERS["text encoder tuned with adapters, to kinds of tokens"].workload()
    first, second = workload.make(), workload.make()
    moving = {name for name, p in first.named_parameters() if p.requires_grad}
    assert moving == {
        n for n, _ in first.named_parameters() if ".down." in n or ".up." in n or "norm" in n or n.startswith("head.")
    }
    others = dict(second.named_parameters())
    assert all(torch.equal(p, others[name]) for name, p in first.named_parameters() if name not in moving)
    assert not torch.equal(first.get_parameter("head.weight"), second.get_parameter("head.weight"))
    adapters = [m for m in first.modules() if isinstance(m, texts.Adapter)]
    x = torch.randn(2, 48)
    assert len(adapters) == 2 * 2 and all(torch.equal(adapter(x), x) for adapter in adapters)
