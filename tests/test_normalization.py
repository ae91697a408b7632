"""Normalized data, folded normalizations and their maps: the same function, to rounding."""

from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from precond import Fixed, PreconditionedGD
from precond.algebra import vec
from precond.analysis.normalization import ChannelPad, MinMax, SampleScaling, Standardize, collapse_affine, fold_batchnorm

torch.set_num_threads(1)


def raw(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    """Features (the second dimension) of very different means and scales."""
    make = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 2, shape[1], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 2))
    return ((torch.randn(*shape, generator=make, dtype=torch.float64) + 2) * scale).to(dtype)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * max(1.0, b.detach().abs().max().item()))


# Statistics


@pytest.mark.parametrize("dim", [None, 1, -1])
@pytest.mark.parametrize("shape", [(20, 4), (20, 4, 3)])
def test_statistics_are_those_of_all_samples(shape, dim):
    x = raw(*shape)
    rows = x if dim is None else x.movedim(dim, -1).reshape(-1, x.shape[dim])
    batches = [x[:3], x[3:4], (x[4:], torch.zeros(16))]
    for data in (lambda: x, lambda: batches, lambda: iter(batches)):
        s, m = Standardize(dim).fit(data()), MinMax(dim).fit(data())
        same(m.offset, rows.amin(0)), same(m.width, rows.amax(0) - rows.amin(0))
        same(s.offset, rows.mean(0)), same(s.width, rows.std(0, correction=0))
    same(s.inverse(s.transform(x)), x)
    same(m.inverse(m(x)), x)


def test_theorem_4_and_after():
    """Rows of the extended standardized data have norm √N; entries after min–max lie in [0, 1]."""
    x = raw(50, 6)
    norms = torch.linalg.vector_norm(Standardize().fit(x)(x), dim=0)
    same(norms, torch.full_like(norms, math.sqrt(50)))
    y = MinMax().fit(x)(x)
    assert y.min() == 0 and y.max() == 1

    def kappa(rows):
        s = torch.linalg.svdvals(torch.cat([torch.ones(len(rows), 1).double(), rows], 1))
        return s[0] / s[-1]

    assert kappa(Standardize().fit(x)(x)) < kappa(x - x.mean(0)) <= kappa(x)


def test_large_means_and_constant_features():
    x = torch.randn(1000, 2) + torch.tensor([1e4, 0.0])
    x = torch.cat([x, torch.full((1000, 1), 0.1)], 1)
    s = Standardize().fit(list(x.split(7)))
    exact = x.double()
    torch.testing.assert_close(s.width[:2].double(), exact.std(0, correction=0)[:2], rtol=1e-6, atol=0)
    assert s.width[2] == 1 and (s(x)[:, 2].abs() < 1e-7).all() and MinMax().fit(x).width[2] == 1
    assert s.offset.dtype == torch.float32 and s(x.double()).dtype == torch.float64


def test_integers_and_images():
    x = torch.randint(0, 256, (9, 3, 5, 5), dtype=torch.uint8)
    s = Standardize(dim=1).fit(x)
    y = s(x)
    assert y.dtype == torch.float32 and y.shape == x.shape
    torch.testing.assert_close(y.transpose(0, 1).flatten(1).mean(1), torch.zeros(3), atol=1e-5, rtol=0)


def test_state_dict_round_trip():
    s = Standardize(dim=1).fit(raw(8, 3, 4))
    other = nn.Sequential(Standardize(dim=1), nn.Flatten())
    other.load_state_dict({f"0.{k}": v for k, v in s.state_dict().items()})
    assert torch.equal(other[0](raw(8, 3, 4)), s(raw(8, 3, 4))) and other[0].offset.dtype == torch.float64
    copy.deepcopy(s)(raw(8, 3, 4))
    assert not list(s.parameters())
    s.half()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Standardize(0), "dim"),
        (lambda: Standardize().fit([]), "no samples"),
        (lambda: Standardize().fit(torch.zeros(0, 3)), "no samples"),
        (lambda: Standardize().fit(torch.tensor([[1.0], [math.nan]])), "not finite"),
        (lambda: Standardize().fit([torch.zeros(2, 3), torch.zeros(2, 4)]), "batch 1"),
        (lambda: Standardize().fit([{"x": torch.zeros(2)}]), "got dict"),
        (lambda: Standardize(dim=2).fit(torch.zeros(2, 3)), "dim=2"),
        (lambda: Standardize().fit(raw(5, 3))(raw(5, 4)), "fitted to features"),
        (lambda: Standardize(1).fit(raw(5, 3))(raw(5, 4)), "fitted to features"),
        (lambda: Standardize().fit(raw(5, 3)).fold(nn.Linear(4, 1)), "4 inputs"),
        (lambda: Standardize().fit(raw(5, 3, 2, 2)).fold(nn.Conv2d(3, 1, 1)), "dim=1"),
        (lambda: Standardize().fit(raw(5, 3)).fold(nn.ReLU()), "neither"),
        (lambda: Standardize().fit(raw(5, 3)).fold(nn.utils.parametrizations.weight_norm(nn.Linear(3, 1))), "parametriz"),
        (lambda: Standardize(1).fit(raw(5, 3, 4)).fold(nn.ConvTranspose1d(3, 1, 2)), "transposed"),
        (lambda: Standardize(1).fit(raw(5, 3, 4)).map(nn.Conv1d(3, 1, 3, padding=1)), "pads with zeros"),
        (lambda: Standardize().fit(raw(5, 3)).map(nn.Linear(3, 1, bias=False)), "no bias"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_unfitted_one_says_so():
    with pytest.raises(RuntimeError, match="fit"):
        Standardize()(torch.zeros(2, 3))


# Folding into the first layer

FIRST = {
    "linear": (lambda: nn.Linear(4, 3), (4,), None),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (4,), None),
    "sequence": (lambda: nn.Linear(4, 3), (5, 4), -1),
    "flattened entries": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(24, 3)), (4, 2, 3), None),
    "flattened channels": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(24, 3)), (4, 2, 3), 1),
    "conv": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 6), 1),
    "conv, stride, groups": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, groups=2, bias=False), (4, 7, 6), 1),
    "conv, zero-padded": (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), stride=2), (4, 7, 6), 1),
    "conv, zero-padded, groups, dilation": (lambda: nn.Conv1d(4, 6, 3, padding=3, dilation=2, groups=2), (4, 9), 1),
    "conv, same": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)), (4, 7, 6), 1),
    "conv, 3d": (lambda: nn.Conv3d(4, 2, 2, padding=1), (4, 3, 3, 4), 1),
    "conv, reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 7, 6), 1),
    "conv, replicate": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"), (4, 7, 6), 1),
    "conv, circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (4, 7, 6), 1),
}


def split(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(what goes before, the layer)."""
    return (layer[0], layer[1]) if isinstance(layer, nn.Sequential) else (nn.Identity(), layer)


@pytest.mark.parametrize("kind", [Standardize, MinMax])
@pytest.mark.parametrize("name", FIRST)
def test_a_folded_first_layer_is_the_layer_on_normalized_data(name, kind):
    build, shape, dim = FIRST[name]
    torch.manual_seed(0)
    flatten, layer = split(build().double())
    x = raw(12, *shape)
    scaling = kind(dim).fit(x)
    before = copy.deepcopy(layer.state_dict())
    folded = scaling.fold(layer)
    same(folded(flatten(x)), layer(flatten(scaling(x))))
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("kind", [Standardize, MinMax])
@pytest.mark.parametrize("name", [n for n in FIRST if not any(x in n for x in ("zero", "same", "3d", "without", "groups"))])
def test_gd_on_normalized_data_is_pgd_with_the_map(name, kind):
    build, shape, dim = FIRST[name]
    torch.manual_seed(0)
    flatten, z = split(build().double())
    x = raw(12, *shape)
    scaling = kind(dim).fit(x)
    p = scaling.fold(z)  # the matching start
    P = scaling.map(p)
    start = tuple(t.detach().clone() for t in (z.weight, z.bias))
    for a, b in zip(P.mv(start), (p.weight, p.bias), strict=True):
        same(a, b.detach())
    pgd, gd = PreconditionedGD(p, 0.05, preconditioner=Fixed(P)), torch.optim.SGD(z.parameters(), lr=0.05)
    target = torch.randn_like(z(flatten(scaling(x))))
    for _ in range(10):
        for layer, data, optimizer in ((p, x, pgd), (z, scaling(x), gd)):
            optimizer.zero_grad()
            F.mse_loss(layer(flatten(data)), target).backward()
            optimizer.step()
    end = tuple(t.detach() for t in (z.weight, z.bias))
    assert vec.norm(vec.sub(start, end)) > 1e-2
    moved = vec.flatten((p.weight.detach(), p.bias.detach()))
    torch.testing.assert_close(torch.cat([t.flatten() for t in P.mv(end)]), moved, rtol=1e-9, atol=1e-9)


def test_the_map_without_a_layer():
    x = raw(10, 3)
    s = Standardize().fit(x)
    v = (torch.randn(2, 3).double(), torch.randn(2).double())
    torch.testing.assert_close(s.map().mv(v), s.map(nn.Linear(3, 2).double()).mv(v))


# Batch normalization


class Dense(nn.Module):
    """Two readers of one normalization."""

    def __init__(self):
        super().__init__()
        self.bn, self.left, self.right = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x):
        x = self.bn(x.relu())
        return self.left(x) * self.right(x)


class Branching(nn.Module):
    """Cannot be traced as a whole."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 2))

    def forward(self, x):
        return self.block(x) if x.sum() != 0 else x


BN = {
    "linear, bn": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)), (4,)),
    "linear without bias, bn without affine": (
        lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5, affine=False), nn.ReLU(), nn.Linear(5, 2)), (4,)),
    "bn, linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.BatchNorm1d(5), nn.Linear(5, 2, bias=False)), (4,)),
    "bn first": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)), (4,)),
    "bn, dropout, linear": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.BatchNorm1d(5), nn.Dropout(), nn.Identity(), nn.Linear(5, 2)), (4,)),
    "conv, bn": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4), nn.ReLU()), (2, 5, 5)),
    "transposed conv, bn": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 4, 3, stride=2, groups=2), nn.BatchNorm2d(4), nn.ReLU()), (2, 3, 3)),
    "bn, conv": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 2, groups=2)), (2, 5, 5)),
    "bn, padded conv": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1, bias=False)), (2, 5, 5)),
    "bn, circular conv": (lambda: nn.Sequential(
        nn.ReLU(), nn.BatchNorm1d(2), nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular")), (2, 5)),
    "bn, padded conv, bn": (lambda: nn.Sequential(
        nn.ReLU(), nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()), (2, 5, 5)),
    "bn, flatten, linear": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2)), (2, 5, 5)),
    "two readers": (Dense, (3, 5, 5)),
    "traced in parts": (Branching, (4,)),
    "3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), nn.Tanh()), (2, 3, 3, 3)),
}  # fmt: skip


def trained(build, shape, seed=0) -> tuple[nn.Module, torch.Tensor]:
    """Statistics, γ and β as after training, and data."""
    torch.manual_seed(seed)
    model = build().double().train()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine:
            nn.init.normal_(m.weight, 1, 0.7)
            nn.init.normal_(m.bias)
    for _ in range(5):
        model(raw(16, *shape, seed=1) / 10)
    return model, raw(7, *shape, seed=2) / 10


@pytest.mark.parametrize("name", BN)
def test_batch_normalization_is_gone_and_the_function_the_same(name):
    model, x = trained(*BN[name])
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = fold_batchnorm(model)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    same(folded(x), model.eval()(x))


@pytest.mark.parametrize(
    "name", ["bn, linear", "bn first", "bn, conv", "bn, padded conv", "bn, flatten, linear", "two readers"]
)
@pytest.mark.parametrize("training", [True, False])
def test_the_affine_part_moves_into_the_next_layer(name, training):
    model, x = trained(*BN[name])
    collapsed = collapse_affine(model)
    kept = [m for m in collapsed.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert kept and all(m.weight is None and not m.affine for m in kept)
    assert collapsed.training
    same(collapsed.train(training)(x), model.train(training)(x))
    for key in ("running_mean", "running_var"):
        for m, n in zip(kept, (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)), strict=True):
            torch.testing.assert_close(getattr(m, key), getattr(n, key))


class PreNorm(nn.Module):
    """Three layers read one layer normalization, which the residual stream passes by."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.q, self.k, self.v = (nn.Linear(4, 4, bias=bias) for bias in (True, False, True))

    def forward(self, x):
        h = self.norm(x)
        return x + self.q(h) * self.k(h).tanh() + self.v(h)


PER_SAMPLE = {
    "layer": (lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 2)), (4,)),
    "layer, without β": (lambda: nn.Sequential(nn.LayerNorm(4, bias=False), nn.Linear(4, 2, bias=False)), (4,)),
    "RMS": (lambda: nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 2, bias=False)), (4,)),
    "layer, of sequences": (lambda: nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 2)), (3, 5)),
    "layer, flattened": (lambda: nn.Sequential(nn.LayerNorm(5), nn.Flatten(), nn.Linear(15, 2)), (3, 5)),
    "layer over all, flattened": (lambda: nn.Sequential(nn.LayerNorm((3, 5)), nn.Flatten(), nn.Linear(15, 2)), (3, 5)),
    "group": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.GroupNorm(3, 6), nn.Linear(6, 2)), (4,)),
    "group, padded conv": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 3, padding=1)), (2, 5, 5)),
    "group, flattened": (lambda: nn.Sequential(nn.GroupNorm(3, 3), nn.Flatten(), nn.Linear(15, 2)), (3, 5)),
    "instance, conv": (lambda: nn.Sequential(nn.InstanceNorm1d(3, affine=True), nn.Conv1d(3, 2, 2)), (3, 5)),
    "three readers": (PreNorm, (4,)),
}  # fmt: skip


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_the_affine_part_of_normalizations_per_sample_moves_as_well(name):
    build, shape = PER_SAMPLE[name]
    torch.manual_seed(0)
    model = build().double()
    norms = [m for m in model.modules() if "Norm" in type(m).__name__ and isinstance(getattr(m, "weight", None), nn.Parameter)]
    with torch.no_grad():
        for norm in norms:
            for p in norm.parameters():
                p.copy_(torch.randn(p.shape, dtype=p.dtype))
    x = raw(7, *shape, seed=2) / 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collapsed = collapse_affine(model)
    left = [m for m in collapsed.modules() if type(m) in {type(n) for n in norms}]
    assert len(left) == len(norms) and all(not list(m.parameters()) for m in left)
    same(collapsed(x), model(x))
    repr(collapsed)  # says of itself that it has no γ and β


class ChannelsFirst(nn.LayerNorm):
    """As in some vision models: the features are dimension 1."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.LayerNorm(5), nn.Conv1d(3, 2, 2)), "one weight for all positions"),
        (nn.Sequential(ChannelsFirst(5), nn.Linear(5, 2)), "a ChannelsFirst has a forward of its own"),
        (nn.Sequential(nn.LayerNorm((3, 5)), nn.Linear(5, 2)), "is linear in the last dimension"),
        (nn.Sequential(nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 2)), "it feeds '1'|is neither nn.Linear"),
        (nn.Sequential(nn.LayerNorm(5, elementwise_affine=False), nn.Linear(5, 2)), "it has no γ and β"),
    ],
)
def test_what_cannot_move_stays(model, why):
    with pytest.warns(UserWarning, match=why):
        collapse_affine(model)


SAMPLES = {
    "LayerNorm": nn.LayerNorm(6, eps=0.1, elementwise_affine=False),
    "RMSNorm": nn.RMSNorm(6, eps=0.1, elementwise_affine=False),
    "GroupNorm": nn.GroupNorm(2, 6, eps=0.1, affine=False),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_normalization_of_samples_is_a_product_from_both_sides(name):
    norm, h = SAMPLES[name], raw(11, 6)
    scaling = SampleScaling.of(norm, h)
    sizes = scaling.sizes.repeat_interleave(6 // len(scaling.sizes), 0)
    same((scaling.center @ h.T / sizes).T, norm(h))
    same(scaling.weights, 1 / scaling.sizes**2)
    # The nearest multiple of C, by search, and what it leaves.
    H_e = torch.cat([torch.ones(1, 11, dtype=h.dtype), h.T])
    for group in range(len(scaling.sizes)):
        rows = slice(1 + group * (6 // len(scaling.sizes)), 1 + (group + 1) * (6 // len(scaling.sizes)))
        left = (scaling.nearest().T @ H_e)[rows]
        target = norm(h).T[rows.start - 1 : rows.stop - 1]
        best = (left - target).norm()
        for factor in (0.99, 1.01):
            assert (factor * left - target).norm() > best
    off = (scaling.nearest().T @ H_e)[1:] - norm(h).T
    assert scaling.miss == pytest.approx(float(off.norm() / norm(h).norm()), rel=1e-12)


def test_scaling_of_what_it_is_not():
    with pytest.raises(TypeError, match="got BatchNorm1d"):
        SampleScaling.of(nn.BatchNorm1d(3), raw(4, 3))
    with pytest.raises(ValueError, match=r"shape \(N, 3\).*got \(4, 2, 3\)"):
        SampleScaling.of(nn.LayerNorm(3), raw(4, 2, 3))


def test_equations_22_and_23():
    model, _ = trained(lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)), (4,))
    gamma, beta, (W, b) = model[0].weight, model[0].bias, (model[1].weight, model[1].bias)
    new = collapse_affine(model)[1]
    same(new.weight, W @ torch.diag(gamma))
    same(new.bias, W @ beta + b)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.integers(1, 2), st.integers(1, 2),
    st.sampled_from(["zeros", "circular", "replicate"]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_random_convolutions(seed, groups, kernel, padding, stride, dilation, mode, bias, last):
    make = lambda i, o: nn.Conv1d(groups * i, groups * o, kernel, stride, padding, dilation, groups, bias, mode)  # noqa: E731

    def build():
        layers = [nn.BatchNorm1d(groups * 2), make(2, 3)] if not last else [make(2, 3), nn.BatchNorm1d(groups * 3)]
        return nn.Sequential(nn.Tanh(), *layers, nn.Tanh())

    model, x = trained(build, (groups * 2, 9), seed)
    folded = fold_batchnorm(model)
    assert not any(isinstance(m, nn.BatchNorm1d) for m in folded)
    same(folded(x), model.eval()(x))


def test_zero_padding_needs_the_constant_pad():
    """What goes wrong without it, and that the pad is −c/a."""
    model, x = trained(*BN["bn, padded conv"])
    folded = fold_batchnorm(model)
    pad, conv = folded[3]
    assert isinstance(pad, ChannelPad)
    naive = copy.deepcopy(conv)
    naive.padding = (1, 1)
    model.eval()
    assert (naive(folded[:3](x)) - model(x)).abs().max() > 0.1
    bn = model[2]
    same(bn(pad.value.reshape(1, -1, 1, 1)), torch.zeros(1, 4, 1, 1).double())


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.out = nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x):
        return self.out(self.bn(x.relu())) + self.out(x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.out, self.other = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.out.weight

    def forward(self, x):
        return self.other(self.out(self.bn(x.relu())).relu())


class Skip(nn.Module):
    """The layer before the normalization feeds something else as well."""

    def __init__(self):
        super().__init__()
        self.layer, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.layer(x)
        return self.bn(x).relu() + x


def hooked(register):
    """Linear, batch normalization, ReLU, linear, batch normalization's hooks or a neighbor's changing what passes."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    register(model)
    return model


STAYS = {
    "hook on it": (lambda: hooked(lambda m: m[1].register_forward_hook(lambda m, i, o: o + 1)), (4,), "hook on '1'"),
    "pre-hook on it": (lambda: hooked(lambda m: m[1].register_forward_pre_hook(lambda m, a: (2 * a[0],))), (4,), "hook on '1'"),
    "hook on its layer": (lambda: hooked(lambda m: m[0].register_forward_hook(lambda m, i, o: 2 * o)), (4,), "hook on '0'"),
    "skip connection": (Skip, (4,), "feeds 'relu'"),
    "between activations": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)), (4,), "'1': it feeds 2"),
    "at the end": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)), (4,), "feeds the output"),
    "layer called twice": (Shared, (4,), "used elsewhere"),
    "tied weight": (Tied, (4,), "used elsewhere"),
    "no running statistics": (lambda: nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)), (4,), "running"),
    "images into a linear layer": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Linear(3, 2)), (3, 3, 3), "last dimension"),
    "transposed convolution": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3), nn.ConvTranspose1d(3, 2, 2)), (3, 4), "transposed"),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_what_cannot_be_folded_stays_and_is_named(name):
    build, shape, message = STAYS[name]
    model, x = trained(build, shape)
    with pytest.warns(UserWarning, match=message):
        folded = fold_batchnorm(model)
    assert any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    same(folded(x), model.eval()(x))


def test_a_dead_channel_behind_zero_padding_stays():
    model, x = trained(lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3), nn.Conv1d(3, 2, 3, padding=1)), (3, 5))
    with torch.no_grad():
        model[1].weight[1] = 0
    with pytest.warns(UserWarning, match="scale 0"):
        folded = fold_batchnorm(model)
    same(folded(x), model.eval()(x))
    with torch.no_grad():
        model[1].bias[1] = 0
    same(fold_batchnorm(model)(x), model.eval()(x))
    assert isinstance(fold_batchnorm(model)[1], nn.Identity)


def test_dropout_stands_in_the_way_of_training():
    model, _ = trained(*BN["bn, dropout, linear"])
    with pytest.warns(UserWarning, match="Dropout"):
        collapsed = collapse_affine(model)
    assert collapsed[2].affine


def test_a_model_that_is_one_normalization():
    with pytest.warns(UserWarning, match="left in place"):
        assert isinstance(fold_batchnorm(nn.BatchNorm1d(3)), nn.BatchNorm1d)
    assert isinstance(fold_batchnorm(nn.Sequential(OrderedDict(a=nn.Linear(2, 3), b=nn.BatchNorm1d(3)))).b, nn.Identity)
