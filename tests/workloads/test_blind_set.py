"""The seventh set of the pool: its data are what their words say, and its models compute what theirs say."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from precond.lab.workloads.catalog import load_data
from precond.lab.workloads.pool import POOL
from precond.lab.workloads.pool.blind import networks, pictures, readers, tables, texts, vision
from precond.lab.workloads.pool.blind.members import DEVIATION, PIXELS, bound_loss

MEMBERS = {member.name: member for member in POOL}


def test_bicycles_are_rented_on_the_way_to_offices_and_seldom_in_rain() -> None:
    found = tables.rentals(5, 20000)
    hour, temperature, *_, sky, weekday, station = found.inputs.T
    count, office, works = found.targets[:, 0], station < tables.OFFICES, weekday < 5
    for column, values in ((sky, tables.SKIES), (weekday, tables.WEEKDAYS), (station, tables.STATIONS)):
        assert column.unique().tolist() == list(range(values))
    rush, noon = (hour - 8).abs() <= 1, (hour - 13).abs() <= 1
    medians = [count[office & works & when].median().item() for when in (rush, noon, hour < 4)]
    assert medians[0] > medians[1] + 0.5 > medians[2] + 1
    at_parks = [count[~office & works & when].median().item() for when in (rush, noon)]
    assert medians[0] - medians[1] > at_parks[0] - at_parks[1] + 1
    assert count[~office & ~works & noon].median() > count[~office & ~works & rush].median() + 0.5
    warm = (temperature - 20).abs() < 5
    assert count[warm & (sky == 0)].mean() > count[warm & (sky == 3)].mean() + 0.5


def test_it_gets_colder_when_the_pressure_has_fallen_and_warmer_in_the_morning() -> None:
    found = tables.weather(5, 4000)
    assert found.inputs.shape == (4000, tables.HOURS, 6)
    _, pressure, _, wind, sine, cosine = found.inputs[:, 12].T
    warmer = found.targets[:, 12, 0]
    hour = torch.atan2(sine, cosine) * 12 / torch.pi % 24
    assert warmer[(hour > 6) & (hour < 10)].mean() > warmer[(hour > 16) & (hour < 20)].mean() + 1
    storm = (pressure < -1) & (wind > 1)
    assert storm.sum() > 50 and warmer[storm].mean() < warmer[~storm].mean() - 0.5
    # The target is the temperature three hours on less that of now, up to its noise, a shift and a scale.
    alike = []
    for ahead in (2, 3, 4):
        later = found.inputs[:, ahead:, 0] - found.inputs[:, :-ahead, 0]
        alike.append(torch.corrcoef(torch.stack([later.flatten(), found.targets[:, :-ahead, 0].flatten()]))[0, 1].item())
    assert alike[1] > 0.98 and alike[1] == max(alike)


def test_the_front_lacks_nothing_of_the_equation_with_its_own_rates() -> None:
    torch.manual_seed(0)
    points = torch.rand(50, 2, dtype=torch.float64) * torch.tensor([12.0, 2.0]) - torch.tensor([4.0, 0.0])
    u, rest = networks.lacking(tables.front, points, tables.DIFFUSION, tables.GROWTH)
    torch.testing.assert_close(u, tables.front(points))
    torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-12)
    for wrong in ((tables.DIFFUSION / 2, tables.GROWTH), (tables.DIFFUSION, 2 * tables.GROWTH)):
        assert networks.lacking(tables.front, points, *wrong)[1].abs().max() > 0.03
    data, model = tables.invasion(5, 4000), networks.Invasion(tables.LOW, tables.HIGH, 8, 8)
    noise = data.targets[:, :1] - tables.front(data.inputs)
    assert noise.std().item() == pytest.approx(0.02, rel=0.1) and not data.targets[:, 1].any()
    loss = F.mse_loss(model(data.inputs[:50]), data.targets[:50])
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in (model.log_diffusion, model.log_growth))


def test_films_are_watched_by_who_watched_others_of_their_genre() -> None:
    found = tables.films(5, 40000)
    numbers, shown, genre, _, _, watched = found.inputs.split((2, 1, 1, 1, 1, tables.WATCHED), 1)
    assert numbers.mean(0).abs().max() < 1e-3 and 0.3 < found.targets.float().mean() < 0.7
    ordered = watched.sort(1).values
    assert (ordered[:, 1:] != ordered[:, :-1]).all()  # nothing is watched twice
    of_film = torch.full((tables.FILMS,), -1.0)
    of_film[shown[:, 0].long()] = genre[:, 0]
    assert torch.equal(of_film[shown[:, 0].long()], genre[:, 0])  # a film has one genre
    alike = (of_film[watched.long()] == genre).sum(1)
    assert found.targets[alike >= 2].float().mean() > found.targets[alike == 0].float().mean() + 0.1


def test_shapes_of_signs_are_what_they_are_called() -> None:
    """Areas by counting points of a fine grid, against those of geometry."""
    x, y = pictures.grid(1000)
    outlines, symbols = pictures.sign_shapes(1.5 * x, 1.5 * y)
    areas = [(shape > 0).float().mean().item() * 9 for shape in (*outlines, *symbols)]
    base = 0.5 * 1.9 / 0.8
    cross = 2 * 4 * 0.16 * 0.6 - 4 * 0.16**2
    exact = [torch.pi, 1.9 * base, 2 * 1.1**2, 4 * 0.2 * 0.55, 4 * 0.2 * 0.55, cross]
    assert areas == pytest.approx(exact, rel=0.01)
    bar, stroke, _ = symbols > 0
    assert torch.equal(bar, stroke.T) and bar[500].sum() > 2 * bar[:, 500].sum()


def test_flowers_have_their_petals() -> None:
    """Around the middle of a flower its distance to the edge has as many waves: the largest entry of a Fourier transform."""
    found = pictures.flowers(5, 300, noise=0.0)
    assert found.inputs.shape == (300, 3, 20, 20) and set(found.targets.tolist()) == set(range(len(pictures.PETALS)))
    clear = (found.inputs - found.inputs[:, :, :1, :1]).abs().amax(1)
    flower = (clear > 0.5 * clear.flatten(1).amax(1)[:, None, None]).float()
    x, y = pictures.grid(20)
    area = flower.sum((1, 2))
    middle_x, middle_y = ((flower * a).sum((1, 2)) / area for a in (x, y))
    angle = torch.atan2(y - middle_y[:, None, None], x - middle_x[:, None, None])
    waves = torch.stack([((flower * torch.polar(torch.ones(()), k * angle)).sum((1, 2)).abs()) for k in pictures.PETALS], 1)
    hits = (waves.argmax(1) == found.targets).float().mean()
    assert hits > 0.8


def test_faces_are_pictures_of_something_bright_with_dark_eyes() -> None:
    images = pictures.faces(5, 500)
    assert images.shape == (500, 1, 16, 16) and images.min() >= 0 and images.max() <= 1
    mean = images.mean((0, 1))
    assert mean[9, 7:9].min() > mean[:, 0].max() + 0.3  # the nose, and the left edge
    eyes = mean[6:8]
    assert eyes[:, 5].mean() < eyes[:, 7].mean() - 0.03 and eyes[:, 10].mean() < eyes[:, 8].mean() - 0.03
    # All of a face can be told from eight numbers and more, not from one.
    values = torch.linalg.svdvals(images.flatten(1) - images.flatten(1).mean(0)).square()
    assert values[0] < 0.7 * values.sum() and values[:8].sum() > 0.7 * values.sum()


def test_noise_and_time_give_back_the_digits() -> None:
    parts = pictures.diffused(5, 2)
    for name, digits in load_data("digits").parts.items():
        pixels, t = parts[name].inputs.split((64, 1), 1)
        near = t[:, 0] < 0.8
        turn, ε = torch.pi * t[near] / 2, parts[name].targets.flatten(1)[near]
        x = (pixels[near] - turn.sin() * ε) / turn.cos()
        torch.testing.assert_close(x, (digits.inputs.flatten(1) / 8 - 1).repeat(2, 1)[near], rtol=0, atol=1e-5)
    noise = parts["train"].targets
    assert noise.mean().abs() < 0.01 and noise.std().item() == pytest.approx(1, abs=0.01)


def test_tokens_are_those_of_the_tokenizer() -> None:
    source = "def f(x):\n    # nothing\n\n    return x.y + 12 if x else 'a b'\n"
    assert list(texts.tokens(source)) == [
        "def", "f", "(", "x", ")", ":", "new line", "indent",
        "return", "x", ".", "y", "+", "number", "if", "x", "else", "string", "new line", "dedent",
    ]  # fmt: skip
    parts = texts.packages(40)
    counts = parts["train"].inputs.flatten().bincount(minlength=texts.KINDS + 1)
    assert len(counts) == texts.KINDS + 1 and counts.min() > 0 and counts[1] > counts[10] > counts[100]
    for part in parts.values():
        assert torch.equal(part.inputs[:, 1:], part.targets[:, :-1])


def test_lines_of_logs_follow_their_services() -> None:
    patterns = {"{w}": r"[a-z]+", "{n}": r"\d+", "{a}": r"10\.\d+\.\d+", "{h}": r"[0-9a-f]{8}"}

    def pattern(line: str) -> str:
        parts = re.split(r"(\{.\})", line)
        return "".join(patterns.get(part, re.escape(part)) for part in parts)

    for services in (texts.KNOWN, texts.NEW):
        whole, worn = (texts.logs(5, 300, services, lost) for lost in (0.0, 0.15))
        for row, kind in zip(whole.inputs.tolist(), whole.targets.tolist(), strict=True):
            line = "".join(texts.SIGNS[i] for i in row).rstrip("\0")
            if len(line) < texts.LENGTH:
                assert any(re.fullmatch(rf"\d\d:\d\d {pattern(form)}", line) for form in texts.LINES[services[kind]]), line
        assert set(whole.targets.tolist()) == set(range(6))
        assert (worn.inputs == 0).float().mean() > (whole.inputs == 0).float().mean() + 0.05
    assert not set(texts.KNOWN) & set(texts.NEW) and len(texts.KNOWN + texts.NEW) == len(texts.LINES)


def test_the_bound_is_the_divergence_and_the_squares_of_pixels() -> None:
    torch.manual_seed(0)
    images, outputs = torch.rand(3, 1, 16, 16), torch.randn(3, PIXELS + 10)
    normal = torch.distributions.Normal(outputs[:, PIXELS : PIXELS + 5], (outputs[:, PIXELS + 5 :] / 2).exp())
    divergence = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum()
    density = torch.distributions.Normal(outputs[:, :PIXELS], DEVIATION).log_prob(images.flatten(1)).mean()
    peak = torch.distributions.Normal(0.0, DEVIATION).log_prob(torch.zeros(()))
    torch.testing.assert_close(bound_loss(outputs, images), peak - density + divergence / images.numel())


def test_every_column_is_a_token_of_its_own() -> None:
    torch.manual_seed(0)
    model = networks.FTTransformer(2, (3, 4), 8, 1, 2).eval()
    columns = torch.tensor([[0.5, -1.0, 2, 1]])
    seen: list[torch.Tensor] = []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(columns)
    (tokens,) = seen
    exact = [
        model.class_token,
        0.5 * model.weight[0] + model.bias[0],
        -1.0 * model.weight[1] + model.bias[1],
        model.table.weight[2] + model.bias[2],
        model.table.weight[3 + 1] + model.bias[3],
    ]
    torch.testing.assert_close(tokens[0], torch.stack(exact))


def test_dlrm_multiplies_each_two_of_its_vectors() -> None:
    torch.manual_seed(0)
    model = networks.DLRM(2, (5, 4), 3, 8)
    row = torch.tensor([[0.3, -0.2, 1, 3, 0, 4, 4]])
    seen: list[torch.Tensor] = []
    model.top.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(row)
    dense = model.bottom(row[:, :2])[0]
    bag = (model.bag.weight[0] + 2 * model.bag.weight[4]) / 3
    vectors = (dense, bag, model.tables[0].weight[1], model.tables[1].weight[3])
    exact = torch.stack([a @ b for a, b in itertools.combinations(vectors, 2)])
    torch.testing.assert_close(seen[0][0], torch.cat([dense, exact]))


def test_a_selective_recurrence_is_its_sum_over_the_past() -> None:
    """yₜ = Σₛ≤ₜ Cₜ·exp(A Σ Δ over s+1…t) Δₛ Bₛ uₛ + D uₜ, all at once in float64."""
    torch.manual_seed(0)
    layer, x = networks.Selective(6, 8, 3, 2).double(), torch.randn(2, 7, 6, dtype=torch.float64)
    u, gate = layer.in_proj(x).chunk(2, 2)
    u = F.silu(F.conv1d(F.pad(u.transpose(1, 2), (3, 0)), layer.conv.weight, layer.conv.bias, groups=8).transpose(1, 2))
    low, b, c = layer.x_proj(u).split([2, 3, 3], 2)
    step = F.softplus(layer.dt_proj(low))
    total, y = step.cumsum(1), layer.D * u
    for t in range(7):
        for s in range(t + 1):
            kept = ((total[:, t] - total[:, s])[..., None] * -layer.A_log.exp()).exp()
            y[:, t] = y[:, t] + (c[:, t, None] * kept * b[:, s, None]).sum(2) * step[:, s] * u[:, s]
    torch.testing.assert_close(layer(x), layer.out_proj(y * F.silu(gate)))
    assert F.softplus(layer.dt_proj.bias).min() > 0.0009 and F.softplus(layer.dt_proj.bias).max() < 0.11


def test_shifted_windows_see_their_neighbors_alone() -> None:
    """A token sees those of its window, which is cut where the shifted picture is closed to a torus."""
    torch.manual_seed(0)
    for shift in (0, 2):
        block, x = vision.SwinBlock(8, 2, 8, 4, shift), torch.randn(1, 8, 8, 8)
        nn.init.normal_(block.attention.bias)
        region = [(i + 4 - shift) // 4 if shift else i // 4 for i in range(8)]
        for i, j in ((0, 0), (1, 5), (3, 3), (7, 2)):
            changed = x.clone()
            changed[0, i, j] += torch.randn(8)
            moved = (block(changed) - block(x)).abs().amax(3)[0] > 1e-7
            exact = [[region[a] == region[i] and region[b] == region[j] for b in range(8)] for a in range(8)]
            assert moved.tolist() == exact


def test_windows_know_relative_places() -> None:
    """Without it attention within a window has no order; with it, scores differ by rows and columns apart."""
    torch.manual_seed(0)
    attention = vision.WindowAttention(8, 2, 3)
    at = list(itertools.product(range(3), range(3)))
    for (p, a), (q, b) in itertools.product(enumerate(at), repeat=2):
        assert attention.places[p, q] == (a[0] - b[0] + 2) * 5 + a[1] - b[1] + 2
    x, order = torch.randn(2, 9, 8), torch.randperm(9)
    assert not torch.allclose(attention(x[:, order]), attention(x)[:, order], atol=1e-4)
    nn.init.zeros_(attention.bias)
    torch.testing.assert_close(attention(x[:, order]), attention(x)[:, order])


def test_queries_of_all_heads_meet_one_key() -> None:
    torch.manual_seed(0)
    layer, x = readers.MultiQueryAttention(12, 3, 6), torch.randn(2, 6, 12)
    k, v = layer.keys(x).chunk(2, 2)
    q, heads = layer.queries(x).split(4, 2), []
    for head in q:
        scores = layer.turned(head) @ layer.turned(k).transpose(1, 2) / 2
        heads.append(scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf).softmax(2) @ v)
    torch.testing.assert_close(layer(x), layer.out(torch.cat(heads, 2)))
    a, b = torch.randn(2, 1, 1, 4).expand(2, 1, 6, 4)
    turned = (layer.turned(a) @ layer.turned(b).transpose(1, 2))[0]
    torch.testing.assert_close(turned[1:, 1:], turned[:-1, :-1])  # the same for the same distance
    assert not torch.allclose(turned[0], turned[1], atol=1e-3)


def test_an_encoder_knows_the_order_by_distances_alone() -> None:
    torch.manual_seed(0)
    model, signs, order = readers.T5Encoder(7, 3, 8, 2, 2, reach=3), torch.randint(7, (4, 10)), torch.randperm(10)
    seen: list[torch.Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    assert not torch.allclose(model(signs[:, order]), model(signs), atol=1e-4)
    for i, j in itertools.product(range(10), repeat=2):
        assert torch.equal(seen[0][:, i, j], model.relative.weight[min(max(j - i, -3), 3) + 3])
    with torch.no_grad():
        model.relative.weight.copy_(model.relative.weight[:1].expand(7, -1))  # the same for all distances
    torch.testing.assert_close(model(signs[:, order]), model(signs))
    attention, x = readers.T5Attention(8, 2), torch.randn(1, 5, 8)
    bias, heads = torch.randn(2, 5, 5), []
    for i in range(2):
        q, k, v = (layer(x)[0, :, 4 * i : 4 * i + 4] for layer in (attention.q, attention.k, attention.v))
        heads.append((q @ k.T + bias[i]).softmax(1) @ v)
    torch.testing.assert_close(attention(x, bias)[0], attention.o(torch.cat(heads, 1)))


def test_the_noise_is_told_from_the_time_too() -> None:
    torch.manual_seed(0)
    model, pixels = vision.NoiseUNet(8, 16), torch.randn(3, 65)
    later = torch.cat([pixels[:, :64], pixels[:, 64:] + 0.3], 1)
    assert model(pixels).shape == (3, 1, 8, 8) and not torch.allclose(model(later), model(pixels), atol=1e-4)


def test_squeeze_and_excitation_scales_whole_channels() -> None:
    torch.manual_seed(0)
    layer, x = vision.SqueezeExcitation(6, 3), torch.randn(2, 6, 4, 4)
    scale = layer(x) / x
    torch.testing.assert_close(scale, scale[..., :1, :1].expand_as(scale))
    h = F.relu(F.linear(x.mean((2, 3)), layer.squeeze.weight[..., 0, 0], layer.squeeze.bias))
    exact = F.relu6(F.linear(h, layer.excite.weight[..., 0, 0], layer.excite.bias) + 3) / 6
    torch.testing.assert_close(scale[..., 0, 0], exact)


def test_dora_begins_as_the_frozen_layer_and_is_its_direction_times_a_magnitude() -> None:
    torch.manual_seed(0)
    frozen, x = nn.Linear(5, 4, bias=False), torch.randn(3, 5)
    layer = readers.DoRA(frozen, 2, 4)
    torch.testing.assert_close(layer(x), frozen(x))
    nn.init.normal_(layer.B)
    nn.init.uniform_(layer.magnitude)
    moved = frozen.weight + 2 * layer.B @ layer.A
    torch.testing.assert_close(layer(x), F.linear(x, F.normalize(moved)) * layer.magnitude)


def test_the_tuned_encoder_keeps_all_but_dora_and_its_head() -> None:
    workload = MEMBERS["encoder with relative positions tuned with DoRA, to other logs"].workload()
    first, second = workload.make(), workload.make()
    moving = {name for name, p in first.named_parameters() if p.requires_grad}
    layers = [f"blocks.{i}.{name}" for i in range(2) for name in ("attention.q", "attention.v", "wi", "wo")]
    assert moving == {"head.weight", "head.bias", *(f"{layer}.{p}" for layer in layers for p in ("A", "B", "magnitude"))}
    others = dict(second.named_parameters())
    assert {name for name, p in first.named_parameters() if not torch.equal(p, others[name])} == {
        "head.weight",
        "head.bias",
        *(f"{layer}.A" for layer in layers),
    }
