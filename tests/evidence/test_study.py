"""The study of z against p: its perturbations and its fairness."""

import pytest
import torch
from torch import nn

import precond
from precond.evidence import study
from precond.maps import Diagonal
from precond.preconditioners import Fixed


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


def test_a_training_is_its_seed_and_leaves_the_global_generator(monkeypatch):
    monkeypatch.setattr(study, "EPOCHS", 2)
    none = study.methods()[0]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = study.train(none, 0.01, 0.1, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert study.train(none, 0.01, 0.1, 0) == first != study.train(none, 0.01, 0.1, 1)


def test_every_method_has_as_many_trials(monkeypatch):
    calls = []

    def scored(method, lr, strength, seed):
        calls.append((method.label, lr, strength, seed))
        best = (lr, strength) == (study.LEARNING_RATES[1], method.strengths[-1])
        return study.Score(0.1 if best else 0.2, seed, 0.9)

    monkeypatch.setattr(study, "train", scored)
    found = list(study.results())
    assert {r.trials for r in found} == {12}
    assert len({r.method for r in found}) == len(found) == 10
    sam = next(r for r in found if r.method == "SAM in p")
    assert (sam.lr, sam.strength) == (study.LEARNING_RATES[1], study.LENGTHS[-1])
    assert not set(study.SEEDS) & set(study.SEARCH_SEEDS)
    assert ("SAM in p", sam.lr, 2 * sam.strength, 0) in calls
