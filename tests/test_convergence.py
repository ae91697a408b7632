"""Rates from spectra against rates of gradient descent as it runs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from precond.analysis.convergence import Comparison, observed_rate, optimal_lr, predict, rate, steps
from precond.analysis.curvature import Indefinite, NotResolved, Objective, Singular, condition_number, hessian

torch.set_num_threads(1)


def descent(lam: torch.Tensor, lr: float, steps: int, heavy: float = 0.0, offset: float = 0.0):
    """Losses and errors of gradient descent on ½ pᵀ diag(λ) p + offset from all ones."""
    p, old = torch.ones_like(lam), torch.ones_like(lam)
    losses, errors = [], []
    for _ in range(steps):
        losses.append((0.5 * (lam * p * p).sum() + offset).item())
        errors.append(p.norm().item())
        p, old = p - lr * lam * p + heavy * (p - old), p
    return losses, errors


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(1.001, 1e6))
def test_closed_forms(low, kappa):
    high = low * kappa
    best = predict((low, high))
    assert best.rate == pytest.approx(rate(kappa), rel=1e-9)
    assert best.lr == optimal_lr(low, high)
    for factor in (0.9, 1.1):  # no other learning rate is better
        assert predict((low, high), lr=factor * best.lr).rate >= best.rate - 1e-12
    assert best.steps(1e-3) == pytest.approx(math.log(1e-3) / math.log(best.rate), rel=1e-6)
    assert best.steps(1e-3) == pytest.approx(3 * math.log(10) / (2 * math.atanh(1 / kappa)), rel=1e-9)
    assert not best.diverges and predict((low, high), lr=2.1 / high).diverges


def test_one_eigenvalue_takes_one_step():
    assert rate(1.0) == 0 and predict((2.0, 2.0)).rate == 0 and predict((2.0, 2.0)).steps(1e-9) == 0


SPECTRA = {
    "two": torch.tensor([1.0, 30.0], dtype=torch.float64),
    "one slow": torch.tensor([1.0, 20.0, 40.0, 60.0], dtype=torch.float64),
    "many": torch.logspace(0, 2, 20, dtype=torch.float64),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("factor", [0.4, 1.0, 1.04])
@pytest.mark.parametrize("kind", ["loss", "error"])
@pytest.mark.parametrize("offset", [0.0, 3.7])
def test_observed_is_predicted(spectrum, factor, kind, offset):
    lam = SPECTRA[spectrum]
    ends = (lam.min().item(), lam.max().item())
    lr = factor * optimal_lr(*ends) if factor != 1.04 else min(1.04 * optimal_lr(*ends), 1.99 / ends[1])
    losses, errors = descent(lam, lr, 1500, offset=offset)
    seen = observed_rate(losses if kind == "loss" else errors, kind)
    both = Comparison(predict(ends, lr=lr), seen)
    assert both.agrees, both
    assert seen.rate == pytest.approx(both.predicted.rate, rel=3e-3)
    assert both.ratio == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_floor_is_noticed(dtype):
    lam = torch.tensor([1.0, 10.0], dtype=dtype)
    lr = optimal_lr(1.0, 10.0)
    losses, _ = descent(lam, lr, 800, offset=5.0)
    for trace in (losses, torch.tensor(losses, dtype=dtype)):
        seen = observed_rate(trace)
        assert seen.floor_reached and seen.stop < 300
        assert seen.rate == pytest.approx(rate(10.0), rel=2e-2)
    # Distances that stand still because p* is rounded.
    target = torch.tensor([1.3, -0.7], dtype=dtype)
    p, errors = torch.zeros(2, dtype=dtype), []
    for _ in range(400):
        p = p - lr * lam * (p - target)
        errors.append((p.double() - target.double()).norm().item() + 1e-17)
    seen = observed_rate(errors, "error")
    assert seen.floor_reached and seen.rate == pytest.approx(rate(10.0), rel=1e-2)
    assert "floor" in str(seen)


def test_the_error_bar_covers_noise():
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(40):
        noise = 0.2 * torch.randn(200, generator=generator, dtype=torch.float64)
        trace = torch.exp(-0.05 * torch.arange(200) + noise)
        seen = observed_rate(trace, "error")
        inside += abs(seen.decay - 0.05) <= 2 * seen.decay_error
        assert 0 < seen.decay_error < 0.01
    assert inside >= 34


def test_an_outlier_does_not_matter():
    trace = [0.9**t for t in range(100)]
    clean = observed_rate(trace, "error")
    trace[60] *= 1e4
    assert observed_rate(trace, "error").rate == pytest.approx(clean.rate, rel=1e-4)


def test_momentum_with_a_known_minimum():
    lam = torch.tensor([1.0, 100.0], dtype=torch.float64)
    root = math.sqrt(100.0)
    beta = ((root - 1) / (root + 1)) ** 2
    losses, errors = descent(lam, 4 / (root + 1) ** 2, 300, heavy=beta)
    # Heavy ball at its optimum: √β per step, with a factor t in front.
    assert observed_rate(losses, minimum=0.0).rate == pytest.approx(math.sqrt(beta), rel=2e-2)
    assert observed_rate(errors, "error").rate == pytest.approx(math.sqrt(beta), rel=2e-2)


def test_divergence():
    lam = torch.tensor([1.0, 10.0], dtype=torch.float64)
    losses, errors = descent(lam, 0.21, 5000)
    for trace, kind in ((losses, "loss"), (errors, "error")):
        seen = observed_rate(trace, kind)
        assert seen.rate == pytest.approx(1.1, rel=1e-3) and "growing" in str(seen)
        assert math.isinf(seen.steps(1e-3)) and Comparison(predict((1.0, 10.0), lr=0.21), seen).agrees


def test_a_trace_that_has_not_settled_says_so():
    t = torch.arange(60, dtype=torch.float64)
    seen = observed_rate((1 + t) ** -2.0, "error")
    assert not seen.settled and "not settled" in str(seen)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rate(0.5), "kappa"),
        (lambda: rate(math.nan), "kappa"),
        (lambda: optimal_lr(-1.0, 1.0), "lam_min"),
        (lambda: predict((0.0, 1.0)), "lam_min"),
        (lambda: predict((1.0, 2.0), lr=-1.0), "lr"),
        (lambda: steps(0.5, 2.0), "tolerance"),
        (lambda: observed_rate([1.0, 0.5]), "at least"),
        (lambda: observed_rate([1.0] * 30), "floor"),
        (lambda: observed_rate([1.0, -0.5] * 10, "error"), "negative"),
        (lambda: observed_rate([1.0, 0.5] * 10), "minimum="),
        (lambda: observed_rate([1.0, 0.5] * 10, "losses"), "did you mean 'loss'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_rate_where_there_is_no_condition_number():
    diagonal = lambda *d: condition_number(torch.diag(torch.tensor(d)).double())  # noqa: E731
    with pytest.raises(Indefinite):
        predict(diagonal(-1.0, 1.0, 2.0))
    with pytest.raises(Indefinite):
        predict(diagonal(-1.0, 1.0, 2.0), positive=True)
    with pytest.raises(Singular, match="positive=True"):
        predict(diagonal(0.0, 1.0, 3.0))
    assert predict(diagonal(0.0, 1.0, 3.0), positive=True).rate == pytest.approx(0.5)
    assert predict(diagonal(1.0, 1.5, 3.0), positive=True).rate == pytest.approx(0.5)
    torch.manual_seed(0)
    A = torch.randn(600, 600).double()
    with pytest.raises(NotResolved):
        predict(condition_number(A @ A.T, method="lanczos", max_products=30))


def test_logistic_regression_converges_as_its_hessian_says():
    torch.manual_seed(0)
    x = torch.randn(50, 3).double() * torch.tensor([1.0, 2.0, 0.5])
    y = (torch.rand(50) < 0.5).double()[:, None]
    model = nn.Linear(3, 1).double()
    penalty = lambda: 0.01 * sum(p.square().sum() for p in model.parameters())  # noqa: E731
    objective = Objective(model, lambda out, y: nn.functional.binary_cross_entropy_with_logits(out, y) + penalty(), [(x, y)])
    for _ in range(60):  # Newton, to the minimum
        H = hessian(objective).to_dense()
        step = torch.linalg.solve(H, torch.cat([g.flatten() for g in objective.gradient()]))
        with torch.no_grad():
            for p, d in zip(model.parameters(), step.split([3, 1]), strict=True):
                p -= d.reshape(p.shape)
    prediction = predict(condition_number(hessian(objective), tol=1e-6))
    lowest = objective.value()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02
    losses = []
    for _ in range(200):
        losses.append(objective.value())
        with torch.no_grad():
            for p, g in zip(model.parameters(), objective.gradient(), strict=True):
                p -= prediction.lr * g
    both = Comparison(prediction, observed_rate(losses, minimum=lowest))
    assert both.agrees and both.predicted.rate > 0.5
    assert "agree" in str(both) and "steps to 1e-6" in str(both)
