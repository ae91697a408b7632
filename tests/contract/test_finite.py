"""Every recipe with every penalty in either space, at its defaults, stays finite where plain gradient descent does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import precond
from precond import BNP, L1, L2, SAM, GradientNorm, LossClosure, PreconditionedGD, Standardizing, Whitening

RECIPES = {
    **precond.RECIPES,
    "bnp, momentum": lambda m, **k: precond.bnp(m, momentum=0.9, **k),
    "adamw in BNP's coordinates": lambda m, **k: precond.adamw(m, inputs=BNP(), **k),
    "muon in BNP's coordinates": lambda m, **k: precond.muon(m, inputs=BNP(), **k),
    "soap in whitened coordinates": lambda m, **k: precond.soap(m, inputs=Whitening(), **k),
    "shampoo in BNP's coordinates": lambda m, **k: precond.shampoo(m, inputs=BNP(), **k),
}
PENALTIES = {
    f"{name} in {space}": make
    for space in "pz"
    for name, make in {
        "L2": lambda space=space: [L2(0.01, space)],
        "L1": lambda space=space: [L1(0.01, space)],
        "proximal L1": lambda space=space: [L1(0.01, space, proximal=True)],
        "gradient norm": lambda space=space: [GradientNorm(0.01, space)],
        "SAM and L2": lambda space=space: [SAM(0.05, space), L2(0.01, space)],
    }.items()
}
STIFF = ("L2 in p", "L1 in p", "SAM and L2 in p")
INPUTS = {
    "of scales 0.2 to 3": lambda z: z * torch.logspace(-0.7, 0.5, 10),
    "of scales 1e-4 to 2": lambda z: z * torch.logspace(-4, 0.3, 10),
    "some always 0, one far from 0": lambda z: torch.cat([z[:, :3] * 0, z[:, 3:9], z[:, 9:] * 0.1 + 5], 1),
}


def run(make, penalties, inputs, steps=16):
    """The largest loss and parameter of a small MLP with what makes gradients vanish: dropout, BatchNorm, ReLU. None: refused."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(10, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    try:
        optimizer = make(model, regularizers=penalties)
    except ValueError:
        return None
    largest = 0.0
    for _ in range(steps):
        x, y = inputs(torch.randn(32, 10)), torch.randint(3, (32,))
        loss = optimizer.step(LossClosure(lambda x=x, y=y: nn.functional.cross_entropy(model(x), y))).item()
        largest = max(largest, loss, *(p.detach().abs().max().item() for p in model.parameters()))
        if not loss < float("inf"):
            return float("inf")
    return largest


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", RECIPES)
def test_finite(name, inputs):
    titles = PENALTIES if "0.2" in inputs else STIFF
    found = {title: run(RECIPES[name], PENALTIES[title](), INPUTS[inputs]) for title in titles}
    # A weight of an input of scale 1e-4 may be 1e4, and several times that under a penalty's kinks; what grows is far beyond.
    limit = 1e6 if "1e-4" in inputs else 1e3
    assert {title: x for title, x in found.items() if x is not None and not x < limit} == {}
    assert sum(x is not None for x in found.values()) >= len(titles) / 2


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "adam", "adamw", "muon", "soap", "shampoo", "whitening", "auto"])
def test_a_weight_without_gradient_decays_at_the_recipes_own_pace(name):
    """2λp alone in an entry: a step like that of any other entry, not 2λp/ε."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = precond.RECIPES[name](model, lr=1e-3, regularizers=[L2(0.01, "p")])
    x = torch.randn(16, 4)
    x[:, 0] = 0.0  # an input that never is
    for _ in range(5):
        before = model[0].weight.detach().clone()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        assert (model[0].weight - before).abs().max() <= 0.02


@pytest.mark.parametrize("biased", [True, False])
def test_a_bounded_arrow_is_damped_just_so_far(biased):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    like = (draw(3, 5), draw(3)) if biased else (draw(3, 5),)
    arrow = Standardizing(draw(5), draw(5).abs() * 0.1 + 1e-3, like)
    M = lambda P: P.to_dense() @ P.to_dense().T  # noqa: E731
    largest = torch.linalg.eigvalsh(M(arrow))[-1].item()
    assert arrow.bounded(0.4 / largest) is arrow  # harmless, exactly as it was
    for t in (2 / largest, 1e-2, 1.0):
        P = arrow.bounded(t)
        assert 0.5 / t <= torch.linalg.eigvalsh(M(P))[-1] <= (1 + 1e-9) / t
        change = torch.linalg.inv(M(P)) - torch.linalg.inv(M(arrow))  # sI
        torch.testing.assert_close(change, change[0, 0] * torch.eye(len(change), dtype=change.dtype), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_penalty_of_stiff_coordinates_keeps_its_optimum(momentum):
    """g + 2λp = 0, though α·2λ/σ² = 20 would let p ← p − αM(g + 2λp) grow without bound."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 3, dtype=torch.float64) * torch.tensor([1e-2, 1.0, 1.0]), torch.randn(64, 1, dtype=torch.float64)
    model = nn.Linear(3, 1).double()
    optimizer = precond.bnp(model, lr=0.1, momentum=momentum, regularizers=[L2(0.01, "p")])
    for _ in range(500):
        optimizer.zero_grad()
        (model(x) - y).square().mean().mul(0.5).backward()
        optimizer.step()
    H = torch.cat([x, torch.ones(64, 1, dtype=torch.float64)], 1)
    best = torch.linalg.solve(H.T @ H / 64 + 0.02 * torch.eye(4, dtype=torch.float64), H.T @ y / 64)[:, 0]
    torch.testing.assert_close(torch.cat([model.weight[0], model.bias]).detach(), best, rtol=1e-4, atol=1e-6)


def test_the_general_class_takes_the_clean_gradient_unless_told():
    p = nn.Parameter(torch.ones(1))
    ends = []
    for statistics in ("loss", "total"):
        p.data.fill_(1.0)
        optimizer = PreconditionedGD(
            [p], lr=1e-3, preconditioner=precond.RMS(0.0), regularizers=[L2(0.5, "p")], statistics_from=statistics
        )
        p.grad = torch.zeros(1)
        optimizer.step()
        ends.append(p.item())
    assert ends[0] < -1e4 and ends[1] == pytest.approx(1 - 1e-3)
