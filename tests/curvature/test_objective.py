"""The mean loss, its products through special layers, and what bad input gets."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import precond
from curvature.cases import CROSS, examples, hessian_of, network, penalized
from precond.algebra import vec
from precond.analysis.curvature import (
    Indefinite,
    NoSecondDerivative,
    Objective,
    condition_number,
    gauss_newton,
    hessian,
    jacobian,
    to_scipy,
)
from precond.analysis.curvature.stamp import Stamp
from precond.analysis.curvature.symmetric import apply_block, stacked


def flat_gradient(model, x, y, loss=CROSS):
    return vec.flatten(torch.autograd.grad(loss(model(x), y), tuple(model.parameters())))


@pytest.mark.parametrize("sizes", [(40,), (30, 10), (20, 16, 3, 1)])
def test_value_and_gradient_of_uneven_batches(sizes):
    x, y = examples()
    model = network()
    data = list(zip(x.split(sizes), y.split(sizes), strict=True))
    objective = Objective(model, CROSS, data)
    assert objective.value() == pytest.approx(CROSS(model(x), y).item(), rel=1e-13)
    torch.testing.assert_close(vec.flatten(objective.gradient()), flat_gradient(model, x, y), rtol=1e-11, atol=1e-14)
    summed = Objective(model, nn.CrossEntropyLoss(reduction="sum"), data, reduction="sum")
    torch.testing.assert_close(summed.weights, (1 / 40,) * len(sizes))
    torch.testing.assert_close(hessian(summed).to_dense(), hessian(objective).to_dense(), rtol=1e-10, atol=1e-13)


def test_sizes_may_count_something_else():
    x, y = examples()
    y[25:] = -100  # ignored
    model = network()
    objective = Objective(model, CROSS, [(x[:20], y[:20]), (x[20:30], y[20:30])], size=lambda x, y: float((y >= 0).sum()))
    assert objective.value() == pytest.approx(CROSS(model(x[:25]), y[:25]).item(), rel=1e-13)


def test_a_shuffling_loader_is_read_once():
    x, y = examples()
    objective = Objective(network(), CROSS, DataLoader(TensorDataset(x, y), 16, shuffle=True))
    assert objective.value() == objective.value() and len(objective.batches) == 3


class LSTM(nn.Module):
    """The last state of an LSTM, classified."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class ByHand(nn.Module):
    """The same, cell by cell, from elementary operations."""

    def __init__(self, other: LSTM):
        super().__init__()
        self.lstm, self.head = copy.deepcopy(other.lstm), copy.deepcopy(other.head)

    def forward(self, x):
        h = c = x.new_zeros(len(x), 4)
        p = self.lstm
        for t in range(x.shape[1]):
            i, f, g, o = (x[:, t] @ p.weight_ih_l0.T + p.bias_ih_l0 + h @ p.weight_hh_l0.T + p.bias_hh_l0).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


def test_an_lstm():
    torch.manual_seed(0)
    model = LSTM().double()
    x, y = torch.randn(10, 4, 3).double(), torch.randint(0, 3, (10,))
    exact = hessian_of(ByHand(model), x, y)
    objective = Objective(model, CROSS, [(x[:7], y[:7]), (x[7:], y[7:])])
    torch.testing.assert_close(hessian(objective).to_dense(), exact, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        hessian(Objective(model.float(), CROSS, (x.float(), y)).double()).to_dense(), exact, rtol=1e-4, atol=1e-6
    )
    assert all(w is p for w, p in zip(model.lstm._flat_weights, model.lstm.parameters(), strict=True))
    assert next(model.parameters()).dtype == torch.float32 and model(x.float()).dtype == torch.float32


class Manual(nn.Module):
    """A multi-head attention with the parameters of torch's, from elementary operations."""

    def __init__(self, layer: nn.MultiheadAttention):
        super().__init__()
        self.attention = layer

    def forward(self, x):
        a = self.attention
        q, k, v = (x @ a.in_proj_weight.T + a.in_proj_bias).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in (q, k, v))
        h = (q @ k.transpose(-1, -2) / 2**0.5).softmax(-1) @ v
        return (h.transpose(1, 2).flatten(-2) @ a.out_proj.weight.T + a.out_proj.bias).mean(1)


class Torch(Manual):
    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0].mean(1)


def test_multi_head_attention():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(4, 2, batch_first=True).double()
    nn.init.normal_(layer.in_proj_bias)
    x, y = torch.randn(8, 5, 4).double(), torch.randint(0, 4, (8,))
    exact = hessian_of(Manual(layer), x, y)
    for training in (False, True):
        objective = Objective(Torch(layer).train(training), CROSS, (x, y), mode="unchanged")
        torch.testing.assert_close(hessian(objective).to_dense(), exact, rtol=1e-9, atol=1e-12)


def test_batch_statistics_couple_the_samples_of_a_batch():
    class ByHandNorm(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            h = self.net[0](x)
            h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()
            return self.net[3]((h * self.net[1].weight + self.net[1].bias).tanh())

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = examples()
    exact = (30 * hessian_of(ByHandNorm(net), x[:30], y[:30]) + 10 * hessian_of(ByHandNorm(net), x[30:], y[30:])) / 40
    found = hessian(Objective(net, CROSS, [(x[:30], y[:30]), (x[30:], y[30:])], mode="train")).to_dense()
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-11)


def test_seeded_dropout_is_one_function():
    x, y = examples()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    H = hessian(Objective(model, CROSS, [(x[:30], y[:30]), (x[30:], y[30:])], mode="train", seed=1))
    A, B = H.to_dense(), hessian(H.objective).to_dense()
    assert torch.equal(A, B) and (A - A.T).norm() < 1e-14
    other = hessian(Objective(model, CROSS, [(x[:30], y[:30]), (x[30:], y[30:])], mode="train", seed=2)).to_dense()
    assert (A - other).norm() > 0.1 * A.norm()


@pytest.mark.parametrize("make", [hessian, gauss_newton])
@pytest.mark.parametrize("name", ["mlp", "conv", "lstm"])
def test_blocks_of_vectors_are_their_vectors(name, make):
    torch.manual_seed(0)
    model, shape = {
        "mlp": (network(), (6,)),
        "conv": (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double(), (1, 4, 4)),
        "lstm": (LSTM().double(), (4, 3)),
    }[name]
    x, y = torch.randn(9, *shape).double(), torch.randint(0, 3, (9,))
    map = make(Objective(model, CROSS, [(x[:6], y[:6]), (x[6:], y[6:])]))
    vectors = [tuple(torch.randn_like(p) for p in model.parameters()) for _ in range(3)]
    P = precond.Scaled(precond.Identity(), 2.0)
    for A, factor in ((map, 1.0), (P.T @ map @ P, 4.0)):
        for found, v in zip(zip(*apply_block(A, stacked(vectors)), strict=True), vectors, strict=True):
            torch.testing.assert_close(vec.flatten(found), factor * vec.flatten(map.mv(v)), rtol=1e-10, atol=1e-13)


def test_the_graph_follows_the_parameters_and_memory_may_be_none():
    x, y = examples()
    model = network()
    objective = Objective(model, CROSS, [(x[:30], y[:30]), (x[30:], y[30:])])
    kept, none = hessian(objective), hessian(objective, memory=0)
    v = tuple(torch.randn_like(p) for p in model.parameters())
    before = vec.flatten(kept.mv(v))
    torch.testing.assert_close(vec.flatten(none.mv(v)), before, rtol=0, atol=0)
    assert len(kept._graphs) == 2 and not none._graphs
    with torch.no_grad():
        model[0].weight.mul_(2)
    after = vec.flatten(kept.mv(v))
    assert (after - before).norm() > 1e-3
    torch.testing.assert_close(after, hessian_of(model, x, y) @ vec.flatten(v), rtol=1e-9, atol=1e-12)


def dense_maps(model, loss, x, y):
    """J, H and G of loss(model(x), y) by torch's functions of dense vectors."""
    names, params = zip(*model.named_parameters(), strict=True)
    like = tuple(p.detach() for p in params)
    f = lambda flat: torch.func.functional_call(model, dict(zip(names, vec.unflatten(flat, like), strict=True)), (x,))  # noqa: E731
    at = vec.flatten(like)
    J = torch.autograd.functional.jacobian(f, at).flatten(0, 1)
    S = torch.autograd.functional.hessian(lambda out: loss(out.view_as(f(at)), y), f(at).flatten())
    return {"jacobian": J, "hessian": hessian_of(model, x, y, loss=loss), "gauss_newton": J.T @ S @ J}


WRITES = {
    "under no_grad": lambda t: t.mul_(3),
    "through .data": lambda t: t.data.mul_(3),
    "a sign": lambda t: t.data.view(-1)[:1].neg_(),
    "exchanged entries, of which sums and norms tell nothing": lambda t: t.data.copy_(t.data.flip(0)),
    "assigned": lambda t: setattr(t, "data", 3 * t.data),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("of", ["parameter", "buffer", "weights of the loss", "copy in float64"])
def test_kept_maps_are_those_of_the_values_as_they_are(write, of):
    torch.manual_seed(3)
    x, y = examples()
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
    model[1].running_mean.copy_(torch.tensor([0.5, 1, 2, -4]))
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64), reduction="sum")
    objective = Objective(model, loss, [(x[:30], y[:30]), (x[30:], y[30:])], reduction="sum")
    if of == "copy in float64":
        model = copy.deepcopy(model)
        objective = Objective(model.float(), loss.float(), objective.batches, reduction="sum").double()
        model, loss = copy.deepcopy(model).double(), copy.deepcopy(loss).double()
    maps = {make.__name__: make(objective) for make in (jacobian, hessian, gauss_newton)}
    for map in maps.values():
        map.to_dense()
    moved, twin = {
        "parameter": (model[0].weight, None),
        "buffer": (model[1].running_mean, None),
        "weights of the loss": (loss.weight, None),
        "copy in float64": (objective.params[0], model[0].weight),
    }[of]
    with torch.no_grad():
        WRITES[write](moved)
        if twin is not None:
            twin.copy_(moved)
    for name, expected in dense_maps(model, loss, x, y).items():
        scale = 1 if name == "jacobian" else 40
        # Sums of 40 terms in another order.
        torch.testing.assert_close(maps[name].to_dense() * scale, expected, rtol=1e-9, atol=1e-10, msg=name)


LAYOUTS = {
    "in a row": lambda w: w.clone(),
    "transposed": lambda w: w.T.clone().T,
    "from an odd place on": lambda w: torch.cat([w.new_zeros(1), w.flatten()])[1:].view_as(w),
    "an odd number of bytes": lambda w: w.half().flatten()[:-1].clone().view(1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_entry_of_a_large_tensor_tells(layout):
    model = nn.Linear(150, 150)
    model.weight.data = LAYOUTS[layout](torch.randn(150, 150))
    stamp = Stamp(Objective(model, CROSS, [examples()]))
    assert stamp.stands
    for at in (0, 7777, -1):
        entry = model.weight.data.flatten()[at].item()
        index = torch.arange(model.weight.numel()).view(model.weight.shape).flatten()[at].item()
        place = index // model.weight.shape[1], index % model.weight.shape[1]
        model.weight.data[place] = entry + 1
        assert not stamp.stands
        model.weight.data[place] = entry
        assert stamp.stands


def test_float64_keeps_the_model_and_sees_a_penalty_on_it():
    x, y = examples()
    model = network().float()
    loss = penalized(model, 0.5)
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    before = [p.data_ptr() for p in model.parameters()]
    objective = Objective(model, loss, (x.float(), y)).double()
    assert objective.double() is objective and all(p.dtype == torch.float64 for p in objective.params)
    double = network()
    double.load_state_dict(model.state_dict())
    xx = x.float().double()
    torch.testing.assert_close(hessian(objective).to_dense(), hessian_of(double, xx, y, 0.5), rtol=1e-10, atol=1e-12)
    expected = hessian_of(double, xx, y, loss=copy.deepcopy(weighted).double())
    other = Objective(model, weighted, (x.float(), y)).double()
    torch.testing.assert_close(hessian(other).to_dense(), expected, rtol=1e-10, atol=1e-12)
    assert [p.data_ptr() for p in model.parameters()] == before and weighted.weight.dtype == torch.float32
    assert hessian(Objective(model, loss, (x.float(), y))).like[0].dtype == torch.float32


class Once(torch.autograd.Function):
    """A square whose backward is marked as differentiable only once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda out, y: Once.apply(out).mean(), "once_differentiable"),
        (lambda out, y: out.detach().square().mean(), "does not depend on the parameters"),
        (lambda out, y: torch.tensor(1.0), "does not depend on the parameters"),
    ],
)
def test_a_loss_without_second_derivatives(loss, words):
    x, y = examples()
    objective = Objective(network(), loss, (x, y))
    with pytest.raises(NoSecondDerivative, match=words):
        hessian(objective).mv(objective.gradient() if "once" in words else tuple(torch.ones_like(p) for p in objective.params))


def test_a_linear_loss():
    x, y = examples()
    model = nn.Linear(6, 3).double()
    with pytest.raises(NoSecondDerivative, match="linear in the parameters"):
        hessian(Objective(model, lambda out, y: out.mean(), (x, y))).mv(tuple(model.parameters()))


def bad(change):
    x, y = examples()
    return lambda: change(network(), x, y)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (bad(lambda m, x, y: Objective(m, CROSS, iter([]))), ValueError, "yields no batches"),
        (bad(lambda m, x, y: Objective(m, CROSS, TensorDataset(x, y))), TypeError, "DataLoader"),
        (bad(lambda m, x, y: Objective(m, CROSS, x)), TypeError, "must be batches"),
        (bad(lambda m, x, y: Objective(m, CROSS, [(x, y, y)])), ValueError, "3 parts; pack several inputs"),
        (
            bad(lambda m, x, y: Objective(m, CROSS, [(x, y), (x.float(), y)]).value()),
            ValueError,
            "batch 1 .* batches of one structure",
        ),
        (bad(lambda m, x, y: Objective(m, CROSS, [(x[:0], y[:0])]).value()), ValueError, "has 0 examples"),
        (bad(lambda m, x, y: Objective(m, CROSS, [(x, y)], size=lambda x, y: 0).value()), ValueError, "size must be positive"),
        (
            bad(lambda m, x, y: Objective(m.requires_grad_(False), CROSS, (x, y))),
            ValueError,
            "no parameter that requires a gradient",
        ),
        (
            bad(lambda m, x, y: Objective(m, CROSS, (x, y), [m[0].weight.requires_grad_(False)])),
            ValueError,
            "'0.weight' does not require a gradient",
        ),
        (bad(lambda m, x, y: Objective(m, CROSS, (x, y), "7.*")), ValueError, r"'7.\*', which is no parameter of the model"),
        (bad(lambda m, x, y: Objective(m, CROSS, (x, y), [])), ValueError, "params is empty"),
        (bad(lambda m, x, y: Objective(m, CROSS, (x, y), mode="test")), ValueError, "mode must be one of"),
        (bad(lambda m, x, y: Objective(m.forward, CROSS, (x, y))), TypeError, "model must be an nn.Module"),
        (
            bad(lambda m, x, y: Objective(m, nn.CrossEntropyLoss(reduction="none"), (x, y)).value()),
            ValueError,
            r"shape \(40,\); use reduction='mean'",
        ),
        (
            bad(lambda m, x, y: Objective(m.append(nn.Dropout(0.5)), CROSS, (x, y), mode="train").value()),
            ValueError,
            "drew random numbers .*Dropout '3'.*; use mode='eval', or give seed=",
        ),
        (
            bad(lambda m, x, y: Objective(m, lambda out, y: CROSS(out + torch.randn(()), y), (x, y)).value()),
            ValueError,
            r"drew random numbers \(mode='eval'\).*; give seed=",
        ),
        (
            bad(lambda m, x, y: Objective(nn.Sequential(nn.LazyLinear(2)), CROSS, (x, y))),
            ValueError,
            "'0.weight' is lazy and has no shape yet; call the model on a batch first",
        ),
        (
            bad(lambda m, x, y: hessian(Objective(m, CROSS, (x * torch.nan, y))).mv(tuple(m.parameters()))),
            ValueError,
            "loss of batch 0 is nan",
        ),
        (
            bad(lambda m, x, y: hessian(Objective(m, CROSS, (x, y))).mv((x,))),
            ValueError,
            "align maps and vectors to objective.params",
        ),
        (bad(lambda m, x, y: hessian(Objective(m, CROSS, (x, y)), memory=-1)), ValueError, "memory must be"),
        (
            bad(lambda m, x, y: hessian(Objective(m, CROSS, (x, y))).solve(tuple(m.parameters()))),
            NotImplementedError,
            "no inverse",
        ),
        (bad(lambda m, x, y: condition_number(hessian(Objective(m, CROSS, (x, y)))).kappa), Indefinite, "gauss_newton"),
        (bad(lambda m, x, y: to_scipy(precond.Identity())), ValueError, "takes vectors of any shape"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_the_first_batches_alone_have_weights_of_their_own():
    torch.manual_seed(0)
    x, y = torch.randn(100, 3).double(), torch.randn(100, 1).double()
    model = torch.nn.Linear(3, 1).double()
    objective = Objective(model, torch.nn.functional.mse_loss, list(zip(x.split(40), y.split(40), strict=True)))
    whole = objective.value()  # its sizes are known
    part = objective.first(2)
    assert part.value() == pytest.approx(float((model(x[:80]) - y[:80]).detach().square().mean()), rel=1e-12)
    assert len(objective.batches) == 3 and objective.value() == whole and objective.first(9).value() == whole
    with pytest.raises(ValueError, match="count"):
        objective.first(0)
