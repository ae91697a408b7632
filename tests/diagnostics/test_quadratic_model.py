"""The quadratic model against losses and matrix exponentials, where it is exact, and where it stands for layers that were left out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from precond.analysis.curvature import Objective
from precond.analysis.diagnostics import diagnose
from precond.analysis.diagnostics.gains import QuadraticModel, first_rate, predicted
from precond.analysis.diagnostics.gathering import gather
from precond.analysis.diagnostics.quadratic_model import Block, LossDecay, Part, parts_of, speed_up
from precond.analysis.diagnostics.remedies import base_of
from precond.analysis.diagnostics.short import as_trained


def regression(outputs=2, bias=True):
    torch.manual_seed(0)
    x = torch.randn(60, 5).double() * torch.logspace(-1, 1, 5).double() + torch.linspace(0, 3, 5).double()
    y = torch.randn(60, outputs).double()
    model = nn.Linear(5, outputs, bias=bias).double()
    return Objective(model, nn.functional.mse_loss, list(zip(x.split(25), y.split(25), strict=True))), x, y


def pictured(objective):
    gathered, _ = gather(objective, 16384, 2048)
    return parts_of(objective, gathered, objective.gradient())


@pytest.mark.parametrize("unit", [2.0**-20, 2.0**20])
def test_curvature_is_measured_in_the_unit_of_the_loss(unit):
    def of(scale):
        torch.manual_seed(0)
        model, x, y = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(60, 5), torch.randn(60, 1)
        return pictured(Objective(model, lambda out, y: scale * nn.functional.mse_loss(out, y), [(x, y)]))

    assert [part.s / unit for part in of(unit)] == pytest.approx([part.s for part in of(1.0)], rel=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_of_a_linear_regression_it_knows_the_loss_above_the_minimum(bias):
    objective, x, y = regression(bias=bias)
    (part,) = pictured(objective)
    rows = torch.cat([torch.ones(60, 1).double(), x], 1) if bias else x
    least = (rows @ torch.linalg.lstsq(rows, y).solution - y).square().mean()
    # mse_loss averages over both outputs: H = 2/2·C for each. Curvature is a difference of losses, a hundredth of the loss apart.
    assert part.s == pytest.approx(1.0, rel=1e-6)
    for name, block in part.blocks.items():
        above = 0.5 * float(block.energies.sum()) / part.s
        assert above == pytest.approx(objective.value() - float(least), rel=1e-6), name


def test_what_is_left_after_some_steps_is_that_of_the_flow():
    objective, x, y = regression()
    (part,) = pictured(objective)
    rows = torch.cat([torch.ones(60, 1).double(), x], 1)
    C = rows.T @ rows / 60
    W = torch.cat([objective.model.bias[:, None], objective.model.weight], 1).detach()
    away = W.T - torch.linalg.lstsq(rows, y).solution
    std, mean = x.std(0, correction=0), x.mean(0)
    scale = torch.cat([torch.ones(1).double(), 1 / std])
    P = torch.diag(scale)
    P[0, 1:] = -mean / std
    for name, map_ in (("raw", torch.eye(6).double()), ("bnp", P)):
        decay = LossDecay([part], name, alone=False)
        H = map_.T @ C @ map_
        z = torch.linalg.solve(map_, away)
        for t in (1.0, 7.0, 50.0):
            later = torch.matrix_exp(-t * H / torch.linalg.eigvalsh(H)[-1]) @ z
            expected = float((later.T @ H @ later).trace() / (z.T @ H @ z).trace())
            assert decay.remaining(t) == pytest.approx(expected, rel=1e-6), (name, t)


def part(values, energies, s=1.0, name="a", **others):
    to = lambda x: torch.tensor(x, dtype=torch.float64)  # noqa: E731
    blocks = {"raw": Block(to(values), to(energies))} | {k: Block(to(v), to(energies)) for k, v in others.items()}
    return Part(name, blocks, s)


def decay(parts, name, alone=False):
    return LossDecay(parts, name, alone)


def test_the_speed_up_is_capped_by_what_no_remedy_changes():
    layer, rest = part([1.0, 1e-4], [1.0, 1.0], bnp=[1.0, 1.0]), part([1e-3], [1.0], name="")
    alone = speed_up(decay([layer], "raw"), decay([layer], "bnp"), 1000)
    both = speed_up(decay([layer, rest], "raw"), decay([layer, rest], "bnp"), 1000)
    # Without it e^(−0.2) of the layer's slow half and e^(−2) of the rest are left; with it the rest alone, e^(−t/500).
    expected = 1000 / (-500 * math.log(math.exp(-0.2) + math.exp(-2)))
    assert alone == 1000 and both == pytest.approx(expected, rel=1e-6)
    assert speed_up(decay([layer], "bnp"), decay([layer], "raw"), 1000) == pytest.approx(1 / alone)
    assert speed_up(decay([layer], "raw"), decay([layer], "raw"), 1000) == pytest.approx(1.0)


def test_who_starts_from_a_lower_loss_gets_there_sooner():
    layer = part([1.0, 1e-2], [1.0, 1.0])
    plain = decay([layer], "raw")
    # From half the loss: as far as 100 steps get, ½(e^(−200) + e^(−2)), half of what is left then being left of its own start.
    t = -50 * math.log(2 * math.exp(-2))
    assert speed_up(plain, plain, 100, start=2.0) == pytest.approx(100 / t, rel=1e-6)
    assert speed_up(plain, plain, 100, start=0.5) == pytest.approx(t / 100, rel=1e-6)
    assert speed_up(plain, plain, 100, start=1e3) == 100  # before the first step


def test_one_rate_for_all_or_one_for_each():
    steep, flat = part([1.0], [1.0], s=100.0), part([1.0], [1.0], s=1.0, name="b")
    assert decay([steep, flat], "raw").remaining(1) > decay([steep, flat], "raw", alone=True).remaining(1)


def test_the_first_rate_is_that_of_the_steepest_direction():
    objective, x, _ = regression()
    rows = torch.cat([torch.ones(60, 1).double(), x], 1)
    largest = float(torch.linalg.eigvalsh(rows.T @ rows / 60)[-1])
    quadratic, base = QuadraticModel.of(objective), base_of(None, objective.model)
    assert first_rate(quadratic, base, "raw") == pytest.approx((1 - 0.9) / largest, rel=1e-6)
    adam = base_of(torch.optim.Adam(objective.model.parameters(), lr=0.03), objective.model)
    assert first_rate(quadratic, adam, "raw") == 0.03


class Stack(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for layer in self.inner:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def test_of_a_stack_some_stand_for_the_others():
    torch.manual_seed(0)
    x, y = torch.randn(50, 4), torch.randn(50, 2)
    objective = Objective(Stack(9), nn.functional.mse_loss, [(x, y)])
    gathered, notes = gather(objective, 16384, 2048, layers=4)
    assert [seen.name for seen in gathered] == ["inner.0", "inner.4", "inner.8", "head"]
    assert [seen.share for seen in gathered] == [3.0, 3.0, 3.0, 1.0]
    assert any("6 layers like others at other depths (inner.1, inner.2, inner.3, …)" in note for note in notes)
    names = [p.name for p in parts_of(objective, gathered, objective.gradient())]
    assert names == ["inner.0", "inner.4", "inner.8", "head"]  # nothing is left for a block of the rest
    found = diagnose(objective, layers=4)
    assert found.share == 1.0 and found.undiagnosed


def test_batch_normalization_has_the_statistics_of_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    x = torch.randn(200, 4) * torch.logspace(-2, 2, 4) + 5
    objective = Objective(model, nn.functional.mse_loss, [(x, torch.randn(200, 2))])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    (layer,) = diagnose(objective).layers
    normalized = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()).double()
    values = torch.linalg.svdvals(torch.cat([torch.ones(200, 1).double(), normalized], 1)).square()
    assert layer.spectra.kappa("raw") == pytest.approx(float(values[0] / values[-1]), rel=1e-3)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    with as_trained(Objective(model, nn.functional.mse_loss, [(x, torch.randn(200, 2))], mode="train")) as seen:
        assert seen.mode == "train"


def test_standardized_data_are_nothing_to_standardize():
    torch.manual_seed(0)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    quadratic = QuadraticModel.of(Objective(nn.Linear(3, 1), nn.functional.mse_loss, [(signs, torch.randn(8, 1))]))
    assert quadratic.standardized is None
    value, _ = predicted(quadratic, base_of(None, nn.Linear(3, 1)), "whitened", 150)
    assert value == pytest.approx(1.0, abs=2e-3)  # the damping of the whitening is 1e-3
