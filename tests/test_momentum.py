"""Averages against their closed forms: sums over the history."""

from __future__ import annotations

import pytest
import torch

from precond import Momentum
from precond.optim.blocks import Block, Leaf, State

SHAPES = ((2, 3), (), (0,), (4,))


def history(steps, seed=0):
    make = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(s, generator=make, dtype=torch.float64) for s in SHAPES) for _ in range(steps)]


def block(dtype=torch.float64):
    return Block(tuple(Leaf(str(i), torch.zeros(s, dtype=dtype)) for i, s in enumerate(SHAPES)))


def follow(momentum, seen, late=0):
    """What is descended after each step; the last leaf joins ``late`` steps after the others."""
    state = State(block(), momentum.init(block()), step=tuple(torch.zeros(()) for _ in SHAPES))
    for t, a in enumerate(seen, start=1):
        joined = len(SHAPES) if t > late else len(SHAPES) - 1
        part = state.restricted(range(joined))
        for step in part["step"]:
            step += 1
        momentum.fold(part, a[:joined])
        yield momentum.current(part, a[:joined])


def ema(beta, start, corrected):
    def weight(s, t):  # of a_s in m_t
        w = beta ** (t - s) * (1.0 if start == "first_gradient" and s == 1 else 1 - beta)
        return w / (1 - beta**t) if corrected else w

    return weight


def heavy_ball(beta, start="zero", dampening=0.0):
    return lambda s, t: beta ** (t - s) * (1.0 if start == "first_gradient" and s == 1 else 1 - dampening)


def nesterov(beta):
    return lambda s, t: beta ** (t - s + 1) + (s == t)


CASES = {
    "ema": (Momentum(0.8), ema(0.8, "zero", True)),
    "ema-uncorrected": (Momentum(0.8, bias_correction=False), ema(0.8, "zero", False)),
    "ema-first": (Momentum(0.8, start="first_gradient"), ema(0.8, "first_gradient", False)),
    "ema-0": (Momentum(0.0), ema(0.0, "zero", True)),
    "heavy-ball": (Momentum(0.8, "heavy_ball"), heavy_ball(0.8)),
    "heavy-ball-first": (Momentum(0.8, "heavy_ball", "first_gradient", dampening=0.4), heavy_ball(0.8, "first_gradient", 0.4)),
    "heavy-ball-dampening": (Momentum(0.8, "heavy_ball", dampening=0.4), heavy_ball(0.8, dampening=0.4)),
    "heavy-ball-0": (Momentum(0.0, "heavy_ball"), heavy_ball(0.0)),
    "nesterov": (Momentum(0.8, "nesterov"), nesterov(0.8)),
    "nesterov-first": (Momentum(0.8, "nesterov", start="first_gradient"), nesterov(0.8)),
    "nesterov-0": (Momentum(0.0, "nesterov"), nesterov(0.0)),
}


@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize("name", CASES)
def test_closed_forms(name, late):
    momentum, weight = CASES[name]
    seen = history(5)
    for t, found in enumerate(follow(momentum, seen, late), start=1):
        for i, m in enumerate(found):
            skipped = late if i == len(SHAPES) - 1 else 0  # this leaf's own first step
            steps = t - skipped
            expected = sum(weight(s, steps) * seen[skipped + s - 1][i] for s in range(1, steps + 1))
            torch.testing.assert_close(m, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_what_is_averaged_is_left_alone(name):
    seen = history(3)
    before = history(3)
    for _ in follow(CASES[name][0], seen):
        pass
    assert all(torch.equal(a, b) for x, y in zip(seen, before, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_state_is_kept_only_where_there_is_an_average_and_in_float32_at_least(name):
    momentum = CASES[name][0]
    state = momentum.init(block(torch.bfloat16))
    assert ("m" in state) == (momentum.beta > 0 or momentum.kind == "ema")
    assert all(m.dtype == torch.float32 and not m.requires_grad and not m.any() for m in state.get("m", ()))


@pytest.mark.parametrize(
    ("momentum", "corrected"),
    [
        (Momentum(), True), (Momentum(start="first_gradient"), False), (Momentum(kind="heavy_ball"), False),
        (Momentum(kind="nesterov"), False), (Momentum(bias_correction=False), False), (Momentum(bias_correction=True), True),
    ],
)  # fmt: skip
def test_bias_is_corrected_where_there_is_one(momentum, corrected):
    assert momentum.corrected is corrected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 1.0}, r"beta must lie in \[0, 1\)"),
        ({"beta": -0.1}, "beta must be a finite number >= 0"),
        ({"kind": "nestorov"}, "did you mean 'nesterov'"),
        ({"of": "step"}, "of must be one of 'cotangent', 'tangent'"),
        ({"start": "one"}, "start must be one of"),
        ({"dampening": 0.1}, "dampening belongs to kind='heavy_ball'"),
        ({"dampening": -0.1, "kind": "heavy_ball"}, "dampening must be a finite number >= 0"),
        ({"bias_correction": True, "kind": "nesterov"}, "no bias to correct"),
        ({"bias_correction": True, "start": "first_gradient"}, "no bias to correct"),
    ],
)
def test_contradictions_raise(options, words):
    with pytest.raises(ValueError, match=words):
        Momentum(**options)
