"""Range tests, trials and what comes of them, on problems whose answer is known."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import precond
from precond.analysis.curvature import Objective
from precond.analysis.diagnostics import diagnose
from precond.analysis.diagnostics.rates import fitted, lr_range, rate
from precond.analysis.diagnostics.remedies import base_of, standardized
from precond.analysis.diagnostics.short import Curve, compared, points, short_training
from precond.analysis.diagnostics.trying import _learned, try_remedies, with_rates
from precond.lab.cli.main import main


def sgd(model, lr):
    return torch.optim.SGD(model.parameters(), lr=lr)


def spread(condition=30.0, dropout=0.0):
    torch.manual_seed(0)
    x = torch.randn(200, 6) * torch.logspace(0, torch.log10(torch.tensor(condition)).item(), 6)
    y = (x / x.std(0)) @ torch.randn(6, 2)
    model = nn.Sequential(nn.Dropout(dropout), nn.Linear(6, 2))
    return Objective(model, nn.functional.mse_loss, list(zip(x.split(50), y.split(50), strict=True)))


def test_the_limit_is_where_steps_grow_and_nothing_changes():
    objective = spread()
    before, state = copy.deepcopy(objective.model.state_dict()), torch.get_rng_state()
    found = lr_range(objective, sgd)
    # The mean over two outputs: H = C, of which steps grow from 2/λ_max on; on the ramp it takes a few steps to show.
    x = torch.cat([x for x, _ in objective.batches])
    stable = 2 / float(torch.linalg.eigvalsh(x.T @ x / 200)[-1])
    assert 0.3 * stable < found.limit < 30 * stable and found.lr < 1.2 * stable
    assert found.best.final == min(curve.final for curve in found.curves)
    assert all(objective.model.state_dict()[k].equal(v) for k, v in before.items()) and torch.get_rng_state().equal(state)
    assert f"Learning rate {found.lr:.2g}" in str(found)


def test_the_limit_does_not_depend_on_the_unit_of_the_targets():
    found = []
    for unit in (1.0, 2.0**-30):
        objective = spread()
        nn.init.zeros_(objective.model[1].weight), nn.init.zeros_(objective.model[1].bias)
        scaled = Objective(objective.model, objective.loss_fn, [(x, unit * y) for x, y in objective.batches])
        found.append(lr_range(scaled, sgd))
    assert found[0].limit == found[1].limit and found[0].lr == found[1].lr


def test_dropout_is_the_same_every_time():
    objective = spread(dropout=0.5)
    curves = [short_training(objective, sgd, 1e-3, 8) for _ in range(2)]
    assert curves[0] == curves[1]
    assert curves[0] != short_training(objective, sgd, 1e-3, 8, seed=1)


def test_at_a_minimum_no_rate_is_named():
    x = torch.randn(30, 3)
    model = nn.Linear(3, 1)
    objective = Objective(model, nn.functional.mse_loss, [(x, model(x).detach())])
    with pytest.raises(ValueError, match=r"no rate from .* makes the loss lower"):
        lr_range(objective, sgd, steps=3, ramp_steps=5)


def test_a_training_that_diverges_ends():
    curve = short_training(spread(), sgd, 10.0, 30)
    assert curve.why.startswith("diverged at step") and curve.final == float("inf") and len(curve.losses) < len(curve.steps)


def test_an_optimizer_that_refuses_gradients_that_are_not_finite_ends_a_training_and_a_range():
    make = lambda model, lr: precond.sgd(model, lr=lr, nonfinite="raise")  # noqa: E731
    model, x = nn.Linear(2, 1), torch.randn(8, 2)
    y = model(x).detach()
    objective = Objective(model, lambda out, y: (out - y).abs().sqrt().mean(), [(x, y)])  # 0, where its gradient is none
    curve = short_training(objective, make, 0.1, 30)
    assert curve.why.startswith("step 1: ") and "nothing was changed" in curve.why and curve.losses == (0.0,)
    with pytest.raises(ValueError, match=r"no rate from .* makes the loss lower"):
        lr_range(objective, make, steps=3, ramp_steps=5)


def test_what_cannot_be_trained_says_why_and_is_no_advice():
    torch.manual_seed(0)
    broken: list[str] = []

    def loss(outputs, targets):
        if broken:
            raise RuntimeError("no memory left")
        return nn.functional.mse_loss(outputs, targets)

    objective = spread()
    objective = Objective(objective.model, loss, objective.batches)
    found = diagnose(objective)

    def watch(text):
        if text.partition(":")[0] != found.against:  # the first remedy
            broken.append(text)

    after, tried = try_remedies(found, objective, steps=5, watch=watch)
    assert tried[0].curve is not None and len(tried) > 1
    assert {(t.curve, t.ratio, t.why) for t in tried[1:]} == {(None, None, "no memory left")}
    assert str(tried[1]) == f"{tried[1].label}: no memory left"
    assert not after.tried and [a.tested for a in after.advice] == [False] * len(after.advice)
    # Where not even what is there can be trained, nothing is compared.
    again, (alone,) = try_remedies(found, objective, steps=5)
    assert again is found and alone.curve is None and alone.why == "no memory left"


def test_steps_to_a_loss():
    curve = Curve(0.1, (0, 10, 20), (4.0, 2.0, 1.0))
    assert [curve.reaches(x) for x in (4.0, 3.0, 1.5, 0.5)] == [0.0, 5.0, 15.0, float("inf")]
    assert curve.until(10).losses == (4.0, 2.0)
    faster = Curve(1.0, (0, 10, 20), (4.0, 1.0, 0.1))
    # The slower one reaches 1 in 20 steps, the faster one in 10; a rate that diverged early has no say.
    assert compared([curve, Curve(9.0, (0, 10, 20), (4.0,), "diverged at step 3")], [faster], 20) == (2.0, (0.1, 1.0))
    assert points(7, 3) == (0, 2, 5, 7)


def test_the_search_goes_on_until_the_best_is_inside():
    tried = []

    def train(lr):
        tried.append(lr)
        return Curve(lr, (0, 1), (1.0, min(1.0, abs(torch.tensor(lr).log10().item() + 3) / 10)))

    curves = fitted(train, 0, [1])
    best = min(range(len(curves)), key=lambda i: curves[i].final)
    assert curves[best].lr == rate(-6) == 1e-3 and 0 < best < len(curves) - 1
    assert len(tried) == len(set(tried))


@pytest.mark.parametrize("dim", [None, 1, 2])
def test_data_are_standardized_along_their_features(dim):
    torch.manual_seed(0)
    x = torch.randn(40, 3, 5) * torch.tensor([1.0, 10.0, 100.0])[:, None] + torch.arange(5.0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(15, 1))
    objective = Objective(model, nn.functional.mse_loss, list(zip(x.split(15), torch.zeros(40, 1).split(15), strict=True)))
    whole = torch.cat([x for x, _ in standardized(objective, dim).batches])
    over = [0] if dim is None else [d for d in range(3) if d != dim]
    torch.testing.assert_close(whole.mean(over), torch.zeros_like(whole.mean(over)), atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.std(over, correction=0), torch.ones_like(whole.std(over)), atol=1e-4, rtol=0)
    assert standardized(standardized(objective, dim), dim) is None


class Keywords(nn.Module):
    """Takes what a dictionary gives, the targets too."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, features, labels):
        outputs = self.layer(features)
        return {
            "loss": nn.functional.cross_entropy(outputs, labels) if labels.ndim == 1 else (outputs - labels).square().mean()
        }


def test_data_by_keyword_are_standardized_where_one_tensor_is_of_floats():
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.01, 1.0, 10.0, 1e3]) + 3
    layer, labels = nn.Linear(4, 3), (x[:, 1] > 3).long()
    found = [
        diagnose(Keywords(copy.deepcopy(layer)), data=[{"features": x, "labels": labels}]),
        diagnose(copy.deepcopy(layer), loss_fn=nn.functional.cross_entropy, data=[(x, labels)]),
    ]
    gains = [{c.name: (c.gain, c.why) for c in each.considered} for each in found]
    assert gains[0] == gains[1] and gains[0]["standardize"][0].worth
    targets = diagnose(Keywords(layer), data=[{"features": x, "labels": x[:, :3]}])
    (why,) = (c.why for c in targets.considered if c.name == "standardize")
    assert "not one tensor of floats" in why


def test_remedies_are_tried_against_what_is():
    objective = spread(100.0)
    optimizer = torch.optim.SGD(objective.model.parameters(), lr=1e-5, momentum=0.5)
    found = diagnose(objective, optimizer)
    assert "Standardize" in found.advice[0].what and not found.advice[0].tested
    after, tried = try_remedies(found, objective, optimizer, steps=30)
    assert [t.label for t in tried][:2] == ["SGD", "SGD, standardized data"]
    assert tried[0].ratio is None and tried[1].ratio > 3
    assert tried[0].curve.losses[0] > tried[0].curve.final
    assert (
        after.advice[0].tested
        and f"lr={after.advice[0].lr:.2g}" in after.advice[0].code
        and "momentum=0.5" in after.advice[0].code
    )
    assert optimizer.param_groups[0]["lr"] == 1e-5
    # What pays is advised, the best first; what does not is no advice; nothing is both.
    measured = [a.measured for a in after.advice if a.remedy is not None]
    assert measured == sorted(measured, reverse=True) and min(measured) >= 1.2
    assert len(tried) == 4 and {t.ratio >= 1.2 for t in tried[1:]} >= {True}
    advised = {a.remedy.name for a in after.advice if a.remedy is not None}
    assert advised == {c.name for c in after.considered if not c.why}
    assert after.advice[0].promise == f"tried: {max(measured):.3g} times fewer steps"
    assert with_rates(found, objective).advice[0].tested


def test_advice_that_does_not_hold_up_is_taken_back():
    found = diagnose(spread(100.0))
    (first, *rest) = (a for a in found.advice if a.remedy is not None)
    other = next(c for c in found.considered if c.advice is not None and c.advice.what not in {a.what for a in (first, *rest)})
    after = _learned(found, {first.remedy.name: first.tried(0.1, 0.8), other.name: other.advice.tried(0.2, 3.0)})
    assert [a.what for a in after.advice if a.measured is not None] == [other.advice.what]
    assert "lr=0.2" in after.advice[0].code and after.advice[0].promise == "tried: 3 times fewer steps"
    why = {c.name: c.why for c in after.considered}
    assert why[first.remedy.name] == "tried: 1.25 times more steps" and why[other.name] == ""
    none = _learned(replace(found, advice=(first,), undiagnosed=()), {first.remedy.name: first.tried(0.1, 1.1)})
    assert not none.advice and none.verdict == "Nothing that was tried saved a fifth of the steps."


def test_the_same_optimizer_again_has_its_groups_and_settings():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    groups = [{"params": [model[0].weight, model[1].weight], "weight_decay": 0.1}, {"params": [model[0].bias, model[1].bias]}]
    other = copy.deepcopy(model)
    made = base_of(torch.optim.NAdam(groups, lr=1.0, betas=(0.8, 0.9)), model).now().make(other, 0.25)
    assert isinstance(made, torch.optim.NAdam)
    assert [(g["lr"], g["weight_decay"], g["betas"]) for g in made.param_groups] == [
        (0.25, 0.1, (0.8, 0.9)),
        (0.25, 0, (0.8, 0.9)),
    ]
    assert made.param_groups[0]["params"][1] is other[1].weight
    ours = base_of(precond.adamw(model, lr=1.0, weight_decay=0.3), model).now()
    assert "precond.adamw(model, lr=0.5, weight_decay=0.3)" in ours.code(0.5)
    assert ours.make(other, 0.5).param_groups[0]["weight_decay"] == 0.3


def test_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["diagnose", "wine", "--model", "linear", "--try", "--try-steps", "10", "--out", "found"]) == 0
    out = capsys.readouterr().out
    assert "Tried:" in out and "fewer steps" in out
    tried = json.loads((tmp_path / "found" / "diagnosis.json").read_text())["tried"]
    assert tried[1]["ratio"] > 1 and len(tried[1]["curve"]["losses"]) > 3
    assert "Losses of what was tried" in (tmp_path / "found" / "diagnosis.html").read_text()
    assert main(["lr-range", "wine", "--model", "linear", "--recipe", "adam", "--steps", "5", "--ramp-steps", "30"]) == 0
    assert "Learning rate" in capsys.readouterr().out
    assert main(["lr-range", "wine", "--steps", "0"]) == 2
    second_gradient = [
        "lr-range",
        "wine",
        "--model",
        "linear",
        "--recipe",
        "adamw+SAM(0.05)",
        "--steps",
        "5",
        "--ramp-steps",
        "10",
    ]
    assert main(second_gradient) == 0
