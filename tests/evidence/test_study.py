"""The study of z against p: its perturbations and its fairness."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import precond
from precond.algebra.maps import Diagonal
from precond.lab.evidence import study
from precond.optim.preconditioners import Fixed


def moved(regularizer, root):
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
    optimizer = precond.PreconditionedGD(model, 0.1, preconditioner=Fixed(Diagonal((root,))), regularizers=[regularizer])
    seen = []
    A = torch.diag(torch.tensor([1.0, 3.0, 9.0], dtype=torch.float64))

    def closure():
        optimizer.zero_grad()
        p = model.weight[0]
        seen.append(p.detach().clone())
        loss = 0.5 * p @ A @ p
        loss.backward()
        return loss

    optimizer.step(closure)
    return A, seen, model.weight[0].detach()


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("space", ["p", "z"])
def test_the_perturbation_has_its_length_and_direction(space, beta):
    root = torch.tensor([[0.5, 1.0, 4.0]], dtype=torch.float64)
    A, (p, ascended), after = moved(study.Ascent(0.2, space, damping=0.0, beta=beta), root)
    M = torch.diag(root[0] ** 2)
    g = A @ p
    along = M @ g if space == "z" else g
    delta = 0.2 * along / along.norm()
    torch.testing.assert_close(ascended - p, delta, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(after, p - 0.1 * M @ (g + beta * A @ delta), rtol=1e-12, atol=1e-14)


def test_the_gradient_norm_s_strength_in_z_is_a_multiple_of_the_implied_one():
    root = torch.tensor([[0.5, 1.0, 4.0]], dtype=torch.float64)
    method = next(m for m in study.methods() if m.label == "λ‖∇L‖² in z, δ = 0")
    A, (p, *_), after = moved(method.penalty(6.0, 0.1)[0], root)
    M = torch.diag(root[0] ** 2)
    # p − αM(g + 2λ H M g) with λ = kα/4.
    expected = p - 0.1 * M @ (A @ p + 2 * (6.0 * 0.1 / 4) * A @ M @ A @ p)
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-8)


def data():
    draw = torch.Generator().manual_seed(7)
    x = torch.randn(60, 5, generator=draw) * 3 + 1
    return x, (x[:, 0] > 1).long()


SETTING = study.Setting("made-up", data, (20, 15, 25), 8, precond.adam, (1e-3, 1e-2, 1e-1), standardize=True, hidden=4)


def test_a_training_is_its_seed_and_leaves_the_global_generator(monkeypatch):
    monkeypatch.setattr(study, "EPOCHS", 2)
    none = study.methods()[0]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = study.train(SETTING, none, 0.01, 0.1, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert study.train(SETTING, none, 0.01, 0.1, 0) == first != study.train(SETTING, none, 0.01, 0.1, 1)


@pytest.mark.parametrize("optimizer", [precond.adam, precond.adagrad, precond.bnp])
def test_every_method_trains_with_every_optimizer(monkeypatch, optimizer):
    monkeypatch.setattr(study, "EPOCHS", 1)
    setting = dataclasses.replace(SETTING, optimizer=optimizer)
    without, *scores = (
        study.train(setting, method, 0.01, method.strengths[2 % len(method.strengths)], 0) for method in study.methods()
    )
    assert all(score != without for score in scores)  # a penalty that does nothing is none


def test_every_method_has_as_many_trials(monkeypatch):
    calls = []

    def scored(setting, method, lr, strength, seed):
        calls.append((method.label, lr, strength, seed))
        best = (lr, strength) == (SETTING.rates[1], method.strengths[-1])
        return study.Score(math.inf if lr == SETTING.rates[2] else 0.1 if best else 0.2, seed, 0.9)

    monkeypatch.setattr(study, "train", scored)
    found = [study.result(SETTING, method) for method in study.methods()]
    assert {len(r.trials) for r in found} == {15}
    assert len({r.method for r in found}) == len(found) == 15
    sam = next(r for r in found if r.method == "SAM in p")
    assert (sam.lr, sam.strength) == (SETTING.rates[1], study.LENGTHS[-1])
    assert not set(study.SEEDS) & set(study.SEARCH_SEEDS)
    for factor in study.FACTORS:
        assert ("SAM in p", sam.lr, factor * sam.strength, 0) in calls
    assert found[0].stronger == () and [len(losses) for losses in sam.stronger] == [8, 8]


def test_the_settings_fit_their_data():
    for setting in study.settings(data)[:2] + study.settings(data)[3:]:
        x, y = setting.data()
        assert sum(setting.sizes) <= len(x) == len(y) and x.dtype == torch.float32


def test_an_interval_where_a_training_diverged():
    middle, width = study.interval([1.0, math.inf, 2.0])
    assert middle == math.inf and math.isnan(width)
