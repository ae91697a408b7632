"""Residuals of differential equations, their Jacobian and natural steps, against torch's own derivatives of flat vectors."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.func import grad, hessian

from precond.algebra import vec
from precond.algebra.maps import Woodbury
from precond.analysis.curvature import Equation, Residuals, natural_steps


def laplacian(u, x):
    return hessian(lambda x: u(x).sum())(x).trace()


def poisson(seed: int = 0, width: int = 8) -> tuple[nn.Module, Residuals]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1)).double()
    inside, side = torch.rand(12, 2).double(), torch.rand(5, 1).double()
    source = lambda x: 2 * math.pi**2 * (math.pi * x).sin().prod()  # noqa: E731
    edge = torch.cat([torch.zeros_like(side), side], 1)
    equations = [Equation(lambda u, x: laplacian(u, x) + source(x), inside), Equation(lambda u, x: u(x), edge, weight=4.0)]
    return model, Residuals(model, equations)


def by_hand(model: nn.Module, r: Residuals) -> torch.Tensor:
    """The residuals by reverse passes through batches, one coordinate after the other."""
    inside, edge = (e.points for e in r.equations)
    x = inside.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    second = sum(torch.autograd.grad(g[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2))
    source = 2 * math.pi**2 * (math.pi * inside).sin().prod(1)
    return torch.cat([(second + source) / len(inside) ** 0.5, 2.0 * model(edge)[:, 0] / len(edge) ** 0.5])


def test_residuals_and_their_jacobian():
    model, r = poisson()
    expected = by_hand(model, r)
    torch.testing.assert_close(r(), expected, rtol=1e-11, atol=1e-12)
    rows = [
        vec.flatten(torch.autograd.grad(e, r.params, retain_graph=True, allow_unused=True, materialize_grads=True))
        for e in expected
    ]
    values, R = r.linearized()
    torch.testing.assert_close(values, expected.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(R, torch.stack(rows), rtol=1e-10, atol=1e-12)
    g = vec.flatten(torch.autograd.grad(r.loss(), r.params))
    torch.testing.assert_close(g, R.T @ values, rtol=1e-10, atol=1e-12)
    M = torch.linalg.inv(R.T @ R + 1e-2 * torch.eye(R.shape[1], dtype=R.dtype))
    P = r.preconditioner(1e-2)
    torch.testing.assert_close(vec.flatten(P.gram(vec.unflatten(g, P.like))), M @ g, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(vec.flatten(P.fitted(values)), M @ g, rtol=1e-9, atol=1e-11)


def test_the_first_step_is_gauss_newtons():
    _, r = poisson()
    values, R = r.linearized()
    loss = float(values.square().sum()) / 2
    old = vec.flatten(vec.map_(lambda p: p.detach().clone(), r.params))
    found = next(natural_steps(r, damping=0.3))
    M = torch.linalg.inv(R.T @ R + 0.3 * loss * torch.eye(R.shape[1], dtype=R.dtype))
    step, taken = M @ R.T @ values, old - vec.flatten(r.params).detach()
    eta = float(taken @ step / (step @ step))
    assert math.log2(eta) == pytest.approx(round(math.log2(eta)), abs=1e-9)
    torch.testing.assert_close(taken, eta * step, rtol=1e-9, atol=1e-12)
    assert found < loss and found == pytest.approx(float(r.loss().detach()))


def test_momentum_is_springs():
    _, r = poisson()
    steps = natural_steps(r, damping=0.3, momentum=0.7)
    values, R = r.linearized()
    first = Woodbury(R, 0.3 * float(values.square().sum()) / 2, r.params).fitted(values)
    next(steps)
    values, R = r.linearized()
    old, delta, before = vec.flatten(r.params).detach().clone(), 0.3 * float(values.square().sum()) / 2, vec.flatten(first)
    next(steps)
    inner = torch.linalg.solve(R @ R.T + delta * torch.eye(len(R), dtype=R.dtype), values - 0.7 * R @ before)
    step, taken = 0.7 * before + R.T @ inner, old - vec.flatten(r.params).detach()
    torch.testing.assert_close(taken, float(taken @ step / (step @ step)) * step, rtol=1e-8, atol=1e-11)


def test_a_linear_problem_takes_one_step():
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    x = torch.rand(20, 3).double()
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 0.3
    points = torch.cat([x, y[:, None]], 1)
    r = Residuals(model, [Equation(lambda u, x: u(x[:3]) - x[3], points)])
    assert next(natural_steps(r, damping=0.0)) < 1e-20
    torch.testing.assert_close(model.bias.data, torch.tensor([0.3], dtype=torch.float64), rtol=0, atol=1e-9)


def test_it_solves_a_differential_equation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    x = torch.linspace(0, 1, 30).double()[:, None]
    slope = lambda u, x: grad(lambda x: u(x).sum())(x)[0]  # noqa: E731
    ends = Equation(lambda u, x: u(x) - 1, torch.zeros(1, 1).double())
    r = Residuals(model, [Equation(lambda u, x: slope(u, x) + 2 * u(x)[0], x), ends])
    losses = [loss for loss, _ in zip(natural_steps(r), range(60), strict=False)]
    assert all(b < a for a, b in pairwise(losses))
    assert (model(x) - (-2 * x).exp()).abs().max() < 1e-5


def test_a_frozen_layer_and_vector_residuals():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[0].requires_grad_(False)
    r = Residuals(model, [Equation(lambda u, x: u(x) - x, torch.rand(6, 2).double())])
    values, R = r.linearized()
    assert r.names == ("2.weight", "2.bias") and R.shape == (12, 10)
    expected = (model(r.equations[0].points) - r.equations[0].points).flatten() / 6**0.5
    torch.testing.assert_close(values, expected.detach())


def test_refusals():
    model, r = poisson()
    e = r.equations[0]
    cases = {
        "equations is empty": lambda: Residuals(model, []),
        r"equations\[0\].points must be a matrix \(m, d\), got shape \(12,\)": lambda: Residuals(
            model, [Equation(e.residual, e.points[:, 0])]
        ),
        r"equations\[0\].weight must be >= 0, got -1": lambda: Residuals(model, [Equation(e.residual, e.points, -1)]),
        "damping must be >= 0, got -1": lambda: next(natural_steps(r, -1)),
        r"momentum must lie in \[0, 1\), got 1": lambda: next(natural_steps(r, momentum=1)),
        "no parameter that requires a gradient": lambda: Residuals(nn.Tanh(), [e]),
        r"rows must be a matrix \(m, n\), got shape \(2,\)": lambda: Woodbury(torch.ones(2), 1.0),
        "damping must be > 0, got 0": lambda: Woodbury(torch.ones(1, 2), 0),
        "rows have 2 columns, the vectors 3 entries": lambda: Woodbury(torch.ones(1, 2), 1.0, (torch.ones(3),)),
    }
    for words, call in cases.items():
        with pytest.raises(ValueError, match=words):
            call()


def test_rows_that_are_no_numbers_are_named():
    P = Woodbury(torch.full((1, 2), torch.nan), 1.0)
    with pytest.raises(torch.linalg.LinAlgError, match="are the rows finite"):
        P.gram((torch.ones(2),))
