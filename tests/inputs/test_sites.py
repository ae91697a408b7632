"""Which parameters are preconditioned, with whose inputs: tied, reused, lazy, parametrized and other layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from inputs.layers import data
from inputs.steps import check_step, copies, stepped
from precond import BNP, PreconditionedGD

torch.set_num_threads(1)


# --- shared weights ------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers with one weight; with one bias, or each with its own."""

    def __init__(self, share_bias: bool, bias: bool = True):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=bias), nn.Linear(4, 4, bias=bias)
        self.b.weight = self.a.weight
        if share_bias:
            self.b.bias = self.a.bias
        self.double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(y)])


@pytest.mark.parametrize("sizes", [(6, 6), (6, 2), (1, 9)], ids=str)
@pytest.mark.parametrize("kind", ["one bias", "two biases", "no bias"])
def test_tied_layers_pool_their_inputs(kind, sizes):
    torch.manual_seed(0)
    model = Tied(kind == "one bias", bias=kind != "no bias")
    x, y = data(sizes[0], 4), data(sizes[1], 4, seed=1) * 3
    params = [model.a.weight, model.a.bias] if kind == "one bias" else [model.a.weight]
    before = copies(*params)
    others = [model.a.bias, model.b.bias] if kind == "two biases" else []
    others_before = copies(*others)
    stepped(model, lambda: model(x, y))
    check_step(params, torch.cat([x, y]), before)
    for bias, old in zip(others, others_before, strict=True):  # what the weight is not centered with keeps its gradient
        torch.testing.assert_close(bias.detach(), old - 0.1 * bias.grad)


def test_a_layer_used_twice_in_a_forward_pools_its_inputs():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).double()
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = data(7, 4)
    with torch.no_grad():
        inputs = torch.cat([x, layer(x).tanh()])
    before = copies(layer.weight, layer.bias)
    stepped(model, lambda: model(x))
    check_step([layer.weight, layer.bias], inputs, before)


def test_one_module_in_two_places_is_one_layer():
    layer = nn.Linear(4, 4).double()
    model = nn.ModuleDict({"a": layer, "b": layer})
    x, y = data(5, 4), data(3, 4, seed=1)
    before = copies(layer.weight, layer.bias)
    optimizer = stepped(model, lambda: torch.cat([model["a"](x), model["b"](y)]))
    check_step([layer.weight, layer.bias], torch.cat([x, y]), before)
    assert optimizer.state[layer.weight]["count"].item() == 8


class EmbeddingHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5)
        self.head.weight = self.embedding.weight

    def forward(self, i: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(i)))


class OtherGroups(nn.Module):
    """One weight whose rows see all three inputs in one layer, and half of six in the other."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(6, 4, 1, groups=2)
        self.other = nn.Conv1d(3, 4, 1)
        self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(x[..., None]) + self.conv(torch.cat([x, x], -1)[..., None])


class MadeOf(nn.Module):
    """A weight that another layer's is computed from."""

    def __init__(self):
        super().__init__()
        self.plain, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.other.weight = self.plain.weight
        parametrize.register_parametrization(self.other, "weight", nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x) + self.other(x)


@pytest.mark.parametrize(
    ("make", "x", "shared", "named"),
    [
        (MadeOf, torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), "plain.weight", "plain"),
        (EmbeddingHead, torch.arange(5), "embedding.weight", "head"),
        (OtherGroups, torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), "conv.weight", "conv"),
    ],
    ids=["made of it", "embedding and head", "other groups"],
)
def test_weights_that_share_no_input_space_are_passed_by(make, x, shared, named):
    torch.manual_seed(0)
    model = make().double()
    x = x if x.dtype == torch.int64 else x.double()
    p = model.get_parameter(shared)
    before = copies(p)
    with pytest.warns(UserWarning, match=f"'{named}' shares its weight"):
        stepped(model, lambda: model(x))
    torch.testing.assert_close(p.detach(), before[0] - 0.1 * p.grad)


# --- what is passed by -----------------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """Layers that are called in ways that hooks do not see."""

    def __init__(self):
        super().__init__()
        self.seen, self.by_forward, self.by_function, self.unused = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.by_forward.forward(self.seen(x))
        return nn.functional.linear(x, self.by_function.weight, self.by_function.bias)


PASSED_BY: list[tuple[str, Callable[[], nn.Module], str]] = [
    ("weight norm", lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "is parametrized"),
    ("spectral norm", lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), "is parametrized"),
    ("old weight norm", lambda: _old_weight_norm(nn.Linear(4, 4)), "computes its weight"),
    ("pruned", lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5), "computes its weight"),
]


def _old_weight_norm(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


@pytest.mark.parametrize(("make", "why"), [row[1:] for row in PASSED_BY], ids=[row[0] for row in PASSED_BY])
def test_layers_that_compute_their_weights_keep_their_gradient(make, why):
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Linear(4, 2)).double()
    x = data(6, 4)
    params = list(model[0].parameters())
    before = copies(*params, *model[1].parameters())
    with pytest.warns(UserWarning) as caught:
        stepped(model, lambda: model(x))
    (message,) = [str(w.message) for w in caught if "input statistics" in str(w.message)]
    assert "'0" in message and why in message and "'1'" not in message
    for p, old in zip(params, before, strict=False):
        torch.testing.assert_close(p.detach(), old - 0.1 * p.grad)
    check = model[1]
    assert not torch.allclose(check.weight, before[len(params)] - 0.1 * check.weight.grad)


def test_one_warning_names_them_all():
    model = nn.Sequential(*(row[1]() for row in PASSED_BY))
    with pytest.warns(UserWarning) as caught:
        PreconditionedGD(model, preconditioner=BNP())
    (message,) = [str(w.message) for w in caught]
    assert all(f"'{k}" in message for k in range(len(PASSED_BY)))


def test_other_layers_keep_their_gradient_without_a_word():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.PReLU(), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    params = [p for module in list(model)[:-1] for p in module.parameters()]
    before = copies(*params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(model, lambda: model(torch.arange(5)))
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * p.grad)


def test_layers_that_hooks_do_not_see_keep_their_gradient():
    torch.manual_seed(0)
    model, x = Functional().double(), data(6, 4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stepped(model, lambda: model(x))
    for name, p in model.named_parameters():
        if name.startswith("by_"):
            torch.testing.assert_close(p.detach(), before[name] - 0.1 * p.grad)
        if name.startswith("unused"):
            assert torch.equal(p, before[name])
    check_step([model.seen.weight, model.seen.bias], x, [before["seen.weight"], before["seen.bias"]])


def test_one_warning_where_nothing_is_observed_at_all():
    layer, x = nn.Linear(4, 4).double(), data(6, 4)
    optimizer = PreconditionedGD(layer, lr=0.1, preconditioner=BNP())
    before = copies(layer.weight)
    for step in range(3):
        optimizer.zero_grad()
        layer.forward(x).square().mean().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        assert [("no layer inputs" in str(w.message)) for w in caught] == [True] * (step == 0)
        if step == 0:
            torch.testing.assert_close(layer.weight.detach(), before[0] - 0.1 * layer.weight.grad)


def test_a_layer_without_inputs_in_a_step_keeps_its_statistics():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)]).double()
    optimizer = PreconditionedGD(model, lr=0.1, preconditioner=BNP())
    for used in ((0, 1), (0,), (1,)):
        optimizer.zero_grad()
        sum(model[k](data(6, 4, seed=k)).square().mean() for k in used).backward()
        optimizer.step()
    counts = [optimizer.state[layer.weight]["count"].item() for layer in model]
    assert counts == [12, 12]
