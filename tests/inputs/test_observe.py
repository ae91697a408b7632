"""observe(): the inputs of layers for an optimizer of any kind, against what explicit sums say."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import precond
from inputs.layers import data
from precond.optim.inputs import Request, observe

torch.set_num_threads(1)


def close(a: Tensor, b: Tensor) -> None:
    """float64 sums of some dozen numbers."""
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


class HFConv1D(nn.Module):
    """A product with a weight (in, out)."""

    def __init__(self):
        super().__init__()
        self.nf = 3
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x @ self.weight + self.bias


HFConv1D.__name__ = "Conv1D"


def patches(x: Tensor, kernel: int, groups: int = 1, **options) -> Tensor:
    """(groups, N, n) by unfold."""
    B, C = x.shape[:2]
    cols = F.unfold(x, kernel, **options).reshape(B, groups, C // groups * kernel**2, -1)
    return cols.permute(1, 0, 3, 2).flatten(1, 2)


LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4), lambda x: x[None]),
    "linear, sequences": (lambda: nn.Linear(4, 3, bias=False), (5, 2, 4), lambda x: x.reshape(1, -1, 4)),
    "inputs first": (HFConv1D, (5, 4), lambda x: x[None]),
    "conv": (lambda: nn.Conv2d(4, 6, 2, stride=2, padding=1), (3, 4, 5, 5), lambda x: patches(x, 2, stride=2, padding=1)),
    "conv, groups": (lambda: nn.Conv2d(4, 6, 2, groups=2), (3, 4, 5, 5), lambda x: patches(x, 2, groups=2)),
}


class HasModule(nn.Module):
    """No wrapper, though it has a part of that name, in which a layer is called as one beside it."""

    def __init__(self, part="module"):
        super().__init__()
        self.part, self.fc = part, nn.Linear(3, 2).double()
        self.add_module(part, nn.ModuleDict({"fc": nn.Linear(4, 3).double()}))

    def forward(self, x):
        return self.fc(self.get_submodule(self.part)["fc"](x).tanh())


def test_layers_that_are_called_alike_but_for_a_prefix_are_told_apart():
    model, x = HasModule(), data(5, 4)
    with observe(model, Request("moments")) as observation:
        model(x)
        found = {inputs.name: inputs.mean for inputs in observation}
    close(found["module.fc.weight"], x.mean(0)[None])
    close(found["fc.weight"], model.module["fc"](x).tanh().mean(0)[None])


@pytest.mark.parametrize("recipe", ["bnp", "whitening", "auto"])
def test_they_are_stepped_as_under_other_names(recipe):
    ends = []
    for part in ("module", "other"):
        torch.manual_seed(0)
        model = HasModule(part)
        for p in sorted(model.parameters(), key=lambda p: p.shape):
            nn.init.normal_(p)
        optimizer = precond.RECIPES[recipe](model, lr=0.1)
        for k in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 4, generator=torch.Generator().manual_seed(k)).double()).square().mean().backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", LAYERS)
def test_moments_are_those_of_all_rows(name):
    make, shape, rows = LAYERS[name]
    torch.manual_seed(0)
    layer = make().double()
    with observe(layer) as inputs:
        first, second = data(*shape), data(*shape, seed=1)
        layer(first).square().sum().backward()
        layer(second).square().sum().backward()  # a micro-batch
        (seen,) = inputs
    h = torch.cat([rows(first), rows(second)], 1)
    assert seen.count.tolist() == [h.shape[1]] * len(h) and seen.weight is layer.weight and seen.name == "weight"
    close(seen.mean, h.mean(1))
    close(seen.gram, h.mT @ h / h.shape[1])
    close(seen.variance, h.var(1, correction=0))
    extended = torch.cat([torch.ones_like(h[..., :1]), h], 2)
    close(seen.extended_gram, extended.mT @ extended / h.shape[1])


@pytest.mark.parametrize("name", [*LAYERS, "transposed conv"])
def test_rows_are_what_the_inputs_multiply(name):
    """The layer's outputs without its bias are h·rowsᵀ, so that a product of rows from the right is one of what it receives."""
    make = LAYERS[name][0] if name in LAYERS else lambda: nn.ConvTranspose2d(4, 6, 2, groups=2)
    shape = LAYERS[name][1] if name in LAYERS else (3, 4, 5, 5)
    torch.manual_seed(0)
    layer = make().double()
    with observe(layer) as inputs:
        layer(data(*shape)).sum().backward()
        (seen,) = inputs
    rows = seen.rows(layer.weight.detach())
    assert rows.shape[0] == len(seen.mean) and rows.shape[2] == seen.mean.shape[1]
    assert torch.equal(seen.weight_of(rows), layer.weight.detach())
    # The gradient of the sum of outputs has N·μ in every row.
    close(seen.rows(layer.weight.grad), (seen.count[:, None] * seen.mean)[:, None].expand_as(rows))


class Net(nn.Module):
    """With a body that may be checkpointed, and a part that is not called as a layer."""

    def __init__(self, how=lambda body, x: body(x)):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5))
        self.head, self.odd = nn.Linear(5, 2), nn.Parameter(torch.eye(2))
        self.how = how

    def forward(self, x):
        return self.head(self.how(self.body, x)) @ self.odd


def made(how=None) -> Net:
    torch.manual_seed(0)
    return (Net() if how is None else Net(how)).double()


def explicit(model: Net, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        hidden = model.body[1](model.body[0](x))
        found = {"body.0.weight": x, "body.2.weight": hidden, "head.weight": model.body[2](hidden)}
    return {name: h.T @ h / len(h) for name, h in found.items()}


def check(inputs, model: Net, x: Tensor) -> None:
    found = {seen.name: seen.gram[0] for seen in inputs}
    want = explicit(model, x)
    assert found.keys() == want.keys()
    for name, gram in want.items():
        close(found[name], gram)


@pytest.mark.parametrize("reentrant", [False, True, None])
def test_nothing_changes_and_repeated_forwards_count_once(reentrant):
    how = None if reentrant is None else lambda body, x: checkpoint(body, x, use_reentrant=reentrant)
    plain, model = made(how), made(how)
    x = data(12, 4)
    inputs = observe(model)
    for m in (plain, model):
        m(x.clone().requires_grad_()).square().sum().backward()
    check(inputs, model, x)
    assert all(seen.count.tolist() == [12] for seen in inputs)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    inputs.close()
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    torch._dynamo.reset()
    model, x = made(), data(12, 4)
    compiled = torch.compile(model, backend=backend)
    with observe(compiled) as inputs:
        compiled(x).square().sum().backward()
        check(inputs, model, x)
        inputs.clear()
        compiled(x[:5]).square().sum().backward()
        check(inputs, model, x[:5])
    torch._dynamo.reset()


def test_forwards_that_do_not_count():
    model, x = made(), data(12, 4)
    with observe(model) as inputs:
        model.eval()(x).sum().backward()
        with torch.no_grad():
            model.train()(x)
        inputs.enabled = False
        model(x).sum().backward()
        assert inputs.collect() == {}
        inputs.enabled = True
        model(x).sum().backward()
        check(inputs, model, x)


def test_an_optimizer_s_step_ends_it_and_finds_it():
    model, x = made(), data(12, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = observe(model, optimizer=optimizer)
    seen_in_step = []
    optimizer.register_step_pre_hook(lambda *_: seen_in_step.append(inputs.collect()[model.head.weight]))
    for k in range(2):
        optimizer.zero_grad()
        now = explicit(model, x[k:])["head.weight"]
        model(x[k:]).square().sum().backward()
        optimizer.step()
        close(seen_in_step[k].gram[0], now)
        assert seen_in_step[k].count.tolist() == [12 - k] and inputs.collect() == {}


def test_a_step_by_the_input_gram_is_foof():
    """G(E[hhᵀ])⁻¹, through rows and weight_of, is least squares' Newton step."""
    layer, x = nn.Linear(4, 2, bias=False).double(), data(30, 4)
    y = data(30, 2, seed=3)
    with observe(layer) as inputs:
        (0.5 * (layer(x) - y).square().sum(1).mean()).backward()
        (seen,) = inputs
    step = seen.weight_of(torch.linalg.solve(seen.gram, seen.rows(layer.weight.grad), left=False))
    with torch.no_grad():
        layer.weight -= step
    close(layer.weight.detach(), torch.linalg.lstsq(x, y).solution.T)


def test_several_requests():
    layer, x = nn.Conv2d(2, 3, 2).double(), data(4, 2, 5, 5)
    patch = Request("moments", "patch")
    with observe(layer, ["covariance", "moments", patch]) as inputs:
        layer(x).sum().backward()
        gram, channel, entry = (inputs.collect(r)[layer.weight] for r in ("covariance", "moments", patch))
        with pytest.raises(ValueError, match=r"request must be one of .*got None"):
            inputs.collect()
    assert gram.gram.shape == (1, 8, 8) and entry.variance.shape == (1, 8)
    close(channel.mean[0], x.mean((0, 2, 3)))
    close(entry.variance, gram.variance)
    with pytest.raises(ValueError, match='weight: only moments were asked for; ask observe\\(\\) for "covariance"'):
        channel.gram  # noqa: B018


def test_recurrent_layers_and_attention():
    torch.manual_seed(0)
    rnn, attention = nn.LSTM(3, 4, batch_first=True).double(), nn.MultiheadAttention(4, 2, batch_first=True).double()
    model, x = nn.ModuleList([rnn, attention]), data(5, 6, 3)
    with observe(model) as inputs:
        h = rnn(x)[0]
        attention(h, h, h)[0].sum().backward()
        seen = {s.name: s for s in inputs}
    before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1).reshape(-1, 4).detach()
    close(seen["0.weight_hh_l0"].gram[0], before.T @ before / 30)
    assert seen["1.in_proj_weight"].gram.shape == (3, 4, 4) and seen["1.out_proj.weight"].count.tolist() == [30]


def test_what_is_not_observed_is_said():
    model = made()
    with observe(model, params=[model.head.weight, model.odd]) as inputs:
        assert list(inputs.weights.values()) == ["head.weight"]
        assert "is a parameter that Net has beside its layers" in inputs.unobserved[model.odd]
        model(data(3, 4)).sum().backward()
        assert list(inputs.collect()) == [model.head.weight]
    biased = observe(model, params=[model.head.bias])
    assert "is no weight of a layer" in biased.unobserved[model.head.bias]


def test_what_cannot_be_read_is_said_and_forgotten():
    model = nn.Linear(2, 1)
    with observe(model) as inputs, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(torch.eye(2).to_sparse()).sum().backward()
        assert "sparse" in inputs.unobserved[model.weight] and inputs.collect() == {}
        inputs.clear()
        assert not inputs.unobserved


def test_the_hooks_go_with_the_handle():
    model = made()
    handle = observe(model)
    assert model.head._forward_pre_hooks
    del handle
    assert not model.head._forward_pre_hooks


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: observe(m, "gram"), ValueError, "requests must be a Request or one of moments, covariance, got 'gram'"),
        (lambda m: observe(m, []), ValueError, "requests is empty"),
        (lambda m: observe(m, params=[torch.zeros(3)]), ValueError, r"shape \(3,\) that is no parameter of the model"),
        (lambda m: observe(list(m.parameters())), TypeError, "model must be an nn.Module, got list"),
    ],
)
def test_bad_input(call, error, message):
    model = made()
    with pytest.raises(error, match=message):
        call(model)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_gallery_s_example(capsys):
    """It holds a step against least squares, and prints losses with and without what it feeds."""
    pytest.importorskip("matplotlib").use("Agg")
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "feed_another_optimizer.py"))
    plain, fed = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[:2])
    assert fed < plain
