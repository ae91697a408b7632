"""What a normalization behind a layer takes out again is nothing to mend: the mean of its inputs, a bias, a common scale."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import precond
from precond.analysis.diagnostics.gains import QuadraticModel, predicted
from precond.analysis.diagnostics.remedies import base_of

ENDS = nn.functional.cross_entropy


def conv(bias: bool, padding: int, channels: int = 1) -> nn.Module:
    torch.manual_seed(0)
    front = [nn.Conv2d(channels, 8, 3, bias=bias, padding=padding), nn.BatchNorm2d(8, eps=1e-12), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*front, nn.Linear(8 * (6 + 2 * padding) ** 2, 2)).double()


def linear(bias: bool, norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16, bias=bias), norm, nn.ReLU(), nn.Linear(16, 2)).double()


def images(channels: int = 1) -> torch.Tensor:
    return torch.rand(300, channels, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def features() -> torch.Tensor:
    """Of mean 0 and standard deviation 1, all of them."""
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(1)).double()
    return (x - x.mean(0)) / x.std(0, correction=0)


def classes(x: torch.Tensor) -> torch.Tensor:
    s = x.flatten(1).sum(1)
    return (s > s.median()).long()


def norms() -> dict[str, nn.Module]:
    return {"batch": nn.BatchNorm1d(16, eps=1e-12), "layer": nn.LayerNorm(16, eps=1e-12)}


def curve(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """Losses of gradient descent on the whole batch."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = ENDS(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


UNCHANGED = {
    "one channel": (lambda: conv(False, 0), images),
    "one channel, a bias that is taken out": (lambda: conv(True, 0), images),
    "features of one scale, batch norm": (lambda: linear(False, norms()["batch"]), lambda: 0.05 * features() + 3),
    "the same with a bias": (lambda: linear(True, norms()["batch"]), lambda: 0.05 * features() + 3),
    "a common scale, layer norm": (lambda: linear(False, norms()["layer"]), lambda: 0.05 * features()),
}


def alike(x: torch.Tensor, centered: bool) -> torch.Tensor:
    """Standardized by one standard deviation for all features, which is what these data have."""
    return (x - x.mean([d for d in range(x.ndim) if d != 1], keepdim=True)) / x.std() if centered else x / x.std()


@pytest.mark.parametrize("name", UNCHANGED)
def test_what_changes_nothing_is_not_promised_to_save_steps(name):
    make, data = UNCHANGED[name]
    x = data()
    y, other = classes(x), alike(x, "layer" not in name)
    # The truth: trainings on data of mean 0 and a common scale go as they went. Rounding of 20 steps in float64.
    torch.testing.assert_close(curve(make(), x, y), curve(make(), other, y), rtol=1e-5, atol=1e-9)
    model = make()
    objective = precond.Objective(model, ENDS, [(x, y)])
    found = precond.diagnose(objective)
    assert not any("Standardize" in advice.what for advice in found.advice), found
    value, alone = predicted(QuadraticModel.of(objective), base_of(None, model), "standardize", 150)
    assert value == pytest.approx(1, abs=0.2) and alone == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padding", [0, 1])
def test_condition_numbers_are_those_of_centered_patches(bias, padding):
    x, model = images(2) + 5, conv(bias, padding, channels=2)
    patches = nn.functional.unfold(x, 3, padding=padding).transpose(1, 2).reshape(-1, 18)
    values = torch.linalg.eigvalsh(torch.cov(patches.T, correction=0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layer = precond.diagnose(precond.Objective(model, ENDS, [(x, classes(x))]), optimizer, samples=10**5).layers[0]
    kappa = float(values.max() / values.min())
    assert layer.spectra.rank == 18
    assert layer.spectra.kappa("raw") == pytest.approx(kappa, rel=1e-6)
    assert layer.spectra.kappa("optimizer") == pytest.approx(kappa, rel=1e-6)  # P = I
    assert math.isnan(layer.kappa_biased)


def test_of_whitening_without_a_bias_what_means_leave_of_it_shows():
    """It whitens E[hhᵀ], which it sees; what the batch normalization shows of it is the covariance."""
    x = features() * torch.logspace(-0.5, 0.5, 5).double() + 2
    layer = precond.diagnose(precond.Objective(linear(False, norms()["batch"]), ENDS, [(x, classes(x))])).layers[0]
    E, C = x.T @ x / len(x), torch.cov(x.T, correction=0)
    values = torch.linalg.eigvals(torch.linalg.solve(E + precond.Whitening().damping * torch.diag(E.diagonal()), C)).real
    assert layer.spectra.kappa("whitened") == pytest.approx(float(values.max() / values.min()), rel=1e-6)


def test_means_of_features_remain_behind_a_layer_normalization():
    x = features() + torch.tensor([9.0, -9, 9, -9, 9]).double()
    E = x.T @ x / len(x)
    values = torch.linalg.eigvalsh(E)
    layer = precond.diagnose(precond.Objective(linear(False, norms()["layer"]), ENDS, [(x, classes(x))])).layers[0]
    assert layer.spectra.kappa("raw") == pytest.approx(float(values.max() / values.min()), rel=1e-6)


def test_scales_that_differ_remain_behind_a_batch_normalization():
    x = features() * torch.logspace(-2, 2, 5).double()
    found = precond.diagnose(precond.Objective(linear(False, norms()["batch"]), ENDS, [(x, classes(x))]))
    assert "Standardize" in found.advice[0].what and "has no bias" not in found.advice[0].why


def test_a_scale_that_is_far_from_the_bias_is_said_to_be():
    x = 0.08 * features()
    found = precond.diagnose(precond.Objective(nn.Linear(5, 2).double(), ENDS, [(x, classes(x))]))
    drivers = found.layers[0].drivers
    assert drivers.spread < 1.3 and drivers.aside == pytest.approx(float(1 / x.std(0, correction=0).min()), rel=1e-6)
    assert "from the bias's 1" in found.advice[0].why and "differ up to" not in found.advice[0].why
