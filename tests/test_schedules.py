"""Schedules, and the walk that finds the numbers of a configuration and replaces them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from precond import L1, L2, RMS, SAM, AdaGrad, Fixed, GradientNorm, Momentum, Route, TimesLr, Warmup
from precond.algebra.schedules import numbers, replaced, value_at


@pytest.mark.parametrize(
    ("schedule", "step", "lr", "value"),
    [
        (0.3, 7, 0.1, 0.3),
        (TimesLr(2.5), 1, 0.1, 0.25),
        (TimesLr(0.0), 1, 0.1, 0.0),
        (Warmup(0.6, 3), 0, 0.1, 0.0),
        (Warmup(0.6, 3), 1, 0.1, 0.2),
        (Warmup(0.6, 3), 3, 0.1, 0.6),
        (Warmup(0.6, 3), 100, 0.1, 0.6),
        (Warmup(0.6, 1), 1, 0.1, 0.6),
        (Warmup(TimesLr(2.0), 4), 2, 0.1, 0.1),
        (Warmup(Warmup(1.0, 2), 4), 1, 0.1, 0.125),
    ],
)
def test_values(schedule, step, lr, value):
    assert value_at(schedule, step, lr) == pytest.approx(value)
    tensor = value_at(schedule, step, torch.tensor(lr, dtype=torch.float64))
    assert float(tensor) == pytest.approx(value)


def test_a_learning_rate_on_the_device_stays_there():
    lr = torch.tensor(0.1, device="meta")  # reading it would raise
    assert value_at(Warmup(TimesLr(2.0), 4), 2, lr).device.type == "meta"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TimesLr(-1.0), "TimesLr: factor must be a finite number >= 0"),
        (lambda: Warmup(-1.0, 3), "Warmup: value must be a finite number >= 0"),
        (lambda: Warmup(1.0, 0), "Warmup: steps must be > 0"),
        (lambda: Warmup(float("nan"), 3), "Warmup: value"),
    ],
)
def test_bad_numbers_raise(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@dataclass(frozen=True)
class Outer:
    inner: RMS = field(default_factory=RMS)
    more: tuple = (L2(0.1), L2(0.2), L1(0.3))
    number: float = 5.0
    flag: bool = True
    name: str = "a"
    nothing: float | None = None


CONFIGURATIONS = {
    "rms": (RMS(0.9, 1e-3), {"rms.decay": 0.9, "rms.eps": 1e-3, "rms.bias_correction": True, "rms.centered": False,
                             "rms.amsgrad": False}),
    "schedule": (L2(TimesLr(3.0)), {"l2.lam.factor": 3.0}),
    "nested-schedule": (SAM(Warmup(TimesLr(2.0), 5)), {"sam.rho.value.factor": 2.0, "sam.rho.steps": 5, "sam.adaptive": False,
                                                       "sam.eta": 0.01}),
    "list": ([L2(0.1), L2(0.2), L2(0.3)], {"l2.lam": 0.1, "l2_2.lam": 0.2, "l2_3.lam": 0.3}),
    "composition": (
        Fixed() @ AdaGrad() @ AdaGrad(1e-3),
        {"adagrad.eps": 1e-10, "adagrad.initial": 0.0, "adagrad.lr_decay": 0.0,
         "adagrad_2.eps": 1e-3, "adagrad_2.initial": 0.0, "adagrad_2.lr_decay": 0.0},
    ),
    "route": (Route([("*.bias", AdaGrad(), 0.5)]), {"adagrad.eps": 1e-10, "adagrad.initial": 0.0, "adagrad.lr_decay": 0.0}),
    "optional": (GradientNorm(0.1, step=1e-3), {"gradientnorm.lam": 0.1, "gradientnorm.power": 2, "gradientnorm.q": 2,
                                                "gradientnorm.step": 1e-3}),
    "momentum": (Momentum(0.5, "heavy_ball"), {"momentum.beta": 0.5, "momentum.dampening": 0.0}),
    "nothing": (None, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_numbers_have_names(name):
    configuration, expected = CONFIGURATIONS[name]
    assert numbers(configuration) == expected


def test_what_is_not_a_number_is_walked_through_or_left_out():
    assert {k: v for k, v in numbers(Outer()).items() if not k.startswith("rms")} == {
        "outer.number": 5.0, "outer.flag": True, "l2.lam": 0.1, "l2_2.lam": 0.2, "l1.lam": 0.3, "l1.proximal": False
    }  # fmt: skip


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_each_number_is_replaced_alone(name):
    configuration, known = CONFIGURATIONS[name]
    assert replaced(configuration, {}) is configuration
    assert replaced(configuration, known) == configuration
    for key, old in known.items():
        if isinstance(old, bool) or key.endswith("power"):
            continue
        new = replaced(configuration, {key: old + 3 if isinstance(old, int) else old / 2 + 1e-3})
        assert {k for k, v in numbers(new).items() if v != known[k]} == {key}
        assert type(new) is type(configuration)


def test_replaced_numbers_are_checked_again():
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
        replaced([RMS()], {"rms.decay": 1.5})


def test_a_tensor_of_one_element_is_a_number():
    lam = torch.tensor(0.1)
    assert numbers(L2(lam)) == {"l2.lam": lam}
    assert replaced(L2(lam), {"l2.lam": 0.2}) == L2(0.2)
