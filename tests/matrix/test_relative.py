"""Steps of RMS in proportion to the first outputs of layers whose inputs are raw."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import precond
from precond import BNP, RMS, Momentum, PreconditionedGD, RelativeRMS, Whitening


def raw(n: int = 40, columns: int = 6, seed: int = 0) -> Tensor:
    """Columns of scales from 1 to 1,000, far from 0, and not correlated at all: BNP whitens them."""
    g = torch.Generator().manual_seed(seed)
    scales = 10 ** torch.linspace(0, 3, columns, dtype=torch.float64)
    x = torch.randn(n, columns, generator=g, dtype=torch.float64)
    return (n**0.5 * torch.linalg.qr(x - x.mean(0))[0] + 1) * scales


def net(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())][:-1]).double()


def made(model: nn.Module, outer: precond.Preconditioner, inner: RMS, **more) -> PreconditionedGD:
    return PreconditionedGD(model, more.pop("lr", 1e-3), preconditioner=outer @ inner, momentum=Momentum(0.9), **more)


def steps(model: nn.Module, optimizer: PreconditionedGD, count: int, first: int = 0, scale: float = 1.0) -> list[Tensor]:
    for k in range(first, first + count):
        optimizer.zero_grad()
        model(scale * raw(seed=k)).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


OUTER = {"BNP": BNP(damping=0.0), "Whitening": Whitening(damping=0.0, shrinkage=0.0)}
outers = pytest.mark.parametrize("outer", OUTER)
engines = pytest.mark.parametrize("engine", ["auto", "loop"])


@outers
@engines
def test_a_first_step_is_longer_by_the_root_mean_square_of_the_outputs(outer, engine):
    """‖z₀‖² = A·E[output²]: of all that was observed, which the outputs themselves say without any P."""
    moves = []
    for inner in (RMS(), RelativeRMS()):
        model = net(6, 5)
        before = copy.deepcopy(model)
        after = steps(model, made(model, OUTER[outer], inner, engine=engine), 1)
        moves.append([q - p for p, q in zip(before.parameters(), after, strict=True)])
    size = before(raw()).square().mean().sqrt()
    assert size > 100
    for plain, longer in zip(*moves, strict=True):
        torch.testing.assert_close(longer, size * plain, rtol=1e-9, atol=1e-12)


@outers
@engines
def test_layers_whose_outputs_are_not_large_take_rms(outer, engine):
    found = [
        steps(model, made(model, OUTER[outer], inner, engine=engine), 12, scale=1e-2)
        for inner in (RMS(), RelativeRMS())
        for model in [net(6, 5, 3)]
    ]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@outers
def test_kernel_loop_and_stack_are_one(outer):
    """Six layers alike, which a stack takes, and one that stands alone."""
    widths = (6, 6, 6, 6, 6, 6, 6, 3)
    inner = RelativeRMS(large=0.0, eps=1e-3)
    damped = {"BNP": BNP(), "Whitening": Whitening()}[outer]
    found = [
        steps(model, made(model, damped, inner, engine=engine), 12, scale=1e-2)
        for engine in ("auto", "loop")
        for model in [net(*widths)]
    ]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@outers
@engines
def test_resumed_amid_the_first_steps_bit_for_bit(outer, engine):
    model = net(6, 5, 3)
    optimizer = made(model, OUTER[outer], RelativeRMS(), engine=engine)
    steps(model, optimizer, 3)
    twin = copy.deepcopy(model)
    other = made(twin, OUTER[outer], RelativeRMS(), engine=engine)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for a, b in zip(steps(model, optimizer, 9, 3), steps(twin, other, 9, 3), strict=True):
        assert torch.equal(a, b)


@engines
@pytest.mark.parametrize("make", [precond.whitening, lambda m, **more: precond.adam(m, inputs=BNP(), **more)])
def test_outputs_are_looked_at_when_p_is_known(make, engine):
    """A first batch of one sample has no covariance, and a first step in eval() shows no inputs: s is of the next step."""
    for one, evaluating in ((True, False), (False, True)):
        model = net(6, 5)
        optimizer = make(model, engine=engine)
        for k in range(3):
            model.train(not (evaluating and k == 0))
            x = raw(seed=k)
            optimizer.zero_grad()
            model(x[:1] if one and k == 0 else x).square().mean().backward()
            if evaluating and k == 0:
                with pytest.warns(UserWarning, match="no layer inputs"):
                    optimizer.step()
                assert optimizer.state[model[0].weight]["inner.scale"] == 0
            else:
                optimizer.step()
        assert optimizer.state[model[0].weight]["inner.scale"] > 10


def test_explain_tells_it():
    model = net(6, 5, 3)
    optimizer = precond.whitening(model)
    assert {row.why for row in optimizer.explain().rows} == {""}
    steps(model, optimizer, 1)
    why = {row.name: row.why for row in optimizer.explain().rows}
    assert why["0.weight"] == why["0.bias"] == "first outputs 2.9e+02: steps × 2.9e+02"
    assert why["2.weight"] == ""


def test_a_layer_that_is_thawed_after_a_look_at_the_training_loss():
    """That forward is no step's: the next one is observed."""
    model = net(6, 5)
    model[0].requires_grad_(False)
    head = nn.Linear(5, 1).double()
    whole = nn.Sequential(model, head)
    optimizer = precond.whitening(whole)
    steps(whole, optimizer, 3)
    with torch.no_grad():
        whole(raw())
    model[0].requires_grad_(True)
    steps(whole, optimizer, 1, 3)
    assert optimizer.state[model[0].weight]["inner.scale"] > 100


def test_a_state_without_it_is_that_of_rms():
    """Of version 0.1."""
    model = net(6, 5)
    optimizer = precond.whitening(model)
    steps(model, optimizer, 10)
    state = optimizer.state_dict()
    for of in state["state"].values():
        of.pop("inner.scale", None)
    twin = copy.deepcopy(model)
    other = precond.whitening(twin)
    other.load_state_dict(state)
    assert other.state[twin[0].weight]["inner.scale"] == 0
    plain = copy.deepcopy(model)
    rms = PreconditionedGD(plain, 1e-3, preconditioner=Whitening() @ RMS(), momentum=Momentum(0.9))
    assert all(t.isfinite().all() for t in steps(twin, other, 2, 10))
    assert rms.explain()


@engines
def test_decoupled_decay_is_not_longer(engine):
    """Without a gradient in some direction, p ← (1 − αλ)p."""
    model = net(6, 5)
    optimizer = precond.whitening(model, lr=0.1, weight_decay=0.5, engine=engine)
    plain = copy.deepcopy(model)
    other = precond.whitening(plain, lr=0.1, weight_decay=0.0, engine=engine)
    start = [p.detach().clone() for p in model.parameters()]
    for p, a, b in zip(start, steps(model, optimizer, 1), steps(plain, other, 1), strict=True):
        torch.testing.assert_close(a - b, -0.05 * p, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [lambda m: precond.whitening(m), lambda m: precond.adam(m, inputs=BNP())])
def test_raw_features_are_learned_at_the_default_rate(make):
    """Three classes that two of six columns tell apart: AdamW at its own is not as far by half."""
    x = raw(120)
    z = (x - x.mean(0)) / x.std(0)
    y = (z[:, 0] + z[:, 5] > 0).long() + (z[:, 1] > 1).long()

    def trained(make) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)).double()
        optimizer = make(model)
        for _ in range(200):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        return loss.item()

    assert trained(make) < 0.5 * trained(lambda m: torch.optim.AdamW(m.parameters()))


def test_bad_arguments():
    with pytest.raises(ValueError, match="large"):
        RelativeRMS(large=-1.0)
    with pytest.raises(ValueError, match="centered"):
        RelativeRMS(centered=True)
