"""The limit of the learning rate against iterations on a quadratic, a little below and a little above it."""

from __future__ import annotations

import pytest
import torch

import precond
from precond import Momentum, PreconditionedGD
from precond.analysis.diagnostics import stable_factor


def ours(momentum):
    return lambda p, lr: PreconditionedGD([p], lr=lr, preconditioner=precond.Fixed(), momentum=momentum)


CASES = {
    "plain": lambda p, lr: torch.optim.SGD([p], lr=lr),
    "heavy ball": lambda p, lr: torch.optim.SGD([p], lr=lr, momentum=0.8),
    "dampened": lambda p, lr: torch.optim.SGD([p], lr=lr, momentum=0.8, dampening=0.5),
    "Nesterov": lambda p, lr: torch.optim.SGD([p], lr=lr, momentum=0.8, nesterov=True),
    "our Nesterov": ours(Momentum(0.7, "nesterov")),
    "our heavy ball": ours(Momentum(0.7, "heavy_ball")),
    "our average": ours(Momentum(0.7, "ema", bias_correction=False)),
    "ours without": ours(None),
    "recipe": lambda p, lr: precond.sgd([p], lr=lr, momentum=0.9),
}


@pytest.mark.parametrize("case", CASES)
def test_below_it_converges_and_above_it_grows(case):
    for share, grows in ((0.97, False), (1.03, True)):
        p = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = CASES[case](p, 1.0)
        optimizer.param_groups[0]["lr"] = share * 2 * stable_factor(optimizer) / 3.0
        for _ in range(1500):
            p.grad = 3.0 * p.detach()
            optimizer.step()
        assert (abs(p.item()) > 1) == grows


def test_averages_of_adam_and_several_groups():
    p, q = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    assert stable_factor(torch.optim.AdamW([p])) == stable_factor(precond.adamw([p])) == pytest.approx(19)
    assert stable_factor(torch.optim.NAdam([p], betas=(0.5, 0.9))) == pytest.approx(1.5 / 0.5 / 2)
    groups = [{"params": [p], "momentum": 0.9}, {"params": [q], "momentum": 0.5}]
    assert stable_factor(torch.optim.SGD(groups, lr=0.1)) == 1.5
