"""Averages of the weights against explicit sums, and what with averaged(): promises."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import precond
from contract.table import batches, closure, flat, net, train
from precond import EMA, EMANesterov, PolynomialAverage, TailMean


def followed(average, steps=7, lr=0.01, make=precond.adamw, **options):
    """The weights after each step, and those of evaluation; gradients are those of a fixed model's batches."""
    model = net()
    optimizer = make(model, lr=lr, average=average, **options)
    weights, evaluated = [], []

    def note(t):
        weights.append(flat(model))
        if average is not None:
            with optimizer.averaged():
                evaluated.append(flat(model))

    train(model, optimizer, batches(steps), note)
    return weights, evaluated


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("start", [1, 3])
@pytest.mark.parametrize("blend", [1.0, 0.4])
def test_an_ema_is_a_sum_with_weights_that_start_as_a_mean(decay, start, blend):
    weights, evaluated = followed(EMA(decay, start, blend))
    plain, _ = followed(None)
    assert all(map(torch.equal, weights, plain))  # training does not know
    for t, found in enumerate(evaluated, 1):
        tail = weights[start - 1 : t]
        if not tail:
            assert torch.equal(found, weights[t - 1])
            continue
        shares = [max(1 - decay, 1 / n) for n in range(1, len(tail) + 1)]
        each = [s * torch.tensor([1 - r for r in shares[k + 1 :]], dtype=torch.float64).prod() for k, s in enumerate(shares)]
        assert sum(each).item() == pytest.approx(1.0)
        mean = sum(w * x for w, x in zip(each, tail, strict=True))
        torch.testing.assert_close(found, (1 - blend) * weights[t - 1] + blend * mean, rtol=1e-12, atol=1e-14)


def test_a_tail_mean_is_the_mean():
    weights, evaluated = followed(TailMean(4))
    for t in range(4, 8):
        torch.testing.assert_close(evaluated[t - 1], torch.stack(weights[3:t]).mean(0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("power", [0, 1, 2.5, 9])
@pytest.mark.parametrize("start", [1, 3])
def test_a_polynomial_average_weighs_steps_by_rising_powers(power, start):
    weights, evaluated = followed(PolynomialAverage(power, start))
    for t in range(start, 8):
        tail = weights[start - 1 : t]
        each = [math.exp(math.lgamma(i + power) - math.lgamma(i)) for i in range(1, len(tail) + 1)]  # Γ(i+η)/Γ(i), about i^η
        mean = sum(w * x for w, x in zip(each, tail, strict=True)) / sum(each)
        torch.testing.assert_close(evaluated[t - 1], mean, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("start", [1, 3])
def test_the_lookahead_is_that_of_the_moves_averaged(start):
    """x ← A(x + βm), m ← γm + (1−γ)(x′ − x), spelled out for descent of ‖p − a‖²/2, A(y) = y − α(y − a)."""
    beta, gamma, alpha = 3.0, 0.8, 0.1
    a = torch.tensor([1.0, -2.0], dtype=torch.float64)
    p = nn.Parameter(torch.tensor([4.0, 1.0], dtype=torch.float64))
    optimizer = precond.sgd([p], lr=alpha, average=EMANesterov(beta, gamma, start))
    x, m = p.detach().clone(), torch.zeros(2, dtype=torch.float64)
    for t in range(1, 12):
        p.grad = p.detach() - a
        optimizer.step()
        y = x + beta * m
        new = y - alpha * (y - a)
        if t > start:  # the average begins with the weights of its first step
            m = gamma * m + (1 - gamma) * (new - x)
        x = new
        torch.testing.assert_close(p.detach(), x + beta * m, rtol=1e-12, atol=1e-14)
        with optimizer.averaged():
            torch.testing.assert_close(p.detach(), x, rtol=1e-12, atol=1e-14)


def test_some_parameters_only():
    model = net()
    optimizer = precond.adamw(model, average=EMA(0.9, where="conv.*"))
    train(model, optimizer, batches(3))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with optimizer.averaged():
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"conv.weight", "conv.bias"}


def test_no_checkpoint_forgets_it_and_one_without_begins_anew():
    model = net()
    optimizer = precond.adamw(model, average=TailMean(2))
    train(model, optimizer, batches(5))
    saved = copy.deepcopy(optimizer.state_dict())
    with optimizer.averaged():
        expected = flat(model)
    other = net()
    other.load_state_dict(model.state_dict())
    resumed = precond.adamw(other, average=TailMean(2))
    resumed.load_state_dict(saved)
    with resumed.averaged():
        assert torch.equal(flat(other), expected)
    plain = precond.adamw(other)
    plain.load_state_dict(saved)  # another configuration of the same recipe
    late = precond.adamw(other, average=EMA(0.999))
    late.load_state_dict(precond.adamw(net()).state_dict() | {"state": plain.state_dict()["state"]})
    train(other, late, batches(1))
    with late.averaged():
        assert torch.isfinite(flat(other)).all()


def test_a_state_without_an_average_starts_one_with_the_weights_then():
    model = net()
    plain = precond.adamw(model)
    train(model, plain, batches(6))
    late = precond.adamw(model, average=EMA(0.999))
    late.load_state_dict(plain.state_dict())
    train(model, late, batches(1))
    before = flat(model)
    with late.averaged():
        assert torch.equal(flat(model), before)


def test_a_step_that_is_skipped_is_not_averaged():
    model = net()
    optimizer = precond.adamw(model, average=TailMean(1), nonfinite="skip")
    train(model, optimizer, batches(3))
    counts = [s["averaged"].item() for s in optimizer.state.values()]
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert counts == [3.0] * len(counts) == [s["averaged"].item() for s in optimizer.state.values()]


def test_after_an_exception_the_weights_are_where_they_were():
    model = net()
    optimizer = precond.adamw(model, average=EMA(0.9))
    train(model, optimizer, batches(3))
    before = flat(model)
    with pytest.raises(KeyError), optimizer.averaged():
        assert not torch.equal(flat(model), before)
        raise KeyError
    assert torch.equal(flat(model), before)
    train(model, optimizer, batches(1))


@pytest.mark.parametrize("what", ["step", "state_dict", "averaged"])
def test_within_it_nothing_is_trained_or_saved(what):
    model = net()
    optimizer = precond.adamw(model, average=EMA(0.9))
    train(model, optimizer, batches(2))
    run = {
        "step": lambda: optimizer.step(closure(model, optimizer, batches(1)[0])),
        "state_dict": optimizer.state_dict,
        "averaged": lambda: optimizer.averaged().__enter__(),
    }[what]
    with optimizer.averaged(), pytest.raises(RuntimeError, match="leave `with optimizer"):
        run()
    train(model, optimizer, batches(1))


def test_of_16_bit_weights_the_average_is_of_32():
    model = net(torch.bfloat16)
    optimizer = precond.adamw(model, average=EMA(0.9), rounding="kahan")
    train(model, optimizer, batches(3, torch.bfloat16))
    assert all(s["average"].dtype == torch.float32 for s in optimizer.state.values())
    with optimizer.averaged():
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EMA(1.0), "decay"),
        (lambda: EMA(0.9, blend=1.5), r"blend must be in \[0, 1\], got 1.5"),
        (lambda: TailMean(0), "start"),
        (lambda: PolynomialAverage(-1.0), "power"),
        (lambda: EMANesterov(-1.0), "lookahead"),
        (lambda: EMANesterov(0.3, 0.0), "decay"),
        (lambda: precond.adamw(net(), average=0.999), "average must be"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def test_without_an_average_the_remedy_is_named():
    with pytest.raises(RuntimeError, match=r"pass average=precond.EMA\(0.999\)"), precond.adamw(net()).averaged():
        pass
