"""Invariances of networks: found, checked in numbers, and only those that hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvature.cases import CROSS, hessian_of, penalized
from precond.algebra import vec
from precond.algebra.maps import Diagonal, InverseRoot
from precond.analysis.curvature import Objective, condition_number, eigenvalues, hessian, invariances


def conv(activation=nn.ReLU, **options):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, **options),
        activation(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 2, groups=2),
        activation(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


CASES = {
    # model, input shape, kinds with counts, tolerance
    "relu": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
        (6,),
        {"softmax": 6, "positive scale": 5},
        None,
    ),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.LeakyReLU(), nn.Dropout(0.5), nn.Linear(5, 3, bias=False)),
        (6,),
        {"softmax": 5, "positive scale": 5},
        None,
    ),
    "three layers": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)),
        (6,),
        {"softmax": 5, "positive scale": 9},
        None,
    ),
    "conv": (conv, (1, 8, 8), {"softmax": 17, "positive scale": 8}, None),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose1d(2, 4, 3, groups=2), nn.PReLU(), nn.ConvTranspose1d(4, 2, 1), nn.Flatten(), nn.Linear(14, 3)
        ),
        (2, 5),
        {"softmax": 15, "positive scale": 6, "bias against": 0},
        None,
    ),
    "tanh": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
        (6,),
        {"softmax": 6, "positive scale": 0},
        None,
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
        (6,),
        {"shift of all features": 7, "scale before": 1, "positive scale": 5, "bias against": 5},
        1e-3,
    ),
    "group norm": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(12, 3)),
        (2, 5),
        {"shift of all features": 2, "scale before": 2},
        1e-3,
    ),
    "batch norm, batch statistics": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)),
        (6,),
        {"scale before": 5, "bias before": 5, "positive scale": 5, "softmax": 6},
        1e-3,
    ),
    "batch norm, fixed statistics": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)),
        (6,),
        {"scale against": 5, "bias against": 5, "positive scale": 5, "softmax": 6},
        None,
    ),
}


def problem(name: str, seed: int = 0):
    build, shape, kinds, tol = CASES[name]
    torch.manual_seed(seed)
    model = build().double()
    x, y = torch.randn(24, *shape).double(), torch.randint(0, 3, (24,))
    model(x)  # running statistics
    mode = "train" if "batch statistics" in name else "eval"
    model.train(mode == "train")
    return model, x, y, mode, kinds, tol


def held(found, words: str) -> int:
    return sum(i.count for i in found.found if i.held and words in i.kind)


@pytest.mark.parametrize("name", CASES)
def test_found_counted_and_true(name):
    model, x, y, mode, kinds, tol = problem(name)
    objective = Objective(model, CROSS, [(x, y)], mode=mode)
    found = invariances(objective, tol=tol)
    for words, count in kinds.items():
        assert held(found, words) == count, str(found)
    assert found.dim == sum(i.count for i in found.found if i.held)
    # L is constant along them: to first order the gradient is orthogonal, here with a slope that shares no code.
    value = vec.flatten(torch.autograd.grad(CROSS(model(x), y), tuple(model.parameters())))
    rows = found.directions.rows()
    assert (rows @ value).abs().max() < (tol or 1e-12) * value.norm() + 1e-15
    # Out of these directions nothing is lost: the projection is onto their complement, and is one.
    z = torch.randn(2, rows.shape[1], dtype=torch.float64)
    away = found.removed(z)
    torch.testing.assert_close(away @ rows.T, torch.zeros(2, len(rows), dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.removed(away), away, rtol=1e-9, atol=1e-10)
    Q = torch.linalg.qr(rows.T).Q
    torch.testing.assert_close(z - (z @ Q) @ Q.T, away, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_the_deflated_spectrum_is_that_across_the_orbits(method):
    model, x, y, _, _, _ = problem("relu")
    objective = Objective(model, CROSS, (x, y))
    found = invariances(objective)
    Q = torch.linalg.qr(found.directions.rows().T, mode="complete").Q[:, found.dim :]
    exact = torch.linalg.eigvalsh(Q.T @ hessian_of(model, x, y) @ Q)
    got = condition_number(hessian(objective), deflate=found, method=method, tol=1e-8)
    assert (got.lam_min, got.lam_max) == pytest.approx((exact[0].item(), exact[-1].item()), rel=1e-7)
    assert got.deflated == 11 and eigenvalues(
        hessian(objective), 1, deflate=found, method=method
    ).values.item() == pytest.approx(exact[-1].item(), rel=1e-3)


def test_in_the_coordinates_of_a_preconditioner():
    model, x, y, _, _, _ = problem("tanh")
    objective = Objective(model, CROSS, (x, y))
    d = tuple(torch.rand_like(p) + 0.5 for p in model.parameters())
    P = Diagonal(d)
    A = P.T @ hessian(objective) @ P
    D = vec.flatten(d)
    exact = torch.linalg.eigvalsh(D[:, None] * hessian_of(model, x, y) * D)
    null = invariances(objective).through(P, objective.params)
    assert null.dim == 6 == int((exact.abs() < 1e-14).sum())
    got = condition_number(A, deflate=null, tol=1e-8)
    assert (got.lam_min, got.inertia.null, got.inertia.positive) == (
        pytest.approx(exact[0].item()),
        0,
        int((exact > 1e-13).sum()),
    )


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("penalty", lambda model: penalized(model, 1e-3)),
        ("a frozen bias", lambda model: (model[0].bias.requires_grad_(False), CROSS)[1]),
        ("a penalty on one unit", lambda model: lambda out, y: CROSS(out, y) + 1e-2 * model[0].weight[2].square().sum()),
    ],
)
def test_what_does_not_hold_is_left_out(what, change):
    model, x, y, _, _, _ = problem("relu")
    loss = change(model)
    found = invariances(Objective(model, loss, (x, y)))
    expected = {"penalty": (0, 0), "a frozen bias": (0, 6), "a penalty on one unit": (4, 6)}[what]
    assert (held(found, "positive scale"), held(found, "softmax")) == expected
    assert "does not hold, left out" in str(found)


def test_tied_weights_and_residuals_are_no_pairs():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            h = self.a(x).relu()
            return self.c(h + self.b(h).relu())

    torch.manual_seed(0)
    x, y = torch.randn(20, 6).double(), torch.randint(0, 3, (20,))
    for model in (
        Residual().double(),
        nn.Sequential(tied := nn.Linear(6, 6), nn.ReLU(), tied, nn.ReLU(), nn.Linear(6, 3)).double(),
    ):
        found = invariances(Objective(model, CROSS, (x, y)))
        assert held(found, "positive scale") == 0 and held(found, "softmax") == 7


def test_only_within_the_parameters_of_the_objective():
    model, x, y, _, _, _ = problem("relu")
    found = invariances(Objective(model, CROSS, (x, y), params="2.*"))
    assert found.dim == 6 and held(found, "positive scale") == 0
    assert invariances(Objective(model, nn.CrossEntropyLoss(), (x, y), params="0.*")).dim == 0


def test_directions_of_a_float32_network_serve_its_float64_hessian():
    model, x, y, _, _, _ = problem("relu")
    model.float()
    objective = Objective(model, CROSS, (x.float(), y))
    found = invariances(objective)
    assert found.dim == 11
    got = condition_number(hessian(objective), deflate=found, float64=True, tol=1e-8)
    again = condition_number(hessian(objective.double()), deflate=invariances(objective.double()), tol=1e-8)
    assert got.lam_min == pytest.approx(again.lam_min, rel=1e-7) and got.deflated == 11


def test_bad_input():
    model, x, y, _, _, _ = problem("relu")
    with pytest.raises(ValueError, match=r"tol must lie in \(0, 1\), got 2"):
        invariances(Objective(model, CROSS, (x, y)), tol=2)


def test_a_p_that_does_not_reach_a_direction_is_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    found = invariances(Objective(model, nn.MSELoss(), [(torch.randn(20, 4).double(), torch.randn(20, 2).double())]))
    params = tuple(p.detach() for p in model.parameters())
    assert found.through(Diagonal(tuple(torch.full_like(p, 3.0) for p in params)), params).dim == found.dim > 0
    h = [torch.ones_like(p) for p in params]
    h[0][0] = torch.inf  # P is 0 there
    with pytest.raises(ValueError, match="P is singular"):
        found.through(InverseRoot(tuple(h)), params)
