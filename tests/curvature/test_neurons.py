"""The Hessian of single neurons against dense ones, on layers of every kind."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from precond.analysis.curvature import (
    CoupledSamples,
    CurvatureError,
    Indefinite,
    NoSecondDerivative,
    Objective,
    Singular,
    hessian,
    neuron_hessian,
    neuron_hessians,
    unit_curvatures,
)
from precond.analysis.curvature.neurons import Signs
from precond.analysis.curvature.neurons.curvatures import chain_curvatures
from precond.analysis.curvature.neurons.layer import Layer
from precond.analysis.curvature.neurons.passes import opened

torch.set_num_threads(1)
CROSS = nn.CrossEntropyLoss()


class Model(nn.Module):
    """A model from a function of (self, x), for what nn.Sequential cannot say."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def attend(x):
    """Positions of one sample meet."""
    return (x @ x.mT / x.shape[-1] ** 0.5).softmax(-1) @ x


def over_time_first(m, x):
    return m.out(attend(m.layer(x.transpose(0, 1)).tanh().transpose(0, 1)).mean(1))


def tokens_in_a_row(m, x):
    return m.out(attend(m.layer(x.flatten(0, 1)).tanh().unflatten(0, x.shape[:2])).mean(1))


def time_major_tokens(m, x):
    return m.out(attend(m.layer(x.transpose(0, 1).flatten(0, 1)).tanh().unflatten(0, (5, -1)).transpose(0, 1)).mean(1))


def twins(m, x):
    return m.out(m.layer(x).tanh() * m.layer(x.flip(1)).sigmoid())


def linears(**out):
    return {"layer": nn.Linear(4, 6), "out": nn.Linear(6, 3), **out}


# name: (model, shape of a sample, layer, units)
CASES = {
    "linear, first": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (4,), "0", (0, 5)),
    "linear, last": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (4,), "2", (1,)),
    "without bias": (lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.GELU(), nn.Linear(6, 3)), (4,), "0", (2,)),
    "in place": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), (4,), "0", (2,)),
    "residual": (lambda: Model(lambda m, x: m.out(m.layer(x).tanh() + m.layer2(m.layer(x))), layer2=nn.Linear(6, 6), **linears()),
                 (4,), "layer2", (2,)),
    "layer norm behind": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)), (4,), "0", (3,)),
    "batch norm at evaluation": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Sigmoid(), nn.Linear(6, 3)), (4,), "0", (3,)),
    "sequence": (lambda: Model(lambda m, x: m.out(attend(m.layer(x).tanh()).mean(1)), **linears()), (5, 4), "layer", (1, 4)),
    "sequence, time first": (lambda: Model(over_time_first, **linears()), (5, 4), "layer", (1,)),
    "tokens in a row": (lambda: Model(tokens_in_a_row, **linears()), (5, 4), "layer", (1,)),
    "tokens in a row, time first": (lambda: Model(time_major_tokens, **linears()), (5, 4), "layer", (1,)),
    "called twice": (lambda: Model(twins, **linears()), (4,), "layer", (1, 2)),
    "conv": (lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=1), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)), (2, 4, 4), "0", (0, 3)),
    "conv, circular, groups": (lambda: nn.Sequential(
        nn.Conv1d(4, 4, 3, padding=2, dilation=2, groups=2, padding_mode="circular"), nn.GELU(), nn.Flatten(), nn.Linear(20, 3)),
        (4, 5), "0", (1, 2)),
    "conv, transposed": (lambda: nn.Sequential(
        nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(54, 3)), (4, 2, 2), "0", (0, 4)),
    "conv, relu and pooling": (lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
        (1, 8, 8), "0", (0, 1, 2)),
}  # fmt: skip
CASES["conv, transposed"] = (lambda: nn.Sequential(
    nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(96, 3)), (4, 2, 2), "0", (0, 4))  # fmt: skip


def problem(build, shape, sizes=(4, 3)):
    torch.manual_seed(0)
    model = build().double().eval()
    return model, [(torch.randn(n, *shape).double(), torch.randint(0, 3, (n,))) for n in sizes]


def dense(model, data, layer, unit, loss=CROSS):
    """∂²L/∂ŵ² over [b, w] of a neuron by torch's own dense Hessian of the mean over all examples."""
    module = model.get_submodule(layer)
    state = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    prefix = f"{layer}." if layer else ""
    x, y = (torch.cat(t) for t in zip(*data, strict=True))
    W = module.weight.detach()
    transposed = getattr(module, "transposed", False)
    if transposed:
        per = W.shape[1]
        group, inside = divmod(unit, per)
        rows = slice(group * W.shape[0] // module.groups, (group + 1) * W.shape[0] // module.groups)
        at = (rows, inside)
    else:
        at = (unit,)
    w = W[at]
    has_bias = module.bias is not None
    start = torch.cat([module.bias.detach()[unit : unit + 1], w.flatten()]) if has_bias else w.flatten()

    def f(flat):
        new = dict(state)
        weight = W.clone()
        weight[at] = flat[has_bias:].reshape(w.shape)
        new[prefix + "weight"] = weight
        if has_bias:
            bias = module.bias.detach().clone()
            bias[unit] = flat[0]
            new[prefix + "bias"] = bias
        return loss(torch.func.functional_call(model, new, (x,)), y)

    return torch.autograd.functional.hessian(f, start)


@pytest.mark.parametrize("name", CASES)
def test_against_the_dense_hessian(name):
    build, shape, layer, units = CASES[name]
    model, data = problem(build, shape)
    for neuron in neuron_hessians(Objective(model, CROSS, data), layer, units):
        expected = dense(model, data, layer, neuron.unit)
        torch.testing.assert_close(neuron.to_dense(), expected, rtol=1e-9, atol=1e-12)
        if not any(isinstance(m, nn.ReLU) for m in model.modules()):
            assert expected.abs().max() > 1e-6


# All units of all layers at once


class Coded(nn.Module):
    """A chain written with functions, with BatchNorm at inference behind the first layer."""

    def __init__(self, function, widths):
        super().__init__()
        self.function, self.norm = function, nn.BatchNorm1d(widths[1])
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x):
        x = self.function(self.norm(self.layers[0](x.flatten(1))))
        for layer in self.layers[1:-1]:
            x = self.function(layer(x))
        return self.layers[-1](x)


FUNCTIONS = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "gelu": F.gelu,
    "softplus": lambda x: F.softplus(x, beta=2),
    "leaky relu": F.leaky_relu,
}
LOSSES = {
    "cross-entropy": CROSS,
    "squares": lambda out, y: out.square().mean() / 2,
    "not convex": lambda out, y: (out.sin() * out.roll(1, 1)).mean(),
    "linear": lambda out, y: out.mean(),
}
SHAPES = {"two layers": (5, 6, 3), "three": (5, 6, 4, 3), "wide below": (4, 9, 5, 3), "deep": (4, 3, 3, 3, 3, 3, 3, 2)}


def diagonals(model, data, loss, name) -> torch.Tensor:
    """∂²L/∂a² of every unit from a dense Hessian in all pre-activations of a layer, sample by sample."""
    rows, total = [], sum(len(y) for _, y in data)
    for x, y in data:
        out = {}
        layer = model.get_submodule(name)
        handle = layer.register_forward_hook(lambda m, args, a, out=out: out.setdefault("a", a).clone())
        model(x)
        handle.remove()

        def f(a, x=x, y=y, layer=layer):
            handle = layer.register_forward_hook(lambda *_: a.clone())
            try:
                return loss(model(x), y) * len(y) / total
            finally:
                handle.remove()

        a = out["a"].detach()
        H = torch.autograd.functional.hessian(f, a)
        rows.append(H.reshape(a.numel(), a.numel()).diagonal().reshape(a.shape))
    return torch.cat(rows)


@pytest.mark.parametrize("widths", SHAPES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_curvatures_of_all_units_of_a_chain(function, loss, widths):
    widths = SHAPES[widths]
    torch.manual_seed(0)
    model = Coded(FUNCTIONS[function], widths).double().eval()
    nn.init.normal_(model.norm.running_mean)
    data = [(torch.randn(n, widths[0]).double(), torch.randint(0, widths[-1], (n,))) for n in (4, 3)]
    objective = Objective(model, LOSSES[loss], data)
    names = [f"layers.{i}" for i in range(len(widths) - 1)]
    assert set(chain_curvatures(objective, 0, names)) == set(names), "the recursion covers the chain"
    found = unit_curvatures(objective)
    assert set(found) == set(names)
    for name in names:
        torch.testing.assert_close(found[name], diagonals(model, data, LOSSES[loss], name), rtol=1e-9, atol=1e-13)
    # Some layers alone, as asked for.
    torch.testing.assert_close(unit_curvatures(objective, [names[-2]])[names[-2]], found[names[-2]])


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_confident_classes_in_float32(scale):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
    with torch.no_grad():
        model[2].weight *= scale
    objective = Objective(model, CROSS, (torch.randn(50, 5), torch.randint(0, 4, (50,))))
    for name, exact in unit_curvatures(objective.double()).items():
        found = unit_curvatures(objective)[name]
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-6 * exact.abs().max().item())


@pytest.mark.parametrize("name", ["residual", "layer norm behind", "sequence", "conv", "linear, first"])
def test_curvatures_of_any_model(name):
    """What is no chain takes passes; what has several positions per sample is left out."""
    build, shape, _, _ = CASES[name]
    model, data = problem(build, shape)
    objective = Objective(model, CROSS, data)
    found = unit_curvatures(objective)
    assert found
    for layer, s in found.items():
        for neuron in neuron_hessians(objective, layer):
            torch.testing.assert_close(s[:, neuron.unit], neuron.s, rtol=1e-9, atol=1e-13)
    assert "layer" not in found  # called twice, or at several positions


class Skips(nn.Module):
    """Piecewise linear, with a skip connection, a pool and a mean."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.second, self.out = nn.Conv2d(5, 5, 3, padding=1), nn.Linear(5, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        x = F.leaky_relu_(x + 0.5 * self.second(x))
        return self.out(torch.cat([x[..., :1], x[..., 1:]], -1).mean((2, 3)))


PIECEWISE = {
    "skips": (Skips, (2, 4, 4), ["first", "second", "out"]),
    "conv net": (lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Dropout(), nn.Linear(16, 3)),
        (1, 8, 8), ["0", "3", "6"]),
    "sequence": (lambda: Model(lambda m, x: m.out(m.layer(x).relu().transpose(0, 1).sum(0)), **linears()), (5, 4), ["layer"]),
}  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", PIECEWISE)
def test_piecewise_linear_models_by_backward_passes_of_their_outputs(name, loss):
    build, shape, layers = PIECEWISE[name]
    model, data = problem(build, shape, (4,))
    objective = Objective(model, LOSSES[loss], data)
    for layer in layers:
        at = Layer(model, layer, "test")
        with opened(objective, 0, at) as slopes:
            fast = slopes._blocks_of_outputs(range(at.units))
            assert fast is not None or layer in ("6", "out")  # as few units as outputs
            if fast is not None:
                torch.testing.assert_close(fast, slopes._blocks_by_products(range(at.units)), rtol=1e-9, atol=1e-13)


NOT_PIECEWISE = {
    "smooth": lambda m, x: m.out(m.layer(x).tanh()),
    "product of two": lambda m, x: m.out(m.layer(x) * m.layer(x.flip(1)).relu()),
    "divided by": lambda m, x: m.out(x[:, :1] / (2 + m.layer(x).relu())),
    "softmax": lambda m, x: m.out(m.layer(x).softmax(-1)),
}


@pytest.mark.parametrize("name", NOT_PIECEWISE)
def test_curved_models_do_not_pass_for_piecewise_linear(name):
    model, data = problem(lambda: Model(NOT_PIECEWISE[name], **linears()), (4,), (5,))
    for loss in (CROSS, lambda out, y: out.square().sum()):
        with opened(Objective(model, loss, data), 0, Layer(model, "layer", "test")) as slopes:
            assert slopes._blocks_of_outputs(range(6)) is None


def test_a_loss_that_reads_activations_is_not_one_of_outputs():
    kept = {}
    model, data = problem(
        lambda: Model(lambda m, x: m.out(kept.__setitem__("h", m.layer(x).relu()) or kept["h"]), **linears()), (4,), (5,)
    )

    def loss(out, y):
        return CROSS(out, y) + kept["h"].pow(3).mean()

    for layer in ("layer", "out"):
        with opened(Objective(model, loss, data), 0, Layer(model, layer, "test")) as slopes:
            assert slopes._blocks_of_outputs(range(slopes.layer.units)) is None
    assert chain_curvatures(Objective(model, loss, data), 0, ["layer"]) == {}


def test_many_neurons_at_once_are_single_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    objective = Objective(model, CROSS, [(torch.randn(6, 4).double(), torch.randint(0, 3, (6,)))])
    together = neuron_hessians(objective, "0")
    assert [n.unit for n in together] == list(range(12))
    assert all(n.inputs is together[0].inputs for n in together)
    for unit in (0, 7):
        torch.testing.assert_close(
            together[unit].to_dense(), neuron_hessian(objective, "0", unit).to_dense(), rtol=1e-9, atol=1e-13
        )


# What follows from the form


def logistic(x, scale=1.0):
    torch.manual_seed(0)
    model = nn.Linear(x.shape[1], 1).double()
    with torch.no_grad():
        model.weight *= scale
    y = (torch.arange(len(x)) % 2).double()[:, None]
    return Objective(model, nn.BCEWithLogitsLoss(), [(x[:7], y[:7]), (x[7:], y[7:])]), model


def test_closed_forms_and_the_bound():
    x = torch.randn(30, 3, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1]) + 2
    objective, model = logistic(x)
    neuron = neuron_hessian(objective, "", 0)
    p = model(x).sigmoid().detach()[:, 0]
    torch.testing.assert_close(neuron.s, p * (1 - p) / 30)
    torch.testing.assert_close(neuron.H_e, torch.cat([torch.ones(30, 1).double(), x], 1).T)
    H = hessian(objective).to_dense()[[3, 0, 1, 2]][:, [3, 0, 1, 2]]
    torch.testing.assert_close(neuron.to_dense(), H)
    s = torch.linalg.svdvals(neuron.H_e)
    assert neuron.kappa_inputs == pytest.approx((s[0] / s[-1]).item())
    assert neuron.kappa_curvatures == pytest.approx((neuron.s.max() / neuron.s.min()).item())
    lam = torch.linalg.eigvalsh(H)
    assert (lam[-1] / lam[0]).item() <= neuron.bound == pytest.approx(neuron.kappa_inputs**2 * neuron.kappa_curvatures)
    assert neuron.conditioning().kappa == pytest.approx((lam[-1] / lam[0]).item(), rel=1e-3)
    assert neuron.definite and neuron.why is None and "κ(∇²) ≤" in str(neuron)
    assert neuron.signs == Signs(0, 0, 30)
    least = Objective(
        nn.Linear(3, 1).double(), lambda out, y: (out - y).square().mean() / 2, [(x, torch.zeros(30, 1).double())]
    )
    torch.testing.assert_close(neuron_hessian(least, "", 0).s, torch.full((30,), 1 / 30, dtype=torch.float64))


def test_the_bound_is_refused_where_s_is_indefinite():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    objective = Objective(model, nn.CrossEntropyLoss(), [(2 * torch.randn(40, 3).double(), torch.randint(0, 2, (40,)))])
    neurons = [n for n in neuron_hessians(objective, "0") if n.signs.negative]
    assert neurons
    for neuron in neurons:
        signs = neuron.signs
        assert (signs.negative, signs.positive) == (int((neuron.s < 0).sum()), int((neuron.s > 0).sum()))
        with pytest.raises(Indefinite, match="does not apply"):
            _ = neuron.bound
        assert not neuron.definite and "does not apply" in str(neuron)
        assert neuron.conditioning().n == 4


def test_the_active_samples_of_a_relu():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    objective = Objective(model, CROSS, [(torch.randn(40, 3).double(), torch.randint(0, 2, (40,)))])
    for neuron in neuron_hessians(objective, "0"):
        with pytest.raises(Singular, match=r"\.active"):
            _ = neuron.bound
        part = neuron.active
        assert 4 < part.s.numel() < 40 and part.H_e.shape == (4, part.s.numel())
        torch.testing.assert_close(part.to_dense(), neuron.to_dense())
        lam = torch.linalg.eigvalsh(neuron.to_dense())
        assert (lam[-1] / lam[0]).item() <= part.bound


def test_dependent_inputs():
    x = torch.randn(30, 3, dtype=torch.float64)
    x = torch.cat([x, x[:, :1] + x[:, 1:2]], 1)
    neuron = neuron_hessian(logistic(x)[0], "", 0)
    assert neuron.inputs.rank == 4 and math.isinf(neuron.kappa_inputs)
    assert neuron.inputs.kappa_positive == pytest.approx(
        float(torch.linalg.svdvals(neuron.H_e)[0] / torch.linalg.svdvals(neuron.H_e)[3])
    )
    with pytest.raises(Singular, match="rank 4"):
        _ = neuron.bound
    assert "rank 4 of 5" in str(neuron)


def test_blocks_of_positions_have_the_spectrum_of_s():
    build, shape, layer, _ = CASES["conv"]
    model, data = problem(build, shape)
    neuron = neuron_hessian(Objective(model, CROSS, data), layer, 0)
    assert neuron.s.shape == (7, 4, 4)
    S = torch.block_diag(*neuron.s)
    torch.testing.assert_close(neuron.curvatures, torch.linalg.eigvalsh(S))
    torch.testing.assert_close(neuron.to_dense(), neuron.H_e @ S @ neuron.H_e.T)
    diagonal = neuron.H_e * S.diagonal() @ neuron.H_e.T
    assert (diagonal - neuron.to_dense()).abs().max() > 0.1 * diagonal.abs().max()  # the diagonal of S is not enough


# Refusals


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.layer(self.layer(x).tanh()).tanh())


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(self.layer(x).tanh(), self.layer.weight)


class TiedBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.bias = self.layer.bias

    def forward(self, x):
        return self.other(self.layer(x).tanh())


class AddedAgain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return (self.layer(x) + self.layer.bias).tanh()


def objective_of(build, shape=(4,), loss=CROSS, n=6, **options):
    model, data = problem(build, shape, (n,))
    return Objective(model, loss, data, **options)


def normalized():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


REFUSED = {
    "batch statistics": (lambda: objective_of(normalized, mode="train"), "0", CoupledSamples, "'1'.*mode='eval'"),
    "contrastive loss": (
        lambda: objective_of(CASES["linear, first"][0], loss=lambda out, y: (out @ out.T).logsumexp(1).mean()), "0", CoupledSamples,
        "within the batch"),
    "applied to its own outputs": (lambda: objective_of(Recurrent), "layer", CurvatureError, "own outputs"),
    "tied": (lambda: objective_of(TiedHead), "layer", CurvatureError, "outside the layer"),
    "tied bias": (lambda: objective_of(TiedBias), "layer", CurvatureError, "the bias of layer 'layer' acts on the loss outside"),
    "bias that is added again": (lambda: objective_of(AddedAgain), "layer", CurvatureError, "the bias of layer 'layer' acts"),
    "once differentiable": (lambda: objective_of(lambda: nn.Sequential(nn.Linear(4, 3), Once())), "0", NoSecondDerivative, "Square"),
    "no such layer": (lambda: objective_of(normalized), "9", ValueError, "layer must be one of '0', '3'"),
    "no linear layer": (lambda: objective_of(normalized), "1", ValueError, "layer must be one of"),
    "not called": (
        lambda: objective_of(lambda: Model(lambda m, x: m.out(m.mha(x, x, x)[0].mean(1)), mha=nn.MultiheadAttention(4, 1, batch_first=True),
                                           out=nn.Linear(4, 3)), (5, 4)), "mha.out_proj", ValueError, "not called"),
}  # fmt: skip


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Once(nn.Module):
    def forward(self, x):
        return Square.apply(x)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    build, layer, kind, message = REFUSED[name]
    objective = build()
    with pytest.raises(kind, match=message):
        neuron_hessian(objective, layer, 0)


@pytest.mark.parametrize("unit", [-1, 5, 1.0, True])
def test_units_that_do_not_exist(unit):
    with pytest.raises(ValueError, match=r"unit must be a whole number in \[0, 5\)"):
        neuron_hessian(objective_of(normalized), "0", unit)


@pytest.mark.parametrize("at", ["where it is", 0], ids=str)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_penalty_in_the_loss_is_refused(name, at):
    """At 0 its gradient is 0, and its second derivative is not."""
    model, data = problem(normalized, (4,), (6,))
    p = getattr(model[0], name)
    p.data.mul_(1 if at else at)
    objective = Objective(model, lambda out, y: CROSS(out, y) + p.square().sum(), data)
    with pytest.raises(CurvatureError, match="penalty"):
        neuron_hessian(objective, "0", 0)


def test_batch_statistics_before_the_layer_do_not_matter():
    model, data = problem(lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)), (4,), (6,))
    neuron = neuron_hessian(Objective(model, CROSS, data, mode="train"), "1", 0)
    torch.testing.assert_close(neuron.to_dense(), dense(model.train(), data, "1", 0), rtol=1e-9, atol=1e-12)


def test_curvatures_of_layers_that_are_asked_for():
    build, shape, layer, _ = CASES["sequence"]
    model, data = problem(build, shape)
    with pytest.raises(ValueError, match="5 positions per sample"):
        unit_curvatures(Objective(model, CROSS, data), [layer])
    with pytest.raises(CoupledSamples):
        unit_curvatures(objective_of(normalized, mode="train"), ["0"])
    with pytest.raises(CoupledSamples):
        unit_curvatures(REFUSED["contrastive loss"][0]())


def test_positions_must_not_vary():
    model, _ = problem(*CASES["sequence"][:2])
    data = [(torch.randn(3, t, 4).double(), torch.randint(0, 3, (3,))) for t in (5, 6)]
    with pytest.raises(ValueError, match="one length"):
        neuron_hessian(Objective(model, CROSS, data), "layer", 0)


def test_a_measurement_leaves_no_trace():
    model, data = problem(normalized, (4,), (6,))
    before = copy.deepcopy(model.state_dict())
    objective = Objective(model, CROSS, data)
    state = torch.get_rng_state()
    neuron_hessian(objective, "0", 0), unit_curvatures(objective)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert torch.equal(state, torch.get_rng_state()) and not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_frozen_layers_and_linear_losses():
    model, data = problem(CASES["linear, first"][0], (4,), (6,))
    model[0].requires_grad_(False)
    neuron = neuron_hessian(Objective(model, CROSS, data), "0", 1)
    torch.testing.assert_close(neuron.to_dense(), dense(model, data, "0", 1), rtol=1e-9, atol=1e-12)
    last = neuron_hessian(Objective(model, lambda out, y: out.mean(), data), "2", 1)
    assert not last.s.any() and not last.to_dense().any() and last.signs.null == 6
