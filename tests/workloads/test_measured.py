"""What is measured before training, against dense algebra on a model of two layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from precond.analysis.curvature import Objective
from precond.analysis.diagnostics import diagnose
from precond.lab.workloads.measured import Measured, measured, noise


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 2)).double()


X = torch.randn(90, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * torch.tensor([1, 10, 100, 1e3, 1e4])
Y = torch.randn(90, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_numbers_are_those_of_the_layers_inputs() -> None:
    net = model()
    found = diagnose(Objective(net, nn.functional.mse_loss, [(X, Y)]))
    numbers = measured(found, net, nn.functional.mse_loss, (X, Y), 32)
    with torch.no_grad():
        inputs, weights = [X, net[:2](X)], [35, 14]
    kappas, gains, shares = [], [], []
    for h in inputs:
        standard = (h - h.mean(0)) / h.std(0, correction=0)
        found_values = []
        for columns in (h, standard):
            extended = torch.cat([torch.ones(len(h), 1, dtype=h.dtype), columns], 1)
            values = torch.linalg.svdvals(extended).square() / len(h)
            found_values.append(values[values > 1e-20 * values[0]])  # behind LayerNorm one direction is constant
        raw, bnp = found_values
        kappas.append(math.log10(raw[0] / raw[-1]))
        gains.append(kappas[-1] - math.log10(bnp[0] / bnp[-1]))
        shares.append(float(bnp.sum() ** 2 / bnp.square().sum()) / (h.shape[1] + 1))

    def mean(values: list[float]) -> float:
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    # LayerNorm's constant direction is rounding, which diagnose leaves out: compared is the first layer where κ counts.
    assert [layer.source for layer in found.layers] == ["data", "layer norm"]
    assert found.layers[0].spectra.kappa("raw") == pytest.approx(10 ** kappas[0], rel=1e-6)
    second = found.layers[1].spectra
    kappas[1] = math.log10(second.kappa("raw"))
    gains[1] = kappas[1] - math.log10(second.kappa("bnp"))
    assert numbers.kappa == pytest.approx(mean(kappas)) and numbers.gain == pytest.approx(mean(gains))
    assert numbers.independent == pytest.approx(math.log10(mean(shares)), rel=1e-6)
    assert numbers.samples == pytest.approx(mean([math.log10(32 / 6), math.log10(32 / 8)]))
    assert numbers.ill == pytest.approx((35 * (kappas[0] > 4) + 14 * (kappas[1] > 4)) / 49 * found.share)
    assert (numbers.batch, numbers.other) == (0.0, pytest.approx(14 / 49))


def test_noise_is_that_of_the_gradients_of_batches() -> None:
    net = model()
    batches = [(X[i : i + 22] / 1e4, Y[i : i + 22]) for i in range(0, 88, 22)]
    rows = []
    for x, y in batches:
        net.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        rows.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    covariance = torch.stack(rows).T.cov()
    square = torch.stack(rows).mean(0).square().sum() - covariance.trace() / 4
    expected = float(covariance.trace() / square)
    assert noise(net, nn.functional.mse_loss, batches) == pytest.approx(expected if square > 0 else math.inf)
    # Of 90 examples batches are of 22, told in units of batches of 32.
    found = diagnose(Objective(net, nn.functional.mse_loss, [(X / 1e4, Y)]))
    told = measured(found, net, nn.functional.mse_loss, (X / 1e4, Y), 32).noise
    assert told == pytest.approx(min(math.log10(expected * 22 / 32), 3.0))


def test_what_cannot_be_measured_is_refused() -> None:
    net = model()
    with pytest.raises(ValueError, match="two at least, got 1"):
        noise(net, nn.functional.mse_loss, [(X, Y)])

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a * x[:, :2]

    found = diagnose(Objective(scale := Scale(), nn.functional.mse_loss, [(X, Y)]))
    with pytest.raises(ValueError, match="no layer was diagnosed"):
        measured(found, scale, nn.functional.mse_loss, (X, Y), 32)
    assert len(Measured.__dataclass_fields__) == 8
