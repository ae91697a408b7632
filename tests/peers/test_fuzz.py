"""Whatever an argument is given, there is an optimizer that works or an error that names the argument."""

from __future__ import annotations

import dataclasses
import inspect
import math
import random
import warnings
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn

import precond
from peers.recipes import closure, flat, net
from precond import RECIPES, PreconditionedGD

NUMBERS = [0, 1, -1, 2, 3, 7, 0.5, 0.9, -0.5, 1e-30, 1e-8, math.inf, math.nan, 10**400, 1j, Decimal("0.1"), Fraction(1, 10)]
TENSORS = [torch.tensor(0.1), torch.tensor(1), torch.tensor([0.1]), torch.tensor([0.1, 0.2]), torch.tensor(math.nan)]
PAIRS = [(), (0.9,), (0.9, 0.99), (0.9, None), ("a", "b"), (0.9, TENSORS[0]), (0.9, 0.99, 0.5), [0.9, 0.99], (3.0, -4.0, 2.0)]
WORDS = ["x", "", "0.1", b"x", "both", "z", "p", "skip", "original", "eigh", "rms", "patch", "full", "kahan", "*.weight"]
CHOICES = [
    precond.BNP(),
    precond.RMS,
    precond.RMS(),
    precond.Whitening(),
    precond.Auto(),
    precond.Momentum(0.5),
    precond.SAM(0.01),
]
OTHERS = [
    None,
    True,
    False,
    {"a": 1},
    object(),
    range(3),
    len,
    lambda: None,
    lambda leaf: 1,
    nn.Linear,
    [precond.L2(0.1)],
    [0.1],
]
VALUES: list[Any] = [*NUMBERS, *TENSORS, *PAIRS, *WORDS, *CHOICES, *OTHERS, precond.L2(0.1)]
SAMPLE = 20
"""Of these, drawn anew for each argument, but alike in each run. With ``len(VALUES)`` the sweep is complete, and takes a minute."""

COMMON = ["statistics_from", "max_norm", "norm_space", "nonfinite", "engine", "rounding"]
PAIRINGS = [
    *[(name, a) for name, f in RECIPES.items() for a in inspect.signature(f).parameters if a not in ("params", "options")],
    *[("PreconditionedGD", a) for a in ("lr", "preconditioner", "regularizers", "momentum", *COMMON)],
]

STRATEGIES: dict[type, Any] = {
    kind: lambda m, p: PreconditionedGD(m, lr=0.01, preconditioner=p, momentum=precond.Momentum(0.9))
    for kind in (
        precond.RMS, precond.AdaGrad, precond.Muon, precond.Polar, precond.Shampoo, precond.SOAP, precond.BNP, precond.Whitening,
        precond.Auto, precond.OutputFactor,
    )
}  # fmt: skip
STRATEGIES[precond.Momentum] = lambda m, p: PreconditionedGD(m, lr=0.01, preconditioner=precond.RMS(), momentum=p)
for penalty in (precond.L1, precond.L2, precond.SAM, precond.GradientNorm):
    STRATEGIES[penalty] = lambda m, p: PreconditionedGD(m, lr=0.01, preconditioner=precond.RMS(), regularizers=[p])
FIELDS = [(kind, f.name) for kind in STRATEGIES for f in dataclasses.fields(kind)]


def outcome(name: str, make) -> str | None:
    """What is wrong with what came of an argument, or None."""
    model = net()
    try:
        optimizer = make(model)
        for t in range(3):
            optimizer.step(closure(model, optimizer, t))
    except (TypeError, ValueError) as error:
        said = "\n".join([str(error), *getattr(error, "__notes__", [])])
        return None if name in said else f"{type(error).__name__} does not name it: {said}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if flat(model).isfinite().all() else "inf or NaN"


def failures(owner: str, name: str, make) -> list[str]:
    values = random.Random(f"{owner} {name}").sample(VALUES, SAMPLE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [(value, outcome(name, lambda m, v=value: make(m, v))) for value in values]
    return [f"{name}={value!r}: {wrong}" for value, wrong in found if wrong is not None]


@pytest.mark.parametrize(("recipe", "argument"), PAIRINGS)
def test_arguments_of_recipes(recipe, argument):
    def make(model, value):
        if recipe == "PreconditionedGD":
            return PreconditionedGD(model, **{"lr": 0.01, "preconditioner": precond.RMS(), argument: value})
        return RECIPES[recipe](model, **{argument: value})

    assert failures(recipe, argument, make) == []


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=lambda x: getattr(x, "__name__", x))
def test_fields_of_strategies(kind, field):
    needed = {f.name: 0.01 for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    assert failures(kind.__name__, field, lambda m, v: STRATEGIES[kind](m, kind(**{**needed, field: v}))) == []


def test_fields_of_a_user_s_own_are_left_alone():
    @dataclasses.dataclass(frozen=True)
    class Mine(precond.RMS):
        table: dict[str, float] | None = None
        anything: Any = 1
        rows: list[float] = dataclasses.field(default_factory=list)

    chosen = Mine(table={"a": 1.0}, anything=len, rows=[2])
    assert (chosen.table, chosen.anything, chosen.rows) == ({"a": 1.0}, len, [2])
    with pytest.raises(TypeError, match="Mine: amsgrad must be True or False"):
        Mine(amsgrad="no")


@pytest.mark.parametrize("recipe", RECIPES)
def test_options_that_do_not_exist(recipe):
    with pytest.raises(TypeError, match="learning_rate"):
        RECIPES[recipe](net(), learning_rate=0.1)
