"""Cells of data and architecture, and what is predicted of them; best rates over widths and depths."""

import math

import pytest
import torch
from torch import nn

import precond
from precond.analysis.curvature import Objective
from precond.analysis.diagnostics import diagnose
from precond.lab.workloads import LogUniform, Trial
from precond.lab.workloads.measured import measured
from precond.lab.workloads.transfer import DEPTHS, TRIALS, WIDTHS, Tower, best_rate, transfer_tasks
from precond.lab.workloads.where import BASE, REMEDIES, predictions, where_tasks


def test_cells_are_many_and_the_rules_are_the_same_for_all() -> None:
    tasks = where_tasks((0, 1), 5)
    assert len({task.name for task in tasks}) == len(tasks) >= 30
    assert sum("pre-norm" in task.name for task in tasks) >= 4
    for task in tasks:
        assert [c.label for c in task.contenders] == [BASE, *REMEDIES]
        ratios = [c.lr.high / c.lr.low for c in task.contenders if isinstance(c.lr, LogUniform)]
        assert ratios == pytest.approx([64.0] * 3)
        assert task.reference == BASE and task.family and task.search_seed not in task.seeds
    with pytest.raises(ValueError, match="read no files"):
        where_tasks((0,), 5, examples=3)


def test_predictions_are_those_of_diagnose_and_are_made_before_training() -> None:
    (task,) = (t for t in where_tasks((0,), 5) if t.name == "wine: MLP, ReLU, BN")
    state = torch.get_rng_state()
    once, again = predictions(task), predictions(task)
    assert once == again and torch.equal(state, torch.get_rng_state())
    assert [(p.task, p.label) for p in once] == [(task.name, label) for label in REMEDIES]
    torch.manual_seed(task.search_seed)
    workload = task.contenders[0].workload()
    model, part = workload.make(), workload.parts["train"]  # type: ignore[attr-defined]
    loss = Objective(model, nn.functional.cross_entropy, [(part.inputs[:512], part.targets[:512])], mode="train", seed=0)
    found = diagnose(loss, precond.adamw(model, lr=0.1, weight_decay=0.0))  # whatever the rate
    gains = {c.name: c.gain for c in found.considered}
    for one, name in zip(once, REMEDIES.values(), strict=True):
        assert one.gain == gains[name].likely and one.layers == len(found.layers) == 3  # type: ignore[union-attr]
        assert one.traits == (1.0, 0.0, 0.0)
        assert one.measured == measured(found, model, nn.functional.cross_entropy, (part.inputs[:512], part.targets[:512]), 64)


def test_rates_over_widths_and_depths() -> None:
    tasks = transfer_tasks((0, 1), TRIALS, examples=100)
    # The least depth at width 128 is in both lines.
    assert len({task.name for task in tasks}) == len(tasks) == 2 * (2 * len(WIDTHS) + len(DEPTHS) - 1)
    assert (min(WIDTHS), max(WIDTHS), min(DEPTHS), max(DEPTHS)) == (64, 1024, 2, 8)
    for task in tasks:
        assert (task.search_seed, task.seeds) in (((1000), (0,)), ((1001), (1,)))
        for contender in task.contenders:
            rates = contender.lr.first(TRIALS)  # type: ignore[union-attr]
            assert rates[1] / rates[0] == pytest.approx(2, rel=1e-3)
    model = Tower(64, 16, 3, 10)
    assert model(torch.randn(5, 64)).shape == (5, 10)
    # A spectral norm of uniform entries in ±1/√n, (10, n), is about (1 + √(10/n))/√3; of a spectral head √(64/n) of that.
    norms = [torch.linalg.matrix_norm(Tower(64, n, 1, 10, True).head.weight, 2).item() for n in (64, 1024)]
    assert norms == pytest.approx([(1 + (10 / n) ** 0.5) / 3**0.5 * (64 / n) ** 0.5 for n in (64, 1024)], rel=0.15)


def test_the_best_rate_is_a_minimum_between_rates_that_all_tried() -> None:
    def search(low: float, rates: tuple[float, ...], offset: float = 0.0) -> list[Trial]:
        return [Trial(lr, offset + (math.log(lr) - math.log(low)) ** 2) for lr in rates]

    rates = (0.01, 0.02, 0.04, 0.08)
    # The mean of two parabolas is one with its minimum in the middle.
    assert best_rate([search(0.02, rates), search(0.04, rates, 3.0)]) == pytest.approx(0.02 * 2**0.5)
    assert best_rate([search(1.0, rates)]) == 0.08 and best_rate([search(1e-3, rates)]) == 0.01
    # What diverged, or was tried by one alone, is left out.
    some = [*search(0.03, rates[:2]), Trial(0.04, math.nan), *search(0.03, rates[3:])]
    assert best_rate([some, [*search(0.03, rates), Trial(0.16, -9.0)]]) == pytest.approx(0.03, rel=1e-6)
    assert math.isnan(best_rate([])) and math.isnan(best_rate([[Trial(0.1, math.nan)]]))
