"""BNP with exact statistics on raw data is gradient descent on standardized data, and invariant under affine changes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from precond import BNP, RMS, AdaGrad, Fixed, Momentum, PreconditionedGD, Route

torch.set_num_threads(1)
N, FEATURES, LR, STEPS = 40, 5, 0.3, 25


def raw_data() -> Tensor:
    make = torch.Generator().manual_seed(0)
    mixing = torch.randn(FEATURES, FEATURES, generator=make, dtype=torch.float64)
    scales = torch.tensor([1e-2, 1.0, 50.0, 3.0, 0.2], dtype=torch.float64)
    return torch.randn(N, FEATURES, generator=make, dtype=torch.float64) @ mixing * scales + 3 * scales


X = raw_data()
MEAN, STD = X.mean(0), X.std(0, correction=0)
TARGETS = torch.randn(N, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@dataclass
class Problem:
    name: str
    make: Callable[[], nn.Module]
    loss: Callable[[Tensor], Tensor]

    def __repr__(self) -> str:
        return self.name

    def build(self) -> nn.Module:
        torch.manual_seed(2)
        return self.make().double()


PROBLEMS = [
    Problem("linear regression", lambda: nn.Sequential(nn.Linear(FEATURES, 2)), lambda y: F.mse_loss(y, TARGETS) / 2),
    Problem(
        "logistic regression",
        lambda: nn.Sequential(nn.Linear(FEATURES, 1)),
        lambda y: F.binary_cross_entropy_with_logits(y[:, 0], (TARGETS[:, 0] > 0).double()),
    ),
    Problem(
        "first layer of an MLP",
        lambda: nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, 2)),
        lambda y: F.mse_loss(y, TARGETS),
    ),
]


def first_layer(leaf) -> bool:
    return leaf.name.startswith("0.")


def moved(layer: nn.Linear, shift: Tensor, scale: Tensor) -> None:
    """The same function of (x − shift)/scale that the layer is of x."""
    with torch.no_grad():
        layer.bias += layer.weight @ shift
        layer.weight *= scale


def outputs(model: nn.Module, x: Tensor, problem: Problem, optimizer) -> list[Tensor]:
    out = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        y = model(x)
        out.append(y.detach())
        problem.loss(y).backward()
        optimizer.step()
    return out


@pytest.mark.parametrize("decay", [0.0, 0.99])
@pytest.mark.parametrize("momentum", [None, Momentum(0.8, "heavy_ball")], ids=["plain", "momentum"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_bnp_on_raw_data_is_gd_on_standardized_data(problem, momentum, decay):
    raw, standardized = problem.build(), problem.build()
    moved(standardized[0], MEAN, STD)
    bnp = Route([(first_layer, BNP(decay=decay, damping=0.0))], otherwise=Fixed())
    opt = PreconditionedGD(raw, LR, preconditioner=bnp, momentum=momentum)
    other = PreconditionedGD(standardized, LR, preconditioner=Fixed(), momentum=momentum)
    a, b = outputs(raw, X, problem, opt), outputs(standardized, (X - MEAN) / STD, problem, other)
    for y, y_ in zip(a, b, strict=True):
        torch.testing.assert_close(y, y_, rtol=1e-10, atol=1e-10)
    # The parameters themselves: p = P z.
    layer, z = raw[0], standardized[0]
    torch.testing.assert_close(layer.weight, z.weight / STD, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(layer.bias, z.bias - (z.weight / STD) @ MEAN, rtol=1e-9, atol=1e-9)
    assert (a[-1] - a[0]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("inner", "damping", "shift"),
    [
        (None, 0.0, True),
        (None, 0.01, False),  # damping by E[h²] is blind to scales alone
        (RMS(eps=0.0), 0.0, True),
        (AdaGrad(eps=0.0), 0.01, False),
    ],
    ids=["BNP", "BNP damped", "BNP @ RMS", "BNP @ AdaGrad damped"],
)
@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_training_does_not_see_affine_changes_of_the_data(problem, inner, damping, shift):
    b = torch.tensor([3.0, -1.0, 0.5, 10.0, 0.0], dtype=torch.float64) * shift
    a = torch.tensor([2.0, 0.1, -5.0, 1.0, 30.0], dtype=torch.float64)
    outer = BNP(damping=damping)
    preconditioner = Route([(first_layer, outer if inner is None else outer @ inner)], otherwise=Fixed())
    lr = LR if inner is None else 0.02
    changed, plain = problem.build(), problem.build()
    moved(changed[0], -b / a, 1 / a)  # for inputs ax + b
    y = outputs(plain, X, problem, PreconditionedGD(plain, lr, preconditioner=preconditioner))
    y_ = outputs(changed, a * X + b, problem, PreconditionedGD(changed, lr, preconditioner=preconditioner))
    torch.testing.assert_close(y[0], y_[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(y[-1], y_[-1], rtol=1e-7, atol=1e-7)
    assert (y[-1] - y[0]).abs().max() > 0.05


def test_layers_without_bias_do_not_see_scales():
    problem = Problem("no bias", lambda: nn.Sequential(nn.Linear(FEATURES, 2, bias=False)), PROBLEMS[0].loss)
    a = torch.tensor([2.0, 0.1, -5.0, 1.0, 30.0], dtype=torch.float64)
    plain, changed = problem.build(), problem.build()
    with torch.no_grad():
        changed[0].weight /= a
    y = outputs(plain, X, problem, PreconditionedGD(plain, 0.1, preconditioner=BNP()))
    y_ = outputs(changed, a * X, problem, PreconditionedGD(changed, 0.1, preconditioner=BNP()))
    torch.testing.assert_close(y[-1], y_[-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "positions"), [(nn.Conv1d, (4,)), (nn.Conv2d, (2, 3))], ids=["1d", "2d"])
def test_convolutions_of_one_position_are_linear_layers(kind, positions):
    """A 1×1 convolution and a linear layer on the same samples take the same steps."""
    x = X[:24]
    torch.manual_seed(0)
    conv, linear = kind(FEATURES, 3, 1).double(), nn.Linear(FEATURES, 3).double()
    linear.load_state_dict({"weight": conv.weight.detach().flatten(1), "bias": conv.bias.detach()})
    for module, inputs in ((conv, x.reshape(-1, *positions, FEATURES).movedim(-1, 1)), (linear, x)):
        optimizer = PreconditionedGD(module, 0.1, preconditioner=BNP())
        module(inputs).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(conv.weight.flatten(1), linear.weight, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(conv.bias, linear.bias, rtol=1e-10, atol=1e-12)
