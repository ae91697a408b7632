"""The Hessian of single neurons against dense ones, on layers of every kind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from precond.curvature import (
    Objective,
    neuron_hessians,
)

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
