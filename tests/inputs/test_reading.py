"""Layers called in unusual ways: their inputs are read, or passed by with one warning; nothing is raised into a forward."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import precond
from inputs.layers import data
from inputs.steps import check_step, copies
from precond import BNP, PreconditionedGD

torch.set_num_threads(1)
X = data(12, 4)
OURS = "no (input statistics|layer inputs)"
OBSERVING = ["bnp", "whitening", "auto"]


class Keyword(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class ScaleFirst(nn.Linear):
    def forward(self, scale, x):
        return scale * F.linear(x, self.weight, self.bias)


class Residual(nn.Linear):
    def forward(self, x, residual):
        return F.linear(x, self.weight, self.bias) + residual.sum()


class Any_(nn.Linear):
    def forward(self, *args, **kwargs):
        return F.linear([*args, *kwargs.values()][-1], self.weight, self.bias)


class InList(nn.Linear):
    def forward(self, things):
        return F.linear(things[0], self.weight, self.bias)


class InDict(nn.Linear):
    def forward(self, *, batch):
        return F.linear(batch["h"]["values"], self.weight, self.bias)


class NoArguments(nn.Linear):
    def forward(self):
        return F.linear(X, self.weight, self.bias)


class Pair(nn.Linear):
    def forward(self, a, b):
        return F.linear(a + b, self.weight, self.bias)


class Tokens(nn.Linear):
    def forward(self, i):
        return F.linear(F.one_hot(i, 4).to(self.weight), self.weight, self.bias)


class Flattening(nn.Linear):
    def forward(self, x):
        return F.linear(x.flatten(1), self.weight, self.bias)


class Dequantizing(nn.Linear):
    def forward(self, input):
        return F.linear(input.dequantize().double(), self.weight, self.bias)


class NamedConv(nn.Conv2d):
    def forward(self, x, scale=1.0):
        return scale * F.conv2d(x, self.weight, self.bias)


class Stubborn(Tensor):
    """A tensor whose class answers no function."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return F.linear(args[0].as_subclass(Tensor), *args[1:])
        if func in (Tensor.as_subclass, Tensor.device.__get__, Tensor.is_nested.__get__, Tensor.layout.__get__):
            return super().__torch_function__(func, types, args, kwargs or {})
        raise NotImplementedError(func)


def patched() -> nn.Linear:
    """As accelerate's hooks do: a forward of the instance's own."""
    layer = nn.Linear(4, 3)
    layer.forward = MethodType(lambda self, *args, **kwargs: F.linear(kwargs["x"], self.weight, self.bias), layer)
    return layer


def jagged(layout: Any) -> Tensor:
    return torch.nested.nested_tensor(list(X.split([5, 7])), layout=layout)


READ: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "by another name": (lambda: Keyword(4, 3), lambda m: m(x=X)),
    "second": (lambda: ScaleFirst(4, 3), lambda m: m(2.0, X)),
    "beside another of its shape": (lambda: Residual(4, 3), lambda m: m(X, 3 * X)),
    "any arguments": (lambda: Any_(4, 3), lambda m: m("what", X)),
    "in a list": (lambda: InList(4, 3), lambda m: m([X, "what"])),
    "in dictionaries": (lambda: InDict(4, 3), lambda m: m(batch={"h": {"values": X}, "n": 3})),
    "of a patched forward": (patched, lambda m: m(x=X)),
    "jagged": (lambda: nn.Linear(4, 3), lambda m: m(jagged(torch.jagged)).values()),
    "nested": (lambda: nn.Linear(4, 3), lambda m: torch.cat(m(jagged(torch.strided)).unbind())),
    "of a stubborn class": (lambda: nn.Linear(4, 3), lambda m: m(X.as_subclass(Stubborn))),
    "a parameter": (lambda: nn.Linear(4, 3), lambda m: m(nn.Parameter(X))),
    "a convolution's, by another name": (
        lambda: NamedConv(4, 3, 1),
        lambda m: m(x=X.reshape(12, 4, 1, 1)).reshape(12, 3),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_inputs_are_found(name):
    make, call = READ[name]
    torch.manual_seed(0)
    layer = make().double()
    optimizer = PreconditionedGD(layer, lr=0.1, preconditioner=BNP(decay=0.0, damping=0.0))
    before = copies(layer.weight, layer.bias)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=OURS)
        call(layer).square().mean().backward()
        optimizer.step()
    if layer.weight.ndim > 2:  # a row is what a pixel sees
        layer = _flattened(layer)
        before[0] = before[0].flatten(1)
    check_step([layer.weight, layer.bias], X, before)


@dataclass
class _Flat:
    weight: Tensor
    bias: Tensor


def _flattened(conv: nn.Conv2d) -> Any:
    flat = conv.weight.detach().flatten(1)
    flat.grad = conv.weight.grad.flatten(1)
    return _Flat(flat, conv.bias)


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class Wrapped(nn.MultiheadAttention):
    def forward(self, query, key, value, **options):
        return super().forward(query, key, value, need_weights=False, **options)[0]


PASSED_BY: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], str, str]] = {
    "sparse": (lambda: nn.Linear(4, 3), lambda m: m(X.to_sparse()), "weight", "was given a sparse tensor"),
    "sparse by rows": (lambda: nn.Linear(4, 3), lambda m: m(X.to_sparse_csr()), "weight", "was given a sparse tensor"),
    "two of one shape": (
        lambda: Pair(4, 3),
        lambda m: m(X, X + 1),
        "weight",
        r"several tensors that Pair.forward was given \(a, b\)",
    ),
    "no argument": (lambda: NoArguments(4, 3), lambda m: m(), "weight", "no tensor"),
    "numbers of tokens": (lambda: Tokens(4, 3), lambda m: m(torch.arange(4)), "weight", "no tensor"),
    "of another shape": (lambda: Flattening(4, 3), lambda m: m(X.reshape(12, 2, 2)), "weight", r"shapes \(12, 2, 2\)"),
    "quantized": (
        lambda: Dequantizing(4, 3),
        lambda m: m(torch.quantize_per_tensor(X.float(), 0.1, 0, torch.qint8)),
        "weight",
        "no tensor",
    ),
    "what reaches out_proj": (
        lambda: SelfAttention(4, 2),
        lambda m: m(X[None]),
        "out_proj.weight",
        "makes of its argument",
    ),
}


@pytest.mark.parametrize("recipe", OBSERVING)
@pytest.mark.parametrize("name", PASSED_BY)
def test_what_cannot_be_read_is_passed_by_with_one_warning(name, recipe):
    make, call, weight, why = PASSED_BY[name]
    torch.manual_seed(0)
    model = make().double()
    optimizer = precond.RECIPES[recipe](model)
    said = []
    for _ in range(3):
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=OURS)
            call(model).square().mean().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        said += [str(w.message) for w in caught]
    (message,) = said
    assert f"'{weight}'" in message
    (row,) = [row for row in optimizer.explain().rows if row.name == weight]
    for text in (message, row.why):
        assert re.search(why, text), text


def test_a_subclass_of_attention_with_the_same_arguments_is_read_as_such():
    torch.manual_seed(0)
    models = [cls(4, 2) for cls in (Wrapped, nn.MultiheadAttention)]
    models[0].load_state_dict(models[1].state_dict())
    x = torch.randn(5, 3, 4)
    for model in models:
        optimizer = precond.bnp(model)
        out = model(x, x, x, attn_mask=torch.ones(5, 5).triu(1).bool())
        (out[0] if isinstance(out, tuple) else out).square().mean().backward()
        optimizer.step()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q)


def test_self_attention_is_read_from_its_one_argument():
    torch.manual_seed(0)
    model, x = SelfAttention(4, 2).double(), data(7, 4)
    optimizer = PreconditionedGD(model, preconditioner=BNP())
    with pytest.warns(UserWarning, match="out_proj"):
        model(x[:, None]).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(optimizer.state[model.in_proj_weight]["mean"], x.mean(0).expand(3, 4))


@pytest.mark.parametrize("context", ["meta", "fake", "empty"])
def test_forwards_without_numbers_show_nothing(context):
    layer = nn.Linear(4, 3).double()
    optimizer = precond.bnp(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if context == "fake":
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                layer(mode.from_tensor(X))
        else:
            _Hooked(layer)(X.to("meta") if context == "meta" else X[:0])
        layer(X).sum().backward()
        optimizer.step()
    assert optimizer.state[layer.weight]["count"].item() == 12


class _Hooked(nn.Module):
    """Runs a layer's pre-hooks on an input that its weight could not be multiplied with."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> None:
        for hook in self.layer._forward_pre_hooks.values():
            hook(self.layer, (x,), {})


def test_wrong_shapes_raise_the_layers_own_error():
    layer = nn.Sequential(nn.Linear(4, 3))
    precond.bnp(layer)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.randn(5, 6))


@pytest.mark.parametrize("make", [lambda: Keyword(4, 3), lambda: nn.LSTM(4, 3), lambda: SelfAttention(4, 2)])
def test_under_autocast(make):
    model, x = make(), X.float()[:, None]
    optimizer = precond.whitening(model)
    for _ in range(2):
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x)
            (out[0] if isinstance(out, tuple) else out).float().square().mean().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.state[next(model.parameters())]["outer.count"].min() == 24
